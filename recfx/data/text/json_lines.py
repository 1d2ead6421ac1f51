"""JSON lines in blocks of whole lines, so that a large file can be read in parallel and resumed in the middle."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import json as pa_json

from recfx.data.columns import Column
from recfx.data.exact_numbers import EXACT_DOUBLE
from recfx.data.files import File
from recfx.data.open_file import OpenFile
from recfx.data.schema import column_at, is_list, item_type, path_to
from recfx.data.text.json_types import guess, overridden, with_columns
from recfx.data.text.json_values import ColumnBuilder, WrongValueError, as_parsed, parse
from recfx.data.text.lines import InBlocks, Lines, is_utf8
from recfx.data.unit_rows import MOST_SHOWN, BadRow, UnitRows

__all__ = ["JsonLines", "OpenJsonLines"]

SAMPLE_BYTES = 1 << 20  # of the first rows, from which types are guessed when a reader names its columns
BLANKS = b" \t\r"


@dataclass(frozen=True, kw_only=True)
class JsonLines(InBlocks):
    """The format of JSON lines: one object in each line, columns by name. An absent name is null.

    Args:     block_bytes: see `InBlocks`.
    """


class OpenJsonLines(OpenFile):
    """An open file of JSON lines.

    Args:     types: of the items of columns by name; the others are guessed from the values.
              columns: that are read. Their types are guessed from the first rows; a column absent there is null.
                  None: all columns; then types are guessed from all rows.
    """

    unit_name = "block"

    def __init__(
        self, file: File, options: JsonLines, types: Mapping[str, pa.DataType], columns: Sequence[Column] | None
    ) -> None:
        self._lines = Lines(file, options.block_bytes)
        self.num_units = self._lines.num_blocks
        self._rounded: set[str] = set()
        if self._lines.line_at(0).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise ValueError("a list: JSON, but not JSON lines")
        if columns is None:
            self.schema = overridden(guess(self._all_lines(), keep_all=True), types)
        else:
            self._rounded = _rounded(columns)
            found = guess(self._sample(), keep_all=False)
            self.absent = frozenset(column.name for column in columns if not path_to(found, column.name))
            self.schema = with_columns(found, columns)

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
        schema = pa.schema(_selected(self.schema, [path_to(self.schema, name) for name in names]))
        text = self._lines.block(unit)
        batch = _by_arrow(text, schema, self._rounded) if text else _empty(schema)
        if batch is None:
            rows = _by_line(list(_lines_of(text)), schema, self._rounded)
        else:
            rows = UnitRows(batch, np.arange(batch.num_rows))
        arrays = [column_at(rows.batch, name) for name in names]
        return rows._replace(batch=pa.RecordBatch.from_arrays(arrays, list(names)))

    def num_rows(self, unit: int) -> int:
        return sum(1 for _ in self._block(unit))

    def _block(self, unit: int) -> Iterator[bytes]:
        return _lines_of(self._lines.block(unit))

    def _all_lines(self) -> Iterator[bytes]:
        return (line for unit in range(self.num_units) for line in self._block(unit))

    def _sample(self) -> Iterator[bytes]:
        """The first lines, of several blocks when blocks are small."""
        left = SAMPLE_BYTES
        for unit in range(self.num_units):
            text = self._lines.block(unit, left)
            yield from _lines_of(text)
            left -= len(text)
            if left <= 0:
                return


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], kind) for kind in schema.types], schema.names)


def _rounded(columns: Sequence[Column]) -> set[str]:
    """The names of columns that allow rounding of whole numbers, and of structs where all fields do."""
    may = {name: True for column in columns for name in _outer_names(column.name)}
    for column in columns:
        for name in _outer_names(column.name):
            may[name] = may[name] and column.rounding == "allow"
    return {name for name, allowed in may.items() if allowed}


def _outer_names(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _lines_of(text: bytes) -> Iterator[bytes]:
    """The lines without blanks around them, and without blank lines."""
    return (stripped for line in text.split(b"\n") if (stripped := line.strip(BLANKS)))


def _selected(fields: pa.Schema | pa.StructType, paths: Sequence[Sequence[str]]) -> list[tuple[str, pa.DataType]]:
    """The fields of these paths, and no other fields of their structs."""
    inner: dict[str, list[Sequence[str]]] = {}
    for name, *rest in paths:
        inner.setdefault(name, []).append(rest)
    kinds = {name: fields.field(name).type for name in inner}
    return [
        (name, kinds[name] if [] in rests else pa.struct(_selected(kinds[name], rests)))
        for name, rests in inner.items()
    ]


def _by_arrow(
    text: bytes, schema: pa.Schema, rounded: Collection[str], *, most: float = np.inf
) -> pa.RecordBatch | None:
    """The rows as Arrow parses them; None where it cannot parse them exactly, or a row is not one line.

    Args:     most: larger doubles count as exact.
    """
    if any(_has_map(kind) for kind in schema.types):
        return None
    if not _is_one_a_line(text):
        text = b"\n".join(_lines_of(text))
        if not _is_one_a_line(text):
            return None
    try:
        table = pa_json.read_json(
            pa.BufferReader(text),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=min(len(text) + 1, (1 << 31) - 1)),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        return None
    if len(table) != text.count(b"\n") + (not text.endswith(b"\n")):
        return None
    arrays = [column.combine_chunks() for column in table.columns]
    exact = [array for name, array in zip(schema.names, arrays, strict=True) if name not in rounded]
    if not all(_is_exact(array, most) for array in exact):
        return None
    if any(_has_string(kind) for kind in schema.types) and not is_utf8(text):
        return None
    return pa.RecordBatch.from_arrays(arrays, schema.names)


def _is_one_a_line(text: bytes) -> bool:
    """Whether every line begins and ends with a brace. Then no object that Arrow finds spans two lines: a closing and
    an opening brace follow each other only between rows, and no string contains a line end."""
    num_ends = text.count(b"\n") - text.endswith(b"\n")
    if not text.startswith(b"{") or not text.rstrip(b"\r\n").endswith(b"}"):
        return False
    return text.count(b"}\n{") == num_ends or text.count(b"}\r\n{") == num_ends


def _has_map(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_map(field.type) for field in kind)
    return pa.types.is_map(kind) or (is_list(kind) and _has_map(item_type(kind)))


def _has_string(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_string(field.type) for field in kind)
    return pa.types.is_string(kind) or (is_list(kind) and _has_string(item_type(kind)))


def _is_exact(array: pa.Array, most: float) -> bool:
    """Whether no double up to `most` may be a whole number that was rounded or overflowed."""
    if is_list(array.type):
        return _is_exact(array.values, most)
    if pa.types.is_struct(array.type):
        return all(_is_exact(field, most) for field in array.flatten())
    if not pa.types.is_floating(array.type):
        return True
    sizes = np.abs(array.to_numpy(zero_copy_only=False))
    return not ((sizes >= EXACT_DOUBLE) & (sizes <= most)).any()


def _by_line(lines: Sequence[bytes], schema: pa.Schema, rounded: Collection[str]) -> UnitRows:
    """The rows one by one, without the bad ones. A line that either parser can read is a row."""
    columns = ColumnBuilder({field.name: field.type for field in schema}, rounded)
    bad = []
    for number, line in enumerate(lines):
        try:
            columns.add(number, parse(line))
        except WrongValueError as error:
            bad.append(BadRow(number, error.column, error.got, error.expected))
        except ValueError as error:
            alone = _by_arrow(line, schema, rounded, most=sys.float_info.max)
            if alone is None:
                text = line[:MOST_SHOWN].decode(errors="replace")
                bad.append(BadRow(number, None, f"{text!r} ({error})", "a JSON object in a line"))
            else:
                columns.add(number, as_parsed(alone.to_pylist()[0]))
    rows = columns.rows()
    return rows._replace(bad=sorted([*bad, *rows.bad], key=lambda row: row.number))
