"""Files of a checkpoint: safetensors written and read in one pass with their checksums, manifests, whole folders.

Nothing here uses torch: it runs in a forked child too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

__all__ = [
    "FolderLock",
    "ShardReader",
    "clear_unfinished",
    "digest_of",
    "finished",
    "hide",
    "latest",
    "read_checked",
    "read_manifest",
    "read_some",
    "sync_folder",
    "write_file",
    "write_manifest",
    "write_tensors",
]

FORMAT = 2
MANIFEST, STATE, LOCK = "manifest.json", "state.safetensors", ".lock"
PREFIX, UNFINISHED = "step-", ".unfinished-"
CHUNK_BYTES = 2**21  # packed, checksummed and written while in the cache
ALIGNMENT = 4096  # of what goes past the page cache
DIRECT = getattr(os, "O_DIRECT", 0)
LOCK_WAIT_S = 2.0
ORPHAN_WAIT_S = 60.0  # for a killed run's background save, between two files, to see that it may end

KEYS = {"files": dict, "parts": list, "tables": list, "slots": list, "loop": dict, "seed": int}  # of a manifest
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """A safetensors file of arrays [n, ...], n alike or not; returns its checksum. Rows may have gaps between them.

    Equal arrays give equal bytes: no metadata, tensors in the given order.
    """
    header, end = {}, 0
    for name, array in tensors.items():
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_file(path, [len(text).to_bytes(8, "little") + text, *tensors.values()])


def write_file(path: Path, parts: Iterable[bytes | np.ndarray]) -> str:
    """Writes bytes and arrays one after the other, waits until they are on disk, returns their XXH3 of 128 bits.

    Each byte is copied once, to a block of aligned memory that stays in the cache while it is checksummed, and goes
    past the page cache where the file system can: nobody reads it soon, and filling the cache takes more of a core.
    """
    block, digest, filled = _own.block[:CHUNK_BYTES], xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        _set_direct(file, True)
        for items in map(_items, parts):
            done = 0
            while done < len(items):
                num = min((len(block) - filled) // items.itemsize, len(items) - done)
                new = block[filled : filled + num * items.itemsize]
                new.view(items.dtype)[:] = items[done : done + num]
                digest.update(new.data)
                done, filled = done + num, filled + len(new)
                if done < len(items):
                    whole = filled // ALIGNMENT * ALIGNMENT
                    _write_block(file, block[:whole].data)
                    block[: filled - whole] = block[whole:filled]
                    filled -= whole
        _set_direct(file, False)
        _write_all(file, block[:filled].data)
        os.fsync(file.fileno())
    return digest.hexdigest()


class _Own(threading.local):
    """What each thread that writes has for itself, made once: new memory costs more than what is done with it.

    Private, as mmap's default is shared: a forked child, which goes on with this thread's, would write into it.
    """

    def __init__(self) -> None:
        self.block = np.frombuffer(mmap.mmap(-1, CHUNK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


_own = _Own()


def _items(part: bytes | np.ndarray) -> np.ndarray:
    """[n] of as many bytes as lie together: all of a part's bytes, or row by row where there are gaps between them."""
    array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
    if array.flags.c_contiguous or not array[:1].flags.c_contiguous or array[:1].nbytes > CHUNK_BYTES // 2:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.reshape(len(array), -1).view(f"V{array[:1].nbytes}")[:, 0]


def _write_block(file: IO[bytes], block: memoryview) -> None:
    """What cannot go past the cache goes through it, as all that follows does; its errors say what is wrong."""
    try:
        written = file.write(block)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        written = 0
    if written < len(block):
        _set_direct(file, False)
        _write_all(file, block[written:])


