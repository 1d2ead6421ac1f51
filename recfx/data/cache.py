"""Records kept on disk and mapped into memory, so that a later epoch decodes nothing."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from recfx.data.files import File
from recfx.data.rows import Decoded

__all__ = ["RecordCache"]

VERSION = 2  # of what is kept: another one finds nothing of this one's
MAX_MAPPED = 8192  # entries at once; a process may have 65 530 mappings


class RecordCache:
    """A folder with an Arrow file for each unit of each file, found by the file's path, size and time and the recipe.

    An entry is written beside its place and renamed, so workers may share a folder, and carries its checksum in its
    name, so a damaged one counts as absent. Nothing is ever deleted but damaged entries: delete the folder when done.
    """

    def __init__(self, folder: str | os.PathLike[str], recipe_key: str) -> None:
        self._folder, self._recipe_key = Path(folder), recipe_key
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache: got '{folder}' ({error}), expected a folder to write to.") from error
        self._mapped: dict[tuple[File, int], Decoded] = {}

    def __getstate__(self) -> dict[str, Any]:  # another process maps for itself
        return {**self.__dict__, "_mapped": {}}

    def load(self, file: File, unit: int) -> Decoded | None:
        """The unit's rows, mapped into memory; None when they are not kept."""
        found = self._mapped.get((file, unit))
        if found is None and (found := self._find(file, unit)) is not None:
            if len(self._mapped) >= MAX_MAPPED:
                self._mapped = {}
            self._mapped[file, unit] = found
        return found

    def store(self, file: File, unit: int, decoded: Decoded) -> None:
        """Keeps a unit's rows."""
        folder = self._place(file)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{unit}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with pa.OSFile(str(scratch), "wb") as stream, pa.ipc.new_file(stream, decoded.batch.schema) as writer:
                writer.write_batch(decoded.batch)
            os.replace(scratch, folder / f"{unit}-{decoded.num_bad}-{_checksum(scratch)}.arrow")
        finally:
            scratch.unlink(missing_ok=True)

    def _find(self, file: File, unit: int) -> Decoded | None:
        for path in self._place(file).glob(f"{unit}-*.arrow"):
            _, num_bad, expected = path.stem.split("-")
            with contextlib.suppress(FileNotFoundError):  # another worker found it damaged
                if path.stat().st_size and _checksum(path) == expected:
                    return Decoded(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0), int(num_bad))
                path.unlink()
        return None

    def _place(self, file: File) -> Path:
        identity = repr((VERSION, file.path, file.size, file.mtime_ns, self._recipe_key))
        return self._folder / xxhash.xxh3_128_hexdigest(identity.encode())


def _checksum(path: Path) -> str:
    with pa.memory_map(str(path)) as mapped:
        return xxhash.xxh3_64_hexdigest(mapped.read_buffer())
