"""Files as units that are decoded one by one: ORC stripes, Parquet row groups, Arrow record batches, blocks of CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs, orc
from pyarrow import parquet as pq

from recfx.data.csv import Csv, CsvSource
from recfx.data.files import File
from recfx.data.rows import Rows

__all__ = ["Format", "Source", "open_source", "reading"]

Format = Literal["orc", "parquet", "arrow"] | Csv
EXTENSIONS: dict[str, Format] = {
    "orc": "orc", "parquet": "parquet", "pq": "parquet", "arrow": "arrow", "ipc": "arrow", "feather": "arrow",
    "csv": Csv(), "tsv": Csv(delimiter="\t"),
}  # fmt: skip
MAGIC: dict[bytes, Format] = {b"ORC": "orc", b"PAR1": "parquet", b"ARROW1": "arrow"}


class Source(Protocol):
    """An open file."""

    schema: pa.Schema
    num_units: int
    unit_name: str
    null_is_missing: bool  # the format has no other way to say so

    def matching(self, expression: pc.Expression | None) -> Iterable[int]:
        """The units that may hold a row for which the expression is true."""
        ...

    def read(self, unit: int, names: Sequence[str]) -> Rows: ...

    def num_rows(self, unit: int) -> int: ...


class OrcSource:
    """An open ORC file."""

    unit_name, null_is_missing = "stripe", False

    def __init__(self, file: File) -> None:
        self._orc = orc.ORCFile(file.filesystem.open_input_file(file.path))
        self.schema, self.num_units = self._orc.schema, self._orc.nstripes

    def matching(self, expression: pc.Expression | None) -> range:
        return range(self.num_units)

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        return _all_rows(self._orc.read_stripe(unit, columns=list(names)))

    def num_rows(self, unit: int) -> int:
        return len(self._orc.read_stripe(unit, columns=[self.schema.names[0]]))


class ParquetSource:
    """An open Parquet file. Pages that carry checksums are checked."""

    unit_name, null_is_missing = "row group", False

    def __init__(self, file: File) -> None:
        self._file = file
        stream = file.filesystem.open_input_file(file.path)
        self._parquet = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=True)
        self.schema, self.num_units = self._parquet.schema_arrow, self._parquet.num_row_groups

    def matching(self, expression: pc.Expression | None) -> list[int]:
        if expression is None:
            return list(range(self.num_units))
        fragment = ds.ParquetFileFormat().make_fragment(self._file.path, self._file.filesystem)
        return [group.id for group in fragment.subset(expression, schema=self.schema).row_groups]

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        table = self._parquet.read_row_group(unit, columns=list(names), use_threads=False)
        if len(table) != self.num_rows(unit):
            raise pa.ArrowInvalid(f"{len(table)} rows instead of {self.num_rows(unit)}")
        arrays = [table.column(name).combine_chunks() for name in names]
        return _all_rows(pa.RecordBatch.from_arrays(arrays, list(names)))

    def num_rows(self, unit: int) -> int:
        return self._parquet.metadata.row_group(unit).num_rows


class ArrowSource:
    """An open Arrow IPC file; a local one is mapped into memory. Nothing decodes it, so its offsets are checked."""

    unit_name, null_is_missing = "record batch", False

    def __init__(self, file: File) -> None:
        is_local = isinstance(file.filesystem, fs.LocalFileSystem)
        self._stream = pa.memory_map(file.path) if is_local else file.filesystem.open_input_file(file.path)
        reader = pa.ipc.open_file(self._stream)
        self.schema, self.num_units = reader.schema, reader.num_record_batches

    def matching(self, expression: pc.Expression | None) -> range:
        return range(self.num_units)

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        fields = [self.schema.get_field_index(name) for name in names]
        reader = pa.ipc.open_file(self._stream, options=pa.ipc.IpcReadOptions(included_fields=fields))
        batch = reader.get_batch(unit).select(list(names))
        batch.validate(full=True)
        return _all_rows(batch)

    def num_rows(self, unit: int) -> int:
        return self.read(unit, self.schema.names[:1]).batch.num_rows


def open_source(file: File, types: Mapping[str, pa.DataType], format: Format | None = None) -> Source:
    """Opens a file of the given format; None: what its extension or its first bytes say.

    Args:     types: of the columns the caller wants, for formats that have no types.
    Raises:   ValueError naming the file when it cannot be opened.
    """
    if file.size == 0:
        raise ValueError(f"file '{file.path}': got 0 bytes, expected at least a header. It was cut short in writing.")
    if format is None:
        with reading(file, "", "a readable file"):
            format = _guess_format(file)
        if format is None:
            raise ValueError(
                f"file '{file.path}': got an unknown format, expected ORC, Parquet, Arrow or CSV. Name it: format="
            )
    if isinstance(format, Csv):
        with reading(file, "", "a readable CSV file"):
            return CsvSource(file, format, types)
    sources: dict[str, tuple[str, Callable[[File], Source]]]
    sources = {"orc": ("ORC", OrcSource), "parquet": ("Parquet", ParquetSource), "arrow": ("Arrow", ArrowSource)}
    name, source = sources[format]
    with reading(file, "", f"a readable {name} file"):
        return source(file)


@contextmanager
def reading(file: File, where: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong inside is an error that names the file: damage shows itself in any exception."""
    try:
        yield
    except Exception as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"file '{file.path}': got {words!r}{where}, expected {expected}.") from error


def _guess_format(file: File) -> Format | None:
    extensions = file.name.lower().split(".")[1:]
    for extension in reversed(extensions[-2:]):
        if extension in EXTENSIONS:
            return EXTENSIONS[extension]
    with file.filesystem.open_input_file(file.path) as stream:
        head = stream.read(8)
    return next((format for magic, format in MAGIC.items() if head.startswith(magic)), None)


def _all_rows(batch: pa.RecordBatch) -> Rows:
    return Rows(batch, np.arange(batch.num_rows))