def _write_all(file: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def _set_direct(file: IO[bytes], on: bool) -> None:
    """Writing past the page cache, where system and file system know of it."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | DIRECT if on else flags & ~DIRECT)


def read_checked(path: Path, checksum: str, into: np.ndarray | None = None) -> np.ndarray:
    """The file's bytes, u8, in `into` when it is large enough.

    Raises:   ValueError naming the file when it is missing, or is not the one whose checksum the manifest holds.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = into[:size] if into is not None and len(into) >= size else np.empty(size, np.uint8)
            digest = xxhash.xxh3_128()
            for first in range(0, size, CHUNK_BYTES):
                chunk = content[first : first + CHUNK_BYTES].data
                _read_into(file, chunk)
                digest.update(chunk)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing, expected the file that {MANIFEST} names.") from error
    if digest.hexdigest() != checksum:
        raise ValueError(f"{path}: checksum differs from {MANIFEST}. The file is damaged; use an older checkpoint.")
    return content


def _read_into(file: IO[bytes], view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:  # the file was cut while it was read: the checksum will tell
            return
        view = view[count:]


class ShardReader:
    """Reads shards one after the other into one buffer: arrays are valid until the next read."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def read(self, path: Path, checksum: str) -> dict[str, np.ndarray]:
        """All tensors, by name. Raises: as `read_checked`."""
        content = read_checked(path, checksum, self._buffer)
        if len(content) > len(self._buffer):
            self._buffer = content
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        return {name: _array(entry, content[start:][slice(*entry["data_offsets"])]) for name, entry in header.items()}


def read_some(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Some tensors of a safetensors file, unchecked."""
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            found = {}
            for name in names:
                first, end = header[name]["data_offsets"]
                file.seek(start + first)
                found[name] = _array(header[name], np.fromfile(file, np.uint8, end - first))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error!r}, expected the safetensors file that {MANIFEST} names.") from error
    return found


def _array(entry: dict, content: np.ndarray) -> np.ndarray:
    return content.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


# Manifests.


def digest_of(manifest: dict) -> str:
    """Checksum of a manifest's meaning: white space and order do not count."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def write_manifest(path: Path, manifest: dict) -> None:
    """With a checksum of its own."""
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
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or no text
        raise ValueError(f"{path}: {error!r}, expected a checkpoint's manifest.") from error
    if version != FORMAT:
        advice = "Update recfx." if version > FORMAT else "It was written by a recfx before its first release."
        raise ValueError(f"{path}: got format {version}, expected {FORMAT}. {advice}")
    if manifest.pop("manifest_xxh3_128", None) != digest_of(manifest):
        raise ValueError(f"{path}: checksum differs. The file is damaged; use an older checkpoint.")
    _check_parts(path, manifest)
    return manifest


def _check_parts(path: Path, manifest: dict) -> None:
    """What was edited by hand, checksum included, names no file twice and none outside its folder."""
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
        raise ValueError(f"{path}: got file {outside[0]!r}, expected names of files beside it.")
    if sorted(map(str, (*shards, STATE))) != sorted(files):
        raise ValueError(f"{path}: got 'parts' of {shards}, expected each of 'files' once, and {STATE} beside them.")
    if len(manifest["parts"]) != len(manifest["tables"]) or not all(columns):
        raise ValueError(f"{path}: got tables {manifest['tables']}, expected [name, column, width]s, one list a part.")
    if type(manifest["loop"].get("step")) is not int:
        raise ValueError(f"{path}: got loop {manifest['loop']}, expected the number of its step in it.")


# Folders: a checkpoint is there when its manifest is, and hidden while it is made or deleted.


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints below `folder`, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / MANIFEST).exists())


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint below `folder`, or None."""
    paths = finished(Path(folder))
    return paths[-1] if paths else None


def clear_unfinished(folder: Path) -> None:
    """Deletes what a killed save left behind. What lacks nothing but its rename is given it."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink()
            continue
        target = folder / (PREFIX + leftover.name.removeprefix(UNFINISHED))
        if not target.exists() and not leftover.name.startswith(UNFINISHED + PREFIX) and _is_whole(leftover):
            os.replace(leftover, target)
        else:
            shutil.rmtree(leftover)


def _is_whole(path: Path) -> bool:
    try:
        for name, checksum in read_manifest(path)["files"].items():
            read_checked(path / name, checksum)
    except ValueError:
        return False
    return True


def hide(path: Path) -> Path:
    """Before it is deleted, by one rename: a folder half deleted must not pass for a checkpoint."""
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
    """One writer per folder, across processes; it ends with its processes, however they end.

    Raises:   BlockingIOError naming folder and process when another one writes there.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
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
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._file)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True
