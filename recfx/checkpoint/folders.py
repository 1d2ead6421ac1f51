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
from typing import NamedTuple

import xxhash

from recfx.checkpoint.files import MANIFEST, read_checked, write_file

__all__ = [
    "FolderLock",
    "Part",
    "best",
    "clear_unfinished",
    "delete",
    "digest_of",
    "finished",
    "hide",
    "latest",
    "name_of",
    "parts_of",
    "rank_name",
    "read_manifest",
    "read_ranks",
    "sync_folder",
    "write_manifest",
]

FORMAT = 2  # of a folder that one process, or one rank, has written
RANKS_FORMAT = 1002  # of a folder that holds those of several ranks: a kind, not a later version
STATE, LOCK, BEST = "state.safetensors", ".lock", "best.json"
PREFIX, UNFINISHED = "step-", ".unfinished-"
DIGITS = 9  # names sort like their numbers
NAME = re.compile(rf"{PREFIX}([0-9]{{{DIGITS}}})")
RANK_DIGITS = 5
MADE = re.compile(rf"{re.escape(UNFINISHED)}([0-9]{{{DIGITS}}})(?:-[0-9a-f]+)?")  # while it is written
HIDDEN = re.compile(re.escape(UNFINISHED) + NAME.pattern)  # while it is deleted
LOCK_WAIT_S = 2.0
DELETE_ATTEMPTS = 5
ORPHAN_WAIT_S = 60.0  # for a killed run's background save to notice, between two files, that it may end

KEYS = {"files": dict, "parts": list, "tables": list, "slots": list, "loop": dict, "seed": int}  # of a manifest
RANKS_KEYS = {"ranks": list, "streams": int, "loop": dict, "seed": int}  # of one that lists ranks


def digest_of(manifest: dict) -> str:
    """Checksum of a manifest's contents, independent of white space and order."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def write_manifest(path: Path, manifest: dict) -> None:
    """Writes a manifest, with a checksum of itself."""
    text = json.dumps(manifest | {"manifest_xxh3_128": digest_of(manifest)}, indent=1, sort_keys=True)
    write_file(path, [text.encode()])


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder of one process or rank.

    Raises:   ValueError naming the file when it is missing, damaged or of another format.
    """
    path, manifest = folder / MANIFEST, _read(folder)
    if manifest["format"] == RANKS_FORMAT:
        raise ValueError(f"{path}: got a checkpoint of several ranks, expected the folder of one of them.")
    _check_keys(path, manifest, KEYS)
    _check_parts(path, manifest)
    return manifest


def read_ranks(folder: Path) -> dict | None:
    """The manifest of a checkpoint of several ranks: digests of the ranks' manifests, number of streams, seed, loop.

    None: one process wrote it.  Raises: as `read_manifest`.
    """
    path, manifest = folder / MANIFEST, _read(folder)
    if manifest["format"] == FORMAT:
        return None
    _check_keys(path, manifest, RANKS_KEYS)
    digests = manifest["ranks"]
    if not digests or not all(isinstance(digest, str) for digest in digests):
        raise ValueError(f"{path}: got ranks {digests}, expected a digest for each. Use an older checkpoint.")
    return manifest


class Part(NamedTuple):
    """A folder that holds a checkpoint's files: that of one process, or of one rank."""

    path: Path
    digest: str | None  # of a rank's manifest

    def manifest(self) -> dict:
        """Raises: as `read_manifest`; ValueError when it is not the one that was saved with the other ranks'."""
        manifest = read_manifest(self.path)
        if self.digest not in (None, digest_of(manifest)):
            raise ValueError(
                f"{self.path / MANIFEST}: checksum differs from {self.path.parent / MANIFEST}. The folder is of "
                "another checkpoint; use an older one."
            )
        return manifest


def parts_of(folder: Path) -> list[Part]:
    """The folders of all ranks that saved a checkpoint, by rank; `folder` where one process did.

    Raises:   as `read_manifest`.
    """
    manifest = read_ranks(folder)
    if manifest is None:
        return [Part(folder, None)]
    return [Part(folder / rank_name(rank), digest) for rank, digest in enumerate(manifest["ranks"])]


def rank_name(rank: int) -> str:
    """The name of a rank's folder in a checkpoint."""
    return f"rank-{rank:0{RANK_DIGITS}d}"


def _read(folder: Path) -> dict:
    """A manifest of either format. Raises: as `read_manifest`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if type(version) is not int:
            raise TypeError(f"format {version!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, or not text
        raise ValueError(f"{path}: got {error!r}, expected a checkpoint's manifest.{_advice(folder)}") from error
    if version not in (FORMAT, RANKS_FORMAT):
        advice = "Update recfx." if version > FORMAT else "It was written by a recfx before its first release."
        raise ValueError(f"{path}: got format {version}, expected {FORMAT}. {advice}")
    if manifest.pop("manifest_xxh3_128", None) != digest_of(manifest):
        raise ValueError(f"{path}: checksum differs. The file is damaged; use an older checkpoint.")
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


def _check_keys(path: Path, manifest: dict, keys: dict[str, type]) -> None:
    """Raises ValueError when a manifest lacks an entry, or has one of another type."""
    for key, kind in keys.items():
        if not isinstance(manifest.get(key), kind):
            got = type(manifest[key]).__name__ if key in manifest else "nothing"
            raise ValueError(f"{path}: got {got} as '{key}', expected {kind.__name__}. Use an older checkpoint.")
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


def best(folder: str | Path) -> Path | None:
    """The whole checkpoint below `folder` that its best.json names, or None. `recfx.train.train` writes that file."""
    try:
        name = json.loads(Path(folder, BEST).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((path for path in finished(Path(folder)) if path.name == name), None)


def clear_unfinished(folder: Path) -> None:
    """Deletes what a killed save left behind. A checkpoint that only needs its rename is renamed."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        made, hidden = (pattern.fullmatch(leftover.name) for pattern in (MADE, HIDDEN))
        target = folder / name_of(int(made[1])) if made else None
        if leftover.is_dir() and not leftover.is_symlink() and target and not target.exists() and _is_whole(leftover):
            os.replace(leftover, target)
        elif made or hidden:
            _delete_unfinished(leftover)


def _delete_unfinished(path: Path) -> None:
    """Deletes what another rank's background save, of a run that was killed, may still write to.

    It may make one file more while the folder is being deleted; then it finds none for its next file.
    """
    for attempt in reversed(range(DELETE_ATTEMPTS)):
        try:
            delete(path)
        except OSError:
            if attempt and os.path.lexists(path):
                continue
            if os.path.lexists(path):
                raise
        return


def delete(path: Path) -> None:
    """Deletes a folder, or a file or link of its name; never the target of a link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    try:
        for part in parts_of(path):
            for name, checksum in part.manifest()["files"].items():
                read_checked(part.path / name, checksum)
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
