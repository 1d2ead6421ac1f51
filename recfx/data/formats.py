"""Opens files of every format as units: ORC stripes, Parquet row groups, Arrow record batches, blocks of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.checks import check_choice
from recfx.data.arrays_file import ArraysFile
from recfx.data.columns import Column
from recfx.data.files import File, subject
from recfx.data.open_file import OpenFile
from recfx.data.schema import column_at, path_to
from recfx.data.text.csv import Csv, OpenCsv
from recfx.data.text.json_lines import JsonLines, OpenJsonLines
from recfx.data.text.libsvm import Libsvm, OpenLibsvm
from recfx.data.unit_rows import UnitRows

__all__ = ["Format", "check_format", "open_file", "reading"]

Name = Literal["orc", "parquet", "arrow", "csv", "jsonl", "libsvm"]
Format = Name | Csv | JsonLines | Libsvm
TEXTS: dict[Format, Csv | JsonLines | Libsvm] = {"csv": Csv(), "jsonl": JsonLines(), "libsvm": Libsvm()}
EXTENSIONS: dict[str, Format] = {
    "orc": "orc", "parquet": "parquet", "pq": "parquet", "arrow": "arrow", "ipc": "arrow", "feather": "arrow",
    "csv": Csv(), "tsv": Csv(delimiter="\t"), "jsonl": JsonLines(), "ndjson": JsonLines(), "json": JsonLines(),
    "libsvm": Libsvm(), "svm": Libsvm(),
}  # fmt: skip
MAGIC: dict[bytes, Format] = {b"ORC": "orc", b"PAR1": "parquet", b"ARROW1": "arrow"}


class OpenOrc(OpenFile):
    """An ORC file."""

    unit_name = "stripe"

    def __init__(self, file: File) -> None:
        self._file = file
        opened = self._open()
        self.schema, self.num_units = opened.schema, opened.nstripes

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
        return _rows(self._open().read_stripe(unit, columns=list(names)), names)

    def num_rows(self, unit: int) -> int:
        return len(self._open().read_stripe(unit, columns=[self.schema.names[0]]))

    def _open(self) -> orc.ORCFile:
        return orc.ORCFile(self._file.filesystem.open_input_file(self._file.path))


class OpenParquet(OpenFile):
    """A Parquet file. Pages that have checksums are checked."""

    unit_name = "row group"

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

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
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


class OpenArrow(OpenFile):
    """An Arrow IPC file. It is not decoded, so its offsets are checked. It is read, not mapped into memory: that is as
    fast, and a file that is cut short during the read raises an error instead of SIGBUS."""

    unit_name = "record batch"

    def __init__(self, file: File) -> None:
        self._file = file
        opened = self._open()
        self.schema, self.num_units = opened.schema, opened.num_record_batches

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
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
    """Raises ValueError when it is neither a format nor the name of a format."""
    if not isinstance(format, Csv | JsonLines | Libsvm):
        check_choice("format", format, (None, *get_args(Name)), others=", Csv(...), JsonLines(...) or Libsvm(...)")


def open_file(
    file: File,
    types: Mapping[str, pa.DataType],
    format: Format | None = None,
    columns: Sequence[Column] | None = None,
) -> OpenFile:
    """Opens a file of the given format; None: the format of its extension or its first bytes.

    Args:     types: of the columns the caller reads, for formats without types.
              columns: the ones that the caller reads, for formats whose rows have different columns; None: all.
    Raises:   ValueError naming the file when it cannot be opened.
    """
    if isinstance(file, ArraysFile):
        return file.source
    check_format(format)
    if file.size == 0:
        raise ValueError(f"file '{file.path}': got 0 bytes, expected at least a header. Writing it was interrupted.")
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
) -> tuple[str, Callable[[File], OpenFile]]:
    """The name of a format for errors, and the function that opens a file of it."""
    how = TEXTS.get(format, format)
    if isinstance(how, Csv):
        return "CSV", lambda file: OpenCsv(file, how, types)
    if isinstance(how, JsonLines):
        return "JSON lines", lambda file: OpenJsonLines(file, how, types, columns)
    if isinstance(how, Libsvm):
        return "libsvm", lambda file: OpenLibsvm(file, how, types, columns)
    sources: dict[str, tuple[str, Callable[[File], OpenFile]]]
    sources = {"orc": ("ORC", OpenOrc), "parquet": ("Parquet", OpenParquet), "arrow": ("Arrow", OpenArrow)}
    return sources[how]


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError where the name of a column or field is not UTF-8: errors and batches contain it."""
    for field in fields:
        kind = field.type
        if field.name is not None and kind.num_fields:
            _check_names(kind.field(i) for i in range(kind.num_fields))


@contextmanager
def reading(file: File, where: str, expected: str) -> Iterator[None]:
    """Turns any exception inside into a ValueError that names the file: a damaged file can raise anything."""
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


def _rows(batch: pa.RecordBatch, names: Sequence[str]) -> UnitRows:
    """All rows of these columns."""
    batch = pa.RecordBatch.from_arrays([column_at(batch, name) for name in names], list(names))
    return UnitRows(batch, np.arange(batch.num_rows))
