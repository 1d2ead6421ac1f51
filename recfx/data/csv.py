"""CSV files in blocks of whole lines, so that a large one is read in parallel and resumed in its middle."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from recfx.data.files import CHUNK_BYTES, File
from recfx.data.lines import Lines
from recfx.data.rows import BadRow, Rows

__all__ = ["Csv", "CsvSource"]


@dataclass(frozen=True, kw_only=True)
class Csv:
    """How a CSV file is written. An empty cell is a missing value; a line ends where a row ends.

    Args:     column_names: None: they stand in the first line.
              list_separator: between the items of a list in one cell; None: every cell is one value.
              block_bytes: decoded at once. A compressed file (.gz, .zst, ...) is one block.
    """

    delimiter: str = ","
    column_names: tuple[str, ...] | None = None
    list_separator: str | None = None
    block_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ValueError(f"delimiter: got {self.delimiter!r}, expected one character.")
        if self.list_separator in ("", self.delimiter):
            raise ValueError(f"list_separator: got {self.list_separator!r}, expected characters, and no delimiter.")
        if self.block_bytes < 1:
            raise ValueError(f"block_bytes: got {self.block_bytes}, expected at least 1.")


class CsvSource:
    """An open CSV file.

    Args:     types: of the columns that the caller knows; other ones are what the first block looks like.
    """

    unit_name, null_is_missing = "block", True

    def __init__(self, file: File, options: Csv, types: Mapping[str, pa.DataType]) -> None:
        self._options, self._lines = options, Lines(file, options.block_bytes)
        first_line = self._lines.line_at(0)
        self._lines.start = 0 if options.column_names else len(first_line)
        self._names = list(options.column_names or _cells(first_line, options.delimiter))
        self._types = {name: kind for name, kind in types.items() if name in self._names}
        self.num_units = self._lines.num_blocks
        known = {name: pa.list_(kind) if options.list_separator else kind for name, kind in self._types.items()}
        guessed = self._guess() if self.num_units and len(known) < len(self._names) else {}
        self.schema = pa.schema([(name, known.get(name, guessed.get(name, pa.null()))) for name in self._names])
        self._types |= {name: kind for name, kind in guessed.items() if name not in known}

    def matching(self, expression: pc.Expression | None) -> range:
        return range(self.num_units)

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        lists = {name for name in names if pa.types.is_list(self.schema.field(name).type)}
        types = {name: pa.string() if name in lists else self._types[name] for name in names}
        try:
            rows = self._parse(unit, types)
            slow = lists
        except pa.ArrowInvalid:
            rows, slow = self._parse(unit, dict.fromkeys(names, pa.string())), set(names)
        return self._convert(rows, slow) if slow else rows

    def num_rows(self, unit: int) -> int:
        rows = self._parse(unit, {self._names[0]: pa.string()})
        return rows.batch.num_rows + len(rows.bad)

    def _guess(self) -> dict[str, pa.DataType]:
        text, _ = _without_unclosed(self._lines.block(0, CHUNK_BYTES), self._options.delimiter)
        if not text.strip():
            return dict.fromkeys(self._names, pa.null())
        table = pa_csv.read_csv(pa.BufferReader(text), **self._how(len(text), self._names, {}, []))
        return {field.name: field.type for field in table.schema}

    def _parse(self, unit: int, types: Mapping[str, pa.DataType]) -> Rows:
        text, unclosed = _without_unclosed(self._lines.block(unit), self._options.delimiter)
        if not text.strip():
            empty = pa.RecordBatch.from_pydict({name: pa.array([], kind) for name, kind in types.items()})
            return Rows(empty, np.empty(0, np.int64), unclosed)
        bad: list[BadRow] = []
        table = pa_csv.read_csv(pa.BufferReader(text), **self._how(len(text), list(types), types, bad))
        arrays = [column.combine_chunks() for column in table.columns]
        batch = pa.RecordBatch.from_arrays(arrays, list(types))
        num_rows = batch.num_rows + len(bad) + len(unclosed)
        numbers = np.delete(np.arange(num_rows), [row.number for row in unclosed])  # of what was parsed
        moved = [row._replace(number=int(numbers[row.number])) for row in bad]
        numbers = np.delete(numbers, [row.number for row in bad])
        return Rows(batch, numbers, sorted([*unclosed, *moved], key=lambda row: row.number))

    def _how(self, num_bytes: int, names: list[str], types: Mapping[str, pa.DataType], bad: list[BadRow]) -> dict:
        def note(row: pa_csv.InvalidRow) -> str:
            got, expected = f"{row.actual_columns} cells", f"{row.expected_columns}, one for each column"
            bad.append(BadRow(row.number - 1, None, got, expected))
            return "skip"

        return {
            "read_options": pa_csv.ReadOptions(
                column_names=self._names, use_threads=False, block_size=max(num_bytes, 1)
            ),
            "parse_options": pa_csv.ParseOptions(delimiter=self._options.delimiter, invalid_row_handler=note),
            "convert_options": pa_csv.ConvertOptions(
                include_columns=names,
                column_types=dict(types),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        }

    def _convert(self, rows: Rows, names: set[str]) -> Rows:
        """Text to numbers and lists, without the rows that hold something else."""
        arrays, bad = {}, list(rows.bad)
        keep = np.ones(rows.batch.num_rows, dtype=bool)
        for name, array in zip(rows.batch.schema.names, rows.batch.columns, strict=True):
            arrays[name], wrong = self._column(name, array) if name in names else (array, {})
            for row, cell in wrong.items():
                if keep[row]:
                    bad.append(BadRow(int(rows.numbers[row]), name, repr(cell), str(self.schema.field(name).type)))
                keep[row] = False
        batch = pa.RecordBatch.from_pydict(arrays)
        return Rows(batch.filter(pa.array(keep)), rows.numbers[keep], sorted(bad, key=lambda row: row.number))

    def _column(self, name: str, array: pa.Array) -> tuple[pa.Array, dict[int, str]]:
        """The column in its type, with null for cells that are none, which are returned by row."""
        kind = self.schema.field(name).type
        if not pa.types.is_list(kind):
            return _cast(array, kind)
        lists = pc.split_pattern(array, self._options.list_separator)
        items, wrong = _cast(lists.flatten(), kind.value_type)
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        rows = np.searchsorted(offsets, np.array(list(wrong), dtype=np.int64), side="right") - 1
        return pa.ListArray.from_arrays(pa.array(offsets), items), dict(zip(rows.tolist(), wrong.values(), strict=True))


def _without_unclosed(text: bytes, delimiter: str) -> tuple[bytes, list[BadRow]]:
    """The text without the lines that do not close a quote, and these, by their number among the rows.

    A row is a line, whatever block it stands in: no quote may reach into the next one.
    """
    if b'"' not in text:
        return text, []
    codes = np.frombuffer(b"\n" + text + b"\n", np.uint8)
    ends = np.flatnonzero(codes[1:] == ord("\n"))
    begins = np.append(0, ends[:-1] + 1)
    lines = [i for i in _to_look_at(codes, ends, delimiter) if not _is_closed(text[begins[i] : ends[i]], delimiter)]
    if not lines:
        return text, []
    numbers = np.cumsum(ends - begins > (codes[ends] == ord("\r"))) - 1  # pyarrow passes over empty lines
    keep, bad = np.ones(len(text), dtype=bool), []
    for i in lines:
        keep[begins[i] : ends[i] + 1] = False
        cells = text[begins[i] : ends[i]].decode(errors="replace")
        bad.append(
            BadRow(int(numbers[i]), None, f"a quote that is not closed, {cells[:50]!r}", "a whole row in a line")
        )
    return codes[1:-1][keep].tobytes(), bad


def _to_look_at(codes: np.ndarray, ends: np.ndarray, delimiter: str) -> np.ndarray:
    """The lines where quotes do more than stand around cells or side by side: few, and the others are closed."""
    quotes = np.flatnonzero(codes == ord('"'))
    firsts = np.searchsorted(quotes, ends + 1)  # behind each line
    counts = np.diff(firsts, prepend=0)
    opens = (np.arange(len(quotes)) - np.repeat(firsts - counts, counts)) % 2 == 0
    is_edge = np.zeros(256, dtype=bool)
    is_edge[[ord(delimiter), *b'\n\r"']] = True
    strange = quotes[~is_edge[codes[np.where(opens, quotes - 1, quotes + 1)]]]
    return np.union1d(np.searchsorted(ends, strange - 1), np.flatnonzero(counts % 2))


def _is_closed(line: bytes, delimiter: str) -> bool:
    """Whether no quoted cell goes on behind the line, as pyarrow reads it: within an unquoted cell a quote is text."""
    d = re.escape(delimiter.encode())
    cell = rb'(?>"[^"]*+(?:""[^"]*+)*+"[^D]*+|[^"D][^D]*+|)'.replace(b"D", d)
    return re.fullmatch(cell + b"(?:" + d + cell + b")*+", line) is not None


def _cast(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """The strings as numbers; those that are none become null and are returned by their index."""
    array = array if kind == pa.string() else pc.utf8_trim_whitespace(array)
    try:
        return array.cast(kind), {}
    except pa.ArrowInvalid:
        wrong = {i: cell for i, cell in enumerate(array.to_pylist()) if cell is not None and not _parses(cell, kind)}
        mask = np.zeros(len(array), dtype=bool)
        mask[list(wrong)] = True
        return pc.if_else(pa.array(mask), pa.scalar(None, pa.string()), array).cast(kind), wrong


def _parses(cell: str, kind: pa.DataType) -> bool:
    try:
        pa.scalar(cell).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _cells(line: bytes, delimiter: str) -> list[str]:
    return next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")], delimiter=delimiter), [])
