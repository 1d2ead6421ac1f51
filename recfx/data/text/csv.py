"""CSV files in blocks of whole lines, so that a large file can be read in parallel and resumed in the middle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pa_csv

from recfx.data.files import CHUNK_BYTES, File
from recfx.data.open_file import OpenFile
from recfx.data.text.csv_cells import Cells, guess, is_fast, may_be_rounded, read_cells
from recfx.data.text.csv_format import Csv, check_named_columns, header_of, pairs_of
from recfx.data.text.csv_lines import by_byte, by_character, with_short_delimiter, without_unclosed
from recfx.data.text.lines import Lines, is_utf8
from recfx.data.unit_rows import BadRow, UnitRows

__all__ = ["Csv", "OpenCsv", "check_named_columns"]

GUESSED = "guessed from the first rows. Give the type: types= of convert, --types, or a reader's column"
EXACTLY = " that holds this number exactly, or rounding='allow'"
SAME_BITS = ", in which a number below 0 has the same 64 bits"


class OpenCsv(OpenFile):
    """An open CSV file.

    Args:     types: of the columns that the caller knows; the others are guessed from the first rows. Binary: cells
                  unchanged; int64: whole numbers up to 2**64 - 1, with the same 64 bits; float64: numbers, whole ones
                  where float64 represents them exactly; struct{k, v}: items with their weights.
    """

    unit_name, null_is_missing, cells_are_bytes = "block", True, True

    def __init__(self, file: File, options: Csv, types: Mapping[str, pa.DataType]) -> None:
        self._options, self._lines = options, Lines(file, options.block_bytes)
        self._names, self._lines.start = header_of(self._lines.line_at, options)
        self._nulls = pa.array([null.encode() for null in options.nulls], pa.binary())
        self._slow: frozenset[str] = frozenset()  # columns that pyarrow's parser could not read before
        self.num_units = self._lines.num_blocks
        known = {name: self._known(name, kind) for name, kind in types.items() if name in self._names}
        self._cells = {**self._guess([name for name in self._names if name not in known]), **known}
        self.schema = pa.schema([(name, self._cells[name].type) for name in self._names])

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
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

    def _read_fast(self, unit: int, names: Sequence[str], fast: Mapping[str, pa.DataType]) -> UnitRows | None:
        """The `fast` columns as pyarrow's parser reads them, the others as bytes; None when it is not exact."""
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
            is_named = name in dict(pairs_of(self._options.weight_separator))
            return Cells(kind, None, separator, weights if is_named else None)
        if weights is None:
            raise ValueError(f"column '{name}' without a separator of weights. Give Csv(weight_separator=...)")
        return Cells(kind.field(0).type, None, separator, weights, weight=kind.field(1).type)

    def _guess(self, names: list[str]) -> dict[str, Cells]:
        text = self._lines.block(0, CHUNK_BYTES) if names and self.num_units else b""
        rows = self._rows(text, dict.fromkeys(names, pa.binary()))
        how = {}
        for name in dict.fromkeys(names):
            arguments = ("list_separator", "weight_separator")
            separator, weights = (self._options.separator_of(name, argument) for argument in arguments)
            is_list, is_weighted = (name in dict(pairs_of(getattr(self._options, argument))) for argument in arguments)
            how[name] = guess(
                rows.batch.column(name), self._nulls,
                separator=separator, weight_separator=weights, is_named=(is_list, is_weighted),
            )  # fmt: skip
        return how

    def _parse(self, unit: int, types: Mapping[str, pa.DataType]) -> UnitRows:
        return self._rows(self._lines.block(unit), types)

    def _rows(self, text: bytes, types: Mapping[str, pa.DataType]) -> UnitRows:
        options = self._options
        text, delimiter = with_short_delimiter(text, options.delimiter, options.quote)
        text, unclosed = without_unclosed(text, delimiter, options.delimiter, options.quote)
        if not text.lstrip(b"\r\n"):
            empty = pa.RecordBatch.from_pydict({name: pa.array([], kind) for name, kind in types.items()})
            return UnitRows(empty, np.empty(0, np.int64), unclosed)
        bad: list[BadRow] = []
        nulls = ["", *options.nulls]
        if not (is_text := is_utf8(text)):  # pyarrow reports a row with too many cells only in UTF-8
            if any(kind not in (pa.binary(), pa.int64(), pa.float64()) for kind in types.values()):
                raise pa.ArrowInvalid("text that is not UTF-8")
            text, nulls = by_character(text), [by_character(null.encode()).decode() for null in nulls]
        table = pa_csv.read_csv(pa.BufferReader(text), **self._how(len(text), delimiter, types, nulls, bad))
        arrays = [column.combine_chunks() for column in table.columns]
        if not is_text:
            arrays = [by_byte(array) if array.type == pa.binary() else array for array in arrays]
        if delimiter != options.delimiter.encode() and options.quote is not None and options.quote.encode() in text:
            arrays = [_with_delimiter(array, delimiter, options.delimiter) for array in arrays]
        batch = pa.RecordBatch.from_arrays(arrays, list(types))
        num_rows = batch.num_rows + len(bad) + len(unclosed)
        numbers = np.delete(np.arange(num_rows), [row.number for row in unclosed])  # of the parsed rows
        moved = [row._replace(number=int(numbers[row.number])) for row in bad]
        numbers = np.delete(numbers, [row.number for row in bad])
        return UnitRows(batch, numbers, sorted([*unclosed, *moved], key=lambda row: row.number))

    def _how(
        self, num_bytes: int, delimiter: bytes, types: Mapping[str, pa.DataType], nulls: list[str], bad: list[BadRow]
    ) -> dict:
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
                null_values=nulls,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        }

    def _convert(self, rows: UnitRows, names: set[str]) -> UnitRows:
        """Converts the cells of these columns to values, and drops the rows with other cells."""
        arrays, bad = {}, list(rows.bad)
        keep = np.ones(rows.batch.num_rows, dtype=bool)
        for name, array in zip(rows.batch.schema.names, rows.batch.columns, strict=True):
            cells = self._cells[name]
            arrays[name], wrong = read_cells(array, cells, self._nulls) if name in names else (array, {})
            expected = f"{cells.type}, {GUESSED}" if cells.is_guessed else str(cells.type)
            for row, cell in wrong.items():
                if keep[row]:
                    bad.append(BadRow(int(rows.numbers[row]), name, _shown(cell), expected + _why(cell, cells)))
                keep[row] = False
        batch = pa.RecordBatch.from_pydict(arrays)
        return UnitRows(batch.filter(pa.array(keep)), rows.numbers[keep], sorted(bad, key=lambda row: row.number))


def _with_delimiter(array: pa.Array, short: bytes, long: str) -> pa.Array:
    """Cells with the original delimiter in place of the short one."""
    is_text = pa.types.is_binary(array.type) or pa.types.is_string(array.type)
    return pc.replace_substring(array, short, long.encode()) if is_text else array


def _why(cell: bytes, cells: Cells) -> str:
    """A further reason where a type does not accept a whole number."""
    if cells.is_guessed:
        return ""
    if cells.item == pa.float64():
        return EXACTLY if re.fullmatch(rb"[+-]?[0-9]+(\.0*)?", cell.strip(b" \t")) else ""
    found = re.fullmatch(rb"0*([0-9]{1,20})(\.0+)?", cell.strip(b" \t"))
    return SAME_BITS if cells.item == pa.int64() and found and int(found[1]) < 2**64 else ""


def _shown(cell: bytes) -> str:
    try:
        return repr(cell.decode())
    except UnicodeDecodeError:
        return repr(cell)
