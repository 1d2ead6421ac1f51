"""CSV files in blocks of whole lines, so that a large one is read in parallel and resumed in its middle."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from recfx.checks import check_int, check_type
from recfx.data.csv_cells import Cells, guess, is_fast, may_be_rounded, read_cells
from recfx.data.csv_lines import cells_of, with_short_delimiter, without_unclosed
from recfx.data.files import CHUNK_BYTES, File
from recfx.data.lines import Lines, first_lines
from recfx.data.rows import BadRow, Rows

__all__ = ["Csv", "CsvSource", "check_named_columns"]

Separator = str | Mapping[str, str] | tuple[tuple[str, str], ...] | None
GUESSED = "as it was guessed from the first rows. Give the type: types= of convert, --types, or a reader's column"


@dataclass(frozen=True, kw_only=True)
class Csv:
    """How a CSV file is written. An empty cell is a missing value; a line ends where a row ends.

    Args:     delimiter: between cells: one character or several, such as "::".
              column_names: None: they are in the first line.
              quote: a character around cells that hold delimiters; None: there is none, and quotes are text.
              list_separator: characters between the items of a list in one cell; None: every cell is one value. A
                  string splits every text column, and every column whose type the caller gives; a dict splits the
                  columns that it names. It may be the delimiter, where cells are quoted.
              weight_separator: between an item of a list and its weight: "id:0.5" is read by `varlen(weighted=True)`
                  and `hashed(weighted=True)`. The last one of an item counts; an item without one has weight 1. A
                  string or a dict, as above; `convert` takes a string for columns in which every item has a weight.
              nulls: more spellings of a missing value, such as ("\\N", "NULL"), in every column and for the items of
                  lists. A quoted cell is not missing.
              skip_lines: lines before the names, or before the first row.
              block_bytes: decoded at once. A compressed file (.gz, .zst, ...) is one block.
    Raises:   TypeError or ValueError on anything else.
    """

    delimiter: str = ","
    column_names: tuple[str, ...] | None = None
    quote: str | None = '"'
    list_separator: Separator = None
    weight_separator: Separator = None
    nulls: tuple[str, ...] = ()
    skip_lines: int = 0
    block_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        check_int("block_bytes", self.block_bytes, 1)
        check_int("skip_lines", self.skip_lines, 0)
        check_type("quote", self.quote, str | None)
        check_type("delimiter", self.delimiter, str)
        if self.quote is not None and (len(self.quote) != 1 or not "\0" < self.quote < "\x80" or self.quote in "\r\n"):
            raise ValueError(f"quote: got {self.quote!r}, expected one ASCII character, or None.")
        if not self.delimiter or any(c in self.delimiter for c in f"\r\n{self.quote or ''}"):
            raise ValueError(f"delimiter: got {self.delimiter!r}, expected characters, and no quote or line end.")
        for name in ("column_names", "nulls"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        for name in ("list_separator", "weight_separator"):
            object.__setattr__(self, name, self._separator(name, getattr(self, name)))
        for column in (None, *self.named_columns):
            separator, weights = (
                self.separator_of(column, "list_separator"),
                self.separator_of(column, "weight_separator"),
            )
            if separator is not None and separator == weights:
                raise ValueError(f"weight_separator: got {weights!r}, expected another one than the list_separator.")

    @property
    def named_columns(self) -> dict[str, str]:
        """Columns that a separator is given for, and the argument that names them."""
        arguments = ("weight_separator", "list_separator")
        return {column: name for name in arguments for column, _ in _pairs(getattr(self, name))}

    def separator_of(self, column: str | None, argument: str) -> str | None:
        """The separator of a column; None: that of columns without a name in a dict."""
        separator = getattr(self, argument)
        return dict(separator).get(column) if isinstance(separator, tuple) else separator

    def _separator(self, argument: str, value: Separator) -> Separator:
        """A dict as sorted pairs: they are hashed, and equal where the dicts are."""
        if value is None or isinstance(value, str):
            values = [] if value is None else [value]
        else:
            check_type(argument, value, Mapping | tuple, "Give a string, or a dict of strings by column.")
            value = tuple(sorted(value.items() if isinstance(value, Mapping) else value))
            values = [separator for _, separator in value]
        for separator in values:
            check_type(argument, separator, str)
            if separator == "" or (separator == self.delimiter and self.quote is None):
                raise ValueError(
                    f"{argument}: got {separator!r}, expected characters, and without quotes no delimiter."
                )
        return value


def check_named_columns(files: Sequence[File], format: object) -> None:
    """Raises ValueError when CSV options name a column that none of the files has. Opens files until all are found."""
    missing = dict(format.named_columns) if isinstance(format, Csv) else {}
    names: list[str] = []
    for file in files if missing else ():
        assert isinstance(format, Csv)
        try:
            head = first_lines(file, format.skip_lines + 1)
            names, _ = _header(partial(_line_of, head), format)
        except Exception:  # whoever reads the file will say what is wrong with it
            return
        missing = {column: argument for column, argument in missing.items() if column not in names}
        if not missing:
            return
    for column, argument in missing.items():
        others = f" or the {len(files) - 1} other files" if len(files) > 1 else ""
        raise ValueError(
            f"{argument}: got column '{column}', which is not in '{files[-1].path}'{others}, expected some of {names}."
        )


class CsvSource:
    """An open CSV file.

    Args:     types: of the columns that the caller knows; other ones are what the first rows look like. Binary takes
                  cells as they are, int64 whole numbers up to 2**64 - 1 with the same 64 bits, float64 numbers, whole
                  ones where it holds them exactly, struct{k, v} items with their weights.
    """

    unit_name, null_is_missing = "block", True

    def __init__(self, file: File, options: Csv, types: Mapping[str, pa.DataType]) -> None:
        self._options, self._lines = options, Lines(file, options.block_bytes)
        self._names, self._lines.start = _header(self._lines.line_at, options)
        self._nulls = pa.array([null.encode() for null in options.nulls], pa.binary())
        self._slow: frozenset[str] = frozenset()  # columns that pyarrow's parser did not take before
        self.num_units = self._lines.num_blocks
        known = {name: self._known(name, kind) for name, kind in types.items() if name in self._names}
        self._cells = {**self._guess([name for name in self._names if name not in known]), **known}
        self.schema = pa.schema([(name, self._cells[name].type) for name in self._names])

    def matching(self, expression: pc.Expression | None) -> range:
        return range(self.num_units)

    def read(self, unit: int, names: Sequence[str]) -> Rows:
        for name in names:
            if (count := self._names.count(name)) > 1:
                raise ValueError(f"{count} columns of the name '{name}'")
        kinds = {name: self._cells[name].fast for name in names if name not in self._slow}
        fast = {name: kind for name, kind in kinds.items() if kind is not None}
        rows = self._read_fast(unit, names, fast)
        if rows is None:
            rows = self._parse(unit, dict.fromkeys(names, pa.binary()))
            self._slow = self._slow | {n for n, kind in fast.items() if not is_fast(rows.batch.column(n), kind)}
            fast = {}
        return self._convert(rows, set(names) - set(fast)) if len(fast) < len(names) else rows

    def _read_fast(self, unit: int, names: Sequence[str], fast: Mapping[str, pa.DataType]) -> Rows | None:
        """Some columns as pyarrow's parser reads them, the others as bytes; None where it cannot, or not exactly."""
        try:
            rows = self._parse(unit, {name: fast.get(name, pa.binary()) for name in names})
        except pa.ArrowInvalid:
            return None
        doubles = [name for name, kind in fast.items() if kind == pa.float64()]
        return None if any(may_be_rounded(rows.batch.column(name)) for name in doubles) else rows

    def num_rows(self, unit: int) -> int:
        rows = self._parse(unit, {self._names[0]: pa.binary()})
        return rows.batch.num_rows + len(rows.bad)

    def _known(self, name: str, kind: pa.DataType) -> Cells:
        separator = self._options.separator_of(name, "list_separator")
        weights = self._options.separator_of(name, "weight_separator")
        if not pa.types.is_struct(kind):
            is_named = name in dict(_pairs(self._options.weight_separator))
            return Cells(kind, None, separator, weights if is_named else None)
        if weights is None:
            raise ValueError(f"column '{name}' without a separator of weights. Give Csv(weight_separator=...)")
        return Cells(kind.field(0).type, None, separator, weights)

    def _guess(self, names: list[str]) -> dict[str, Cells]:
        text = self._lines.block(0, CHUNK_BYTES) if names and self.num_units else b""
        rows = self._rows(text, dict.fromkeys(names, pa.binary()))
        how = {}
        for name in dict.fromkeys(names):
            arguments = ("list_separator", "weight_separator")
            separator, weights = (self._options.separator_of(name, argument) for argument in arguments)
            is_list, is_weighted = (name in dict(_pairs(getattr(self._options, argument))) for argument in arguments)
            how[name] = guess(
                rows.batch.column(name), self._nulls,
                separator=separator, weight_separator=weights, is_named=(is_list, is_weighted),
            )  # fmt: skip
        return how

    def _parse(self, unit: int, types: Mapping[str, pa.DataType]) -> Rows:
        return self._rows(self._lines.block(unit), types)

    def _rows(self, text: bytes, types: Mapping[str, pa.DataType]) -> Rows:
        options = self._options
        text, delimiter = with_short_delimiter(text, options.delimiter, options.quote)
        text, unclosed = without_unclosed(text, delimiter, options.delimiter, options.quote)
        if not text.lstrip(b"\r\n"):
            empty = pa.RecordBatch.from_pydict({name: pa.array([], kind) for name, kind in types.items()})
            return Rows(empty, np.empty(0, np.int64), unclosed)
        bad: list[BadRow] = []
        table = pa_csv.read_csv(pa.BufferReader(text), **self._how(len(text), delimiter, types, bad))
        arrays = [column.combine_chunks() for column in table.columns]
        if delimiter != options.delimiter.encode() and options.quote is not None and options.quote.encode() in text:
            arrays = [_with_delimiter(array, delimiter, options.delimiter) for array in arrays]
        batch = pa.RecordBatch.from_arrays(arrays, list(types))
        num_rows = batch.num_rows + len(bad) + len(unclosed)
        numbers = np.delete(np.arange(num_rows), [row.number for row in unclosed])  # of what was parsed
        moved = [row._replace(number=int(numbers[row.number])) for row in bad]
        numbers = np.delete(numbers, [row.number for row in bad])
        return Rows(batch, numbers, sorted([*unclosed, *moved], key=lambda row: row.number))

    def _how(self, num_bytes: int, delimiter: bytes, types: Mapping[str, pa.DataType], bad: list[BadRow]) -> dict:
        def note(row: pa_csv.InvalidRow) -> str:
            got, expected = f"{row.actual_columns} cells", f"{row.expected_columns}, one for each column"
            bad.append(BadRow(row.number - 1, None, got, expected))
            return "skip"

        return {
            "read_options": pa_csv.ReadOptions(
                column_names=self._names, use_threads=False, block_size=max(num_bytes, 1)
            ),
            "parse_options": pa_csv.ParseOptions(
                delimiter=delimiter.decode(), quote_char=self._options.quote or False, invalid_row_handler=note
            ),
            "convert_options": pa_csv.ConvertOptions(
                include_columns=list(types),
                column_types=dict(types),
                null_values=["", *self._options.nulls],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        }

    def _convert(self, rows: Rows, names: set[str]) -> Rows:
        """Cells of these columns to values, without the rows that hold something else."""
        arrays, bad = {}, list(rows.bad)
        keep = np.ones(rows.batch.num_rows, dtype=bool)
        for name, array in zip(rows.batch.schema.names, rows.batch.columns, strict=True):
            cells = self._cells[name]
            arrays[name], wrong = read_cells(array, cells, self._nulls) if name in names else (array, {})
            expected = f"{cells.type}, {GUESSED}" if cells.is_guessed else str(cells.type)
            for row, cell in wrong.items():
                if keep[row]:
                    bad.append(BadRow(int(rows.numbers[row]), name, _shown(cell), expected))
                keep[row] = False
        batch = pa.RecordBatch.from_pydict(arrays)
        return Rows(batch.filter(pa.array(keep)), rows.numbers[keep], sorted(bad, key=lambda row: row.number))


def _header(line_at: Callable[[int], bytes], options: Csv) -> tuple[list[str], int]:
    """The names of the columns, and where the first row begins."""
    start = 0
    for _ in range(options.skip_lines):
        start += len(line_at(start))
    line = line_at(start)
    if options.column_names is None:
        return cells_of(line, options.delimiter, options.quote), start + len(line)
    return list(options.column_names), start + len(codecs.BOM_UTF8) * line.startswith(codecs.BOM_UTF8)


def _line_of(text: bytes, place: int) -> bytes:
    return text[place : text.find(b"\n", place) + 1 or len(text)]


def _with_delimiter(array: pa.Array, short: bytes, long: str) -> pa.Array:
    """Cells that hold the delimiter, as they were in the file."""
    is_text = pa.types.is_binary(array.type) or pa.types.is_string(array.type)
    return pc.replace_substring(array, short, long.encode()) if is_text else array


def _words(argument: str, value: Sequence[str] | None) -> tuple[str, ...] | None:
    """A tuple of strings."""
    if value is None and argument == "column_names":
        return None
    if not isinstance(value, tuple | list) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{argument}: got {value!r}, expected a tuple of strings.")
    return tuple(value)


def _pairs(separator: Separator) -> tuple[tuple[str, str], ...]:
    """Of a dict."""
    return separator if isinstance(separator, tuple) else ()


def _shown(cell: bytes) -> str:
    try:
        return repr(cell.decode())
    except UnicodeDecodeError:
        return repr(cell)
