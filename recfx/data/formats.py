"""Files as units that are decoded one by one: ORC stripes, Parquet row groups, Arrow record batches, blocks of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.checks import check_choice
from recfx.data.columns import Column
from recfx.data.files import File, subject
from recfx.data.memory import Arrays
from recfx.data.rows import Rows
from recfx.data.schema import column_at, path_to
from recfx.data.text.csv import Csv, CsvSource
from recfx.data.text.json_lines import JsonLines, JsonLinesSource
from recfx.data.text.libsvm import Libsvm, LibsvmSource

__all__ = ["Format", "Source", "check_format", "open_source", "reading"]

Name = Literal["orc", "parquet", "arrow", "csv", "jsonl", "libsvm"]
Format = Name | Csv | JsonLines | Libsvm
TEXTS: dict[Format, Csv | JsonLines | Libsvm] = {"csv": Csv(), "jsonl": JsonLines(), "libsvm": Libsvm()}
EXTENSIONS: dict[str, Format] = {
    "orc": "orc", "parquet": "parquet", "pq": "parquet", "arrow": "arrow", "ipc": "arrow", "feather": "arrow",
    "csv": Csv(), "tsv": Csv(delimiter="\t"), "jsonl": JsonLines(), "ndjson": JsonLines(), "json": JsonLines(),
    "libsvm": Libsvm(), "svm": Libsvm(),
}  # fmt: skip
MAGIC: dict[bytes, Format] = {b"ORC": "orc", b"PAR1": "parquet", b"ARROW1": "arrow"}


class Source(Protocol):
    """A file as it was when it was opened. Every read opens it again: no handle stays, and threads share nothing."""

    schema: pa.Schema
    num_units: int
    unit_name: str
    null_is_missing: bool  # the format has no other way to say so

    def matching(self, expression: pc.Expression | None) -> Iterable[int]:
        """The units that may hold a row for which the expression is true."""
        ...

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        """Columns by name, and fields of structs by dotted name."""
        ...

    def num_rows(self, unit: int) -> int: ...


class OrcSource:
    """An ORC file."""

    unit_name, null_is_missing = "stripe", False

    def __init__(self, file: File) -> None:
        self._file = file
        opened = self._open()
        self.schema, self.num_units = opened.schema, opened.nstripes

    def matching(self, expression: pc.Expression | None) -> range:
        return range(self.num_units)

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        return _rows(self._open().read_stripe(unit, columns=list(names)), names)

    def num_rows(self, unit: int) -> int:
        return len(self._open().read_stripe(unit, columns=[self.schema.names[0]]))

    def _open(self) -> orc.ORCFile:
        return orc.ORCFile(self._file.filesystem.open_input_file(self._file.path))


class ParquetSource:
    """A Parquet file. Pages that carry checksums are checked."""

    unit_name, null_is_missing = "row group", False

    def __init__(self, file: File) -> None:
        self._file = file
        self._footer: pq.FileMetaData | None = None
        opened = self._open()
        self._footer, self.schema, self.num_units = opened.metadata, opened.schema_arrow, opened.num_row_groups

    def matching(self, expression: pc.Expression | None) -> list[int]:
        if expression is None:
            return list(range(self.num_units))
        fragment = ds.ParquetFileFormat().make_fragment(self._file.path, self._file.filesystem)
        return [group.id for group in fragment.subset(expression, schema=self.schema).row_groups]

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        table = self._open().read_row_group(unit, columns=list(names), use_threads=False)
        if len(table) != self.num_rows(unit):
            raise pa.ArrowInvalid(f"{len(table)} rows instead of {self.num_rows(unit)}")
        arrays = [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns]
        return _rows(pa.RecordBatch.from_arrays(arrays, table.column_names), names)

    def num_rows(self, unit: int) -> int:
        assert self._footer is not None
        return self._footer.row_group(unit).num_rows

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._file.filesystem.open_input_file(self._file.path),
            metadata=self._footer,  # 30 ms to read where there are 1000 row groups
            page_checksum_verification=True,
            pre_buffer=not self._file.is_local,
        )


class ArrowSource:
    """An Arrow IPC file. Nothing decodes it, so its offsets are checked. It is read, not mapped into memory, which is
    as fast: one that is cut short meanwhile is an error, not SIGBUS."""

    unit_name, null_is_missing = "record batch", False

    def __init__(self, file: File) -> None:
        self._file = file
        opened = self._open()
        self.schema, self.num_units = opened.schema, opened.num_record_batches

    def matching(self, expression: pc.Expression | None) -> range:
        return range(self.num_units)

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        fields = {self.schema.get_field_index(path_to(self.schema, name)[0]) for name in names}
        batch = self._open(included_fields=sorted(fields)).get_batch(unit)
        batch.validate(full=True)
        return _rows(batch, names)

    def num_rows(self, unit: int) -> int:
        return self.read(unit, self.schema.names[:1]).batch.num_rows

    def _open(self, **options: Any) -> pa.ipc.RecordBatchFileReader:
        stream = self._file.filesystem.open_input_file(self._file.path)
        return pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(**options))


def check_format(format: Format | None) -> None:
    """Raises ValueError when it is neither a format nor the name of one."""
    if not isinstance(format, Csv | JsonLines | Libsvm):
        check_choice("format", format, (None, *get_args(Name)), others=", Csv(...), JsonLines(...) or Libsvm(...)")


def open_source(
    file: File,
    types: Mapping[str, pa.DataType],
    format: Format | None = None,
    columns: Sequence[Column] | None = None,
) -> Source:
    """Opens a file of the given format; None: what its extension or its first bytes say.

    Args:     types: of the columns the caller wants, for formats that have no types.
              columns: the ones that the caller reads, for formats where rows differ in what they have; None: all.
    Raises:   ValueError naming the file when it cannot be opened.
    """
    if isinstance(file, Arrays):
        return file.source
    check_format(format)
    if file.size == 0:
        raise ValueError(f"file '{file.path}': got 0 bytes, expected at least a header. It was cut short in writing.")
    if format is None:
        with reading(file, "", "a readable file"):
            format = _guess_format(file)
        if format is None:
            raise ValueError(
                f"file '{file.path}': got an unknown format, expected ORC, Parquet, Arrow, CSV, JSON lines or libsvm "
                "text. Name it: format="
            )
    name, source = _opener(format, types, columns)
    with reading(file, "", f"a readable {name} file"):
        opened = source(file)
        _check_names(opened.schema)
        return opened


def _opener(
    format: Format, types: Mapping[str, pa.DataType], columns: Sequence[Column] | None
) -> tuple[str, Callable[[File], Source]]:
    """The name of a format in an error, and what opens a file of it."""
    how = TEXTS.get(format, format)
    if isinstance(how, Csv):
        return "CSV", lambda file: CsvSource(file, how, types)
    if isinstance(how, JsonLines):
        return "JSON lines", lambda file: JsonLinesSource(file, how, types, columns)
    if isinstance(how, Libsvm):
        return "libsvm", lambda file: LibsvmSource(file, how, types, columns)
    sources: dict[str, tuple[str, Callable[[File], Source]]]
    sources = {"orc": ("ORC", OrcSource), "parquet": ("Parquet", ParquetSource), "arrow": ("Arrow", ArrowSource)}
    return sources[how]


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError where the name of a column or a field is not UTF-8: it is in errors and batches."""
    for field in fields:
        kind = field.type
        if field.name is not None and kind.num_fields:
            _check_names(kind.field(i) for i in range(kind.num_fields))


@contextmanager
def reading(file: File, where: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong inside is an error that names the file: damage shows itself in any exception."""
    try:
        yield
    except Exception as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{subject(file.path)}: got {words!r}{where}, expected {expected}.") from error


def _guess_format(file: File) -> Format | None:
    extensions = file.name.lower().split(".")[1:]
    for extension in reversed(extensions[-2:]):
        if extension in EXTENSIONS:
            return EXTENSIONS[extension]
    with file.filesystem.open_input_file(file.path) as stream:
        head = stream.read(8)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b'{"'):
        return JsonLines()
    return next((format for magic, format in MAGIC.items() if head.startswith(magic)), None)


def _rows(batch: pa.RecordBatch, names: Sequence[str]) -> Rows:
    """All rows, of these columns."""
    batch = pa.RecordBatch.from_arrays([column_at(batch, name) for name in names], list(names))
    return Rows(batch, np.arange(batch.num_rows))
