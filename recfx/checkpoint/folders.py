"""Folders of checkpoints: manifests, which folders are complete, and a lock for the one writer.

This module also runs in a forked child, so it does not use torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

import xxhash

from recfx.checkpoint.files import MANIFEST, read_checked, write_file

__all__ = [
    "FolderLock",
    "clear_unfinished",
    "delete",
    "digest_of",
    "finished",
    "hide",
    "latest",
    "name_of",
    "read_manifest",
    "sync_folder",
    "write_manifest",
]

FORMAT = 2
STATE, LOCK = "state.safetensors", ".lock"
PREFIX, UNFINISHED = "step-", ".unfinished-"
DIGITS = 9  # names sort like their numbers
NAME = re.compile(rf"{PREFIX}([0-9]{{{DIGITS}}})")
MADE = re.compile(rf"{re.escape(UNFINISHED)}([0-9]{{{DIGITS}}})")  # while it is written
HIDDEN = re.compile(re.escape(UNFINISHED) + NAME.pattern)  # while it is deleted
LOCK_WAIT_S = 2.0
ORPHAN_WAIT_S = 60.0  # for a killed run's background save to notice, between two files, that it may end

KEYS = {"files": dict, "parts": list, "tables": list, "slots": list, "loop": dict, "seed": int}  # of a manifest


def digest_of(manifest: dict) -> str:
    """Checksum of a manifest's contents, independent of white space and order."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def write_manifest(path: Path, manifest: dict) -> None:
    """Writes a manifest, with a checksum of itself."""
    text = json.dumps(manifest | {"manifest_xxh3_128": digest_of(manifest)}, indent=1, sort_keys=True)
    write_file(path, [text.encode()])


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder.

    Raises:   ValueError naming the file when it is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if type(version) is not int:
            raise TypeError(f"format {version!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, or not text
        raise ValueError(f"{path}: got {error!r}, expected a checkpoint's manifest.{_advice(folder)}") from error
    if version != FORMAT:
        advice = "Update recfx." if version > FORMAT else "It was written by a recfx before its first release."
        raise ValueError(f"{path}: got format {version}, expected {FORMAT}. {advice}")
    if manifest.pop("manifest_xxh3_128", None) != digest_of(manifest):
        raise ValueError(f"{path}: checksum differs. The file is damaged; use an older checkpoint.")
    _check_parts(path, manifest)
    return manifest


def _advice(folder: Path) -> str:
    """What to do when a folder is not a checkpoint."""
    if (folder / MANIFEST).exists():
        return " The file is damaged; use an older checkpoint."
    if not folder.is_dir():
        return " Give the folder that `save` returned." if folder.exists() else " The folder does not exist."
    found = finished(folder)
    inside = f"the checkpoints {[p.name for p in found[-3:]]}. Give one of them" if found else "no checkpoint"
    return f" The folder holds {inside}. `latest` finds the newest below a folder."


def _check_parts(path: Path, manifest: dict) -> None:
    """Raises ValueError when a manifest, perhaps edited by hand, names a file twice or one outside its folder."""
    for key, kind in KEYS.items():
        if not isinstance(manifest.get(key), kind):
            got = type(manifest[key]).__name__ if key in manifest else "nothing"
            raise ValueError(f"{path}: got {got} as '{key}', expected {kind.__name__}. Use an older checkpoint.")
    files = manifest["files"]
    try:
        shards = [name for table in manifest["parts"] for part in table for name in part]
        columns = [(str, int, int) == (*map(type, c),) for t in manifest["tables"] for v in t for c in v]
    except TypeError as error:
        raise ValueError(f"{path}: {error}, expected lists in 'parts' and 'tables'. Use an older checkpoint.") from None
    outside = [name for name in files if name != Path(name).name]
    if outside:
        raise ValueError(f"{path}: got file {outside[0]!r}, expected names of files next to it.")
    if sorted(map(str, (*shards, STATE))) != sorted(files):
        raise ValueError(f"{path}: got 'parts' of {shards}, expected each of 'files' once, and {STATE} besides.")
    if len(manifest["parts"]) != len(manifest["tables"]) or not all(columns):
        raise ValueError(f"{path}: got tables {manifest['tables']}, expected [name, column, width]s, one list a part.")
    if type(manifest["loop"].get("step")) is not int:
        raise ValueError(f"{path}: got loop {manifest['loop']}, expected the number of its step in it.")


# A checkpoint exists when its manifest exists; its folder is hidden while it is written or deleted. Only names that
# `save` gives count: other folders next to them, such as step-best or step-000000100.bak, are never touched.


def name_of(number: int) -> str:
    """The name of the folder of checkpoint `number`."""
    return f"{PREFIX}{number:0{DIGITS}d}"


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints below `folder`, oldest first. A link to one counts."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint below `folder`, or None. Only names that `save` gives, step-000000100, count.

    `load` takes a folder of any name.
    """
    paths = finished(Path(folder))
    return paths[-1] if paths else None


def clear_unfinished(folder: Path) -> None:
    """Deletes what a killed save left behind. A checkpoint that only needs its rename is renamed."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        made, hidden = (pattern.fullmatch(leftover.name) for pattern in (MADE, HIDDEN))
        target = folder / name_of(int(made[1])) if made else None
        if leftover.is_dir() and not leftover.is_symlink() and target and not target.exists() and _is_whole(leftover):
            os.replace(leftover, target)
        elif made or hidden:
            delete(leftover)


def delete(path: Path) -> None:
    """Deletes a folder, or a file or link of its name; never the target of a link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    try:
        for name, checksum in read_manifest(path)["files"].items():
            read_checked(path / name, checksum)
    except ValueError:
        return False
    return True


def hide(path: Path) -> Path:
    """Renames a folder before it is deleted: a half-deleted folder must not look like a checkpoint."""
    hidden = path.with_name(UNFINISHED + path.name)
    os.replace(path, hidden)
    return hidden


def sync_folder(folder: Path) -> None:
    """Waits until the folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """A lock for one writer per folder, across processes. It is released when its processes end, in whatever way.

    Raises:   BlockingIOError naming folder and process when another one writes there; OSError when its file cannot be
              written, is a link, or the file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._file = _opened(folder / LOCK)
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                holder = os.pread(self._file, 20, 0).decode()
                patience = LOCK_WAIT_S if _is_running(holder) else ORPHAN_WAIT_S
                if time.monotonic() - begun > patience:
                    os.close(self._file)
                    raise BlockingIOError(
                        error.errno,
                        f"{folder}: process {holder or 'unknown'} writes checkpoints there, expected no other writer. "
                        "Choose another folder, or end that process.",
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                os.close(self._file)
                raise OSError(
                    error.errno,
                    f"{folder}: got no lock ({error.strerror}), expected a file system with flock. Two processes that "
                    "save there would delete each other's files. Save to a local disk, or mount it with flock.",
                ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._file)


def _opened(path: Path) -> int:
    """Opens the lock file, but not through a link: the link's target would be overwritten."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: {error.strerror}, expected a file to write to. A process that saves in a folder locks it. "
            "Delete it if it is a link or belongs to another user, or choose a folder that can be written.",
        ) from error


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # of another user
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True
