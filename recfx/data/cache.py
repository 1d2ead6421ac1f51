"""Decoded rows kept on disk as records and mapped into memory, so that a later epoch decodes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import xxhash

from recfx.data.files import File
from recfx.data.identity import NoIdentityError
from recfx.data.packing.mapped_files import MappedFile, replaced
from recfx.data.unit_rows import Decoded

if TYPE_CHECKING:
    from recfx.data.decode import Recipe

__all__ = ["RecordCache", "cache_for"]

VERSION = 3  # of the entries: a reader of another version does not find them
MAX_MAPPED = 8192  # entries at once; a process may have 65 530 mappings


class _Entry(NamedTuple):
    mapped: MappedFile
    decoded: Decoded


class RecordCache:
    """A folder with an Arrow file per unit of each file, found by the file's path, size and time, and the recipe.

    An entry is written under another name and then renamed, so workers may share a folder. Its name contains its
    checksum, so a damaged entry counts as absent. An entry that is cut short while it is mapped is an error. When the
    disk is full or the folder read-only, the cache warns once and stores no more entries. It deletes only damaged
    entries: delete the folder when done.
    """

    def __init__(self, folder: str | os.PathLike[str], recipe_key: str) -> None:
        self._folder, self._recipe_key = Path(folder), recipe_key
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache: got '{folder}' ({error}), expected a folder to write to.") from error
        self._keeps_more = True
        self._forget()

    def _forget(self) -> None:
        self._mapped: dict[tuple[File, int], _Entry] = {}
        self._in_use: weakref.WeakValueDictionary[int, MappedFile] = weakref.WeakValueDictionary()  # by address
        self._replaced, self._num_replaced = ctypes.c_int64(), 0
        self._one_thread = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:  # another process maps the entries itself
        kept = ("_folder", "_recipe_key", "_keeps_more")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def load(self, file: File, unit: int) -> Decoded | None:
        """The unit's rows, mapped into memory; None when they are not in the cache.

        Raises:   ValueError naming the cache's file when it was cut short after it was mapped.
        """
        found = self._mapped.get((file, unit))
        if found is not None:
            found.mapped.check()
        elif (found := self._find(file, unit)) is not None and found.mapped.is_mapped:
            if len(self._mapped) >= MAX_MAPPED:
                self._mapped = {}
            self._mapped[file, unit] = found
        return None if found is None else found.decoded

    def check_pages(self) -> None:
        """Raises ValueError when pages that this or another thread has read were missing.

        Cost:     one comparison, so it can run for every batch. A cut within a page, which the system reads as zeros,
                  is found by `check_files`.
        """
        if (seen := self._replaced.value) != self._num_replaced:
            for mapped in [reference() for reference in self._in_use.valuerefs()]:
                if mapped is not None:
                    mapped.check()
            self._num_replaced = seen  # not when one raised: every batch raises from then on

    def check_files(self, held: Sequence[pa.RecordBatch]) -> None:
        """Raises ValueError when a file of these batches is not whole. Called when their last rows were read.

        Cost:     a stat of each file.
        """
        for batch in held:
            mapped = self._in_use.get(_address_of(batch))
            if mapped is not None:
                mapped.check()

    def store(self, file: File, unit: int, decoded: Decoded) -> None:
        """Stores a unit's rows; when it cannot, warns once."""
        if not self._keeps_more:
            return
        folder = self._place(file)
        scratch = folder / f"{unit}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(scratch), "wb") as stream, pa.ipc.new_file(stream, decoded.batch.schema) as writer:
                writer.write_batch(decoded.batch)
            os.replace(scratch, folder / f"{unit}-{decoded.num_bad}-{_checksum(scratch)}.arrow")
        except OSError as error:
            self._stop_keeping(error)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()

    def _stop_keeping(self, error: OSError) -> None:
        with self._one_thread:
            is_first, self._keeps_more = self._keeps_more, False
        if is_first:
            warnings.warn(
                f"cache: got '{self._folder}' ({error}), expected a folder to write to. Rows that are not in it yet "
                "are decoded in every epoch. Free disk space, or give another folder.",
                stacklevel=2,
            )

    def _find(self, file: File, unit: int) -> _Entry | None:
        for path in self._place(file).glob(f"{unit}-*-*.arrow"):
            _, num_bad, expected = path.stem.split("-")
            with contextlib.suppress(FileNotFoundError):  # another worker found it damaged
                entry = _entry(path, int(num_bad), expected) if path.stat().st_size else None
                if entry is not None:
                    self._replaced = replaced()
                    self._in_use[_address_of(entry.decoded.batch)] = entry.mapped
                    return entry
                with contextlib.suppress(OSError):  # a read-only folder
                    path.unlink()
        return None

    def _place(self, file: File) -> Path:
        where = os.path.abspath(file.path) if file.is_local else file.path
        identity = repr((VERSION, file.filesystem.type_name, where, file.size, file.mtime_ns, self._recipe_key))
        return self._folder / xxhash.xxh3_128_hexdigest(identity.encode())


def cache_for(folder: str | os.PathLike[str], recipe: Recipe, files: Sequence[File]) -> RecordCache | None:
    """A reader's cache. None, with one warning, where two different recipes or files could not be told apart."""
    try:
        key = recipe.key
        untold = next((f"file '{file.path}' without a time of change" for file in files if file.mtime_ns is None), None)
    except NoIdentityError as error:
        untold = str(error)
    if untold is None:
        return RecordCache(folder, key)
    warnings.warn(
        f"cache: got {untold}, expected plain values, `OneOf`, `Between` and recfx's own functions, and files "
        "that have a time of change. Changes could not be noticed, so nothing is cached and every epoch decodes all "
        "rows. Check values in `transform`, which runs after the cache, or leave out `cache`.",
        stacklevel=3,
    )
    return None


def _entry(path: Path, num_bad: int, expected: str) -> _Entry | None:
    """The rows of a file, mapped; None when its checksum differs."""
    mapped = MappedFile(path)
    content = mapped.buffer()
    if xxhash.xxh3_64_hexdigest(content) != expected:
        return None
    try:
        batch = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
    except pa.ArrowInvalid:
        mapped.check()
        raise
    mapped.check()
    return _Entry(mapped, Decoded(batch, num_bad))


def _address_of(batch: pa.RecordBatch) -> int:
    """The address of the records of a batch, or of a slice of it."""
    return batch.column(0).buffers()[2].address


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = xxhash.xxh3_64()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
