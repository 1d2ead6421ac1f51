"""Files of a checkpoint: safetensors, written and read in one pass with their checksums.

This module also runs in a forked child, so it does not use torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

__all__ = ["ShardReader", "fetch", "read_checked", "read_shard", "write_file", "write_tensors"]

MANIFEST = "manifest.json"
CHUNK_BYTES = 2**21  # packed, checksummed and written while in the cache
READ_BYTES = 2**19  # read, checksummed and used while in the cache
ALIGNMENT = 4096  # of writes that bypass the page cache
DIRECT = getattr(os, "O_DIRECT", 0)

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Writes arrays [n, ...] to a safetensors file and returns its checksum. There may be gaps between rows in memory.

    Equal arrays give equal bytes: the file has no metadata, and tensors keep their order.
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

    Each byte is copied once, to a block of aligned memory that stays in the processor cache for the checksum. Writes
    bypass the page cache where the file system supports it: the file is not read soon, and filling the page cache
    would take more CPU time.
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
    """The buffer of each writing thread, allocated once: new memory costs more than the work in it.

    The mapping is private. A shared one, the default of mmap, would let a forked child write into the parent's buffer.
    """

    def __init__(self) -> None:
        self.block = np.frombuffer(mmap.mmap(-1, CHUNK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


_own = _Own()


def _items(part: bytes | np.ndarray) -> np.ndarray:
    """A part as items [n] of contiguous bytes: single bytes, or whole rows where there are gaps between rows."""
    array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
    if array.flags.c_contiguous or not array[:1].flags.c_contiguous or array[:1].nbytes > CHUNK_BYTES // 2:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.reshape(len(array), -1).view(f"V{array[:1].nbytes}")[:, 0]


def _write_block(file: IO[bytes], block: memoryview) -> None:
    """Writes a block past the page cache. If that fails, this block and all later ones are written through the cache,
    whose errors are specific."""
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
    """Turns writing past the page cache on or off, where the system and the file system support it."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | DIRECT if on else flags & ~DIRECT)


def read_checked(path: Path, checksum: str) -> bytes:
    """The file's content.

    Raises:   ValueError naming the file when it is missing or its checksum differs from the manifest.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing, expected the file that {MANIFEST} names.") from error
    if xxhash.xxh3_128_hexdigest(content) != checksum:
        raise _damaged(path)
    return content


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path}: checksum differs from {MANIFEST}. The file is damaged; use an older checkpoint.")


def fetch(path: Path) -> None:
    """Lets the system start reading a file that is needed soon, where it supports that."""
    with contextlib.suppress(OSError, AttributeError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


@contextlib.contextmanager
def read_shard(path: Path, checksum: str) -> Iterator[ShardReader]:
    """Reads a shard. Its contents are verified when `ShardReader.pieces` has ended.

    Raises:   as `read_checked`, in place of any other error that a damaged file caused.
    """
    try:
        with path.open("rb", buffering=0) as file:
            yield ShardReader(path, checksum, file.fileno())
    except Exception:
        read_checked(path, checksum)
        raise


class ShardReader:
    """The columns of a shard, each byte read once and checksummed as it is used: see `read_shard`."""

    def __init__(self, path: Path, checksum: str, descriptor: int) -> None:
        self._path, self._checksum, self._descriptor = path, checksum, descriptor
        self._digest, self._ahead = xxhash.xxh3_128(), dict[str, np.ndarray]()
        size = os.fstat(descriptor).st_size
        length = self._read(0, np.empty(8, np.uint8)).tobytes()
        text = self._read(8, np.empty(min(int.from_bytes(length, "little"), size - 8), np.uint8)).tobytes()
        self._digest.update(length + text)
        entries = sorted(json.loads(text).items(), key=lambda entry: entry[1]["data_offsets"])
        start = 8 + len(text)
        if start + entries[-1][1]["data_offsets"][1] != size:
            raise _damaged(path)
        self._columns = {
            name: (start + entry["data_offsets"][0], np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]))
            for name, entry in entries
        }

    def ahead(self, *names: str) -> list[np.ndarray]:
        """Whole columns, before `pieces` reaches them."""
        for name in set(names) - self._ahead.keys():
            at, dtype, shape = self._columns[name]
            self._ahead[name] = self._read(at, np.empty(shape, dtype))
        return [self._ahead[name] for name in names]

    def pieces(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """The file from begin to end: name of a column, first row, and rows. The rows are valid until the next piece.

        Raises:   ValueError at the end when the bytes that were read are not those that were saved.
        """
        for name, (at, dtype, shape) in self._columns.items():
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            most = shape[0] if name in self._ahead else max(1, READ_BYTES // max(1, row_bytes))
            for first in range(0, shape[0], max(1, most)):
                num = min(most, shape[0] - first)
                if name in self._ahead:
                    piece = self._ahead[name]
                else:
                    block = _own.block if row_bytes <= CHUNK_BYTES else np.empty(row_bytes, np.uint8)
                    piece = self._read(at + first * row_bytes, block[: num * row_bytes])
                    piece = piece.view(dtype).reshape(num, *shape[1:])
                self._digest.update(piece.data)
                yield name, first, piece
        if self._digest.hexdigest() != self._checksum:
            raise _damaged(self._path)

    def _read(self, at: int, into: np.ndarray) -> np.ndarray:
        view = into.reshape(-1).view(np.uint8).data
        while len(view):
            count = os.preadv(self._descriptor, [view], at)
            if not count:
                raise _damaged(self._path)
            view, at = view[count:], at + count
        return into
