"""Describes files column by column: schema, missing values, list lengths, cardinalities and skew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.files import File
from recfx.data.formats import Format, open_file, reading
from recfx.data.open_file import OpenFile
from recfx.data.schema import as_list, is_list, item_type
from recfx.data.text.csv import check_named_columns

__all__ = ["ColumnFacts", "Facts", "describe", "facts_of", "first_rows"]


@dataclass(frozen=True, kw_only=True)
class ColumnFacts:
    """Facts about one column; shares are between 0 and 1."""

    name: str
    type: str
    missing: float  # share of rows that are null, or hold no list item
    mean_length: float  # of a row, in items of the innermost lists; a plain value counts 1
    max_length: int
    num_distinct: int
    once: float  # share of the distinct values that occur once
    top: float  # share of the most frequent value: the skew
    low: float | str | None
    high: float | str | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about some files."""

    num_files: int
    num_bytes: int
    num_units: int
    num_rows: int
    num_described: int  # the first rows, which `columns` describes
    columns: tuple[ColumnFacts, ...]


def describe(files: Sequence[File], *, max_rows: int = 1_000_000, format: Format | None = None) -> Facts:
    """Describes the first `max_rows` rows of the files, and counts all rows.

    Cost:     holds the described rows in memory.
    Raises:   ValueError when a file cannot be read or has other columns than the first file.
    """
    check_named_columns(files, format)
    num_rows, num_units, held = 0, 0, list[pa.Table]()
    for unit in _units(files, format):
        if num_rows < max_rows:
            held.append(pa.Table.from_batches([unit.read()]).slice(0, max_rows - num_rows))
        num_rows, num_units = num_rows + unit.count(), num_units + 1
    table = pa.concat_tables(held, promote_options="permissive") if held else _empty(files, format)
    return Facts(
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        num_units=num_units,
        num_rows=num_rows,
        num_described=len(table),
        columns=tuple(facts_of(table)),
    )


def first_rows(files: Sequence[File], max_rows: int, *, format: Format | None = None) -> pa.Table:
    """The first rows of the files, of all columns. What follows them is not read.

    Raises:   as `describe`.
    """
    check_named_columns(files, format)
    held, num_rows = list[pa.Table](), 0
    for unit in _units(files, format):
        held.append(pa.Table.from_batches([unit.read()]).slice(0, max_rows - num_rows))
        num_rows += len(held[-1])
        if num_rows >= max_rows:
            break
    return pa.concat_tables(held, promote_options="permissive") if held else _empty(files, format)


def facts_of(table: pa.Table) -> list[ColumnFacts]:
    """Facts about each column of a table."""
    return [_describe(name, column) for name, column in zip(table.column_names, table.columns, strict=True)]


@dataclass(frozen=True)
class _Unit:
    """A unit of an open file, with the columns of the first file."""

    file: File
    source: OpenFile
    number: int
    names: list[str]

    def read(self) -> pa.RecordBatch:
        with reading(self.file, f" in {self.source.unit_name} {self.number}", "a whole file"):
            return self.source.read(self.number, self.names).batch

    def count(self) -> int:
        with reading(self.file, f" in {self.source.unit_name} {self.number}", "a whole file"):
            return self.source.num_rows(self.number)


def _units(files: Sequence[File], format: Format | None) -> Iterator[_Unit]:
    names: list[str] | None = None
    for file in files:
        source = open_file(file, {}, format)
        names = names or source.schema.names
        if source.schema.names != names:
            raise ValueError(
                f"file '{file.path}': got columns {source.schema.names}, expected {names}, as in the first file."
            )
        yield from (_Unit(file, source, number, names) for number in range(source.num_units))


def _empty(files: Sequence[File], format: Format | None) -> pa.Table:
    return open_file(files[0], {}, format).schema.empty_table()


def _describe(name: str, column: pa.ChunkedArray) -> ColumnFacts:
    items, rows = column, np.arange(len(column))
    while is_list(items.type):
        items = pa.chunked_array(map(as_list, items.chunks), pa.list_(item_type(items.type)))
        rows = rows[pc.list_parent_indices(items).to_numpy()]
        items = pc.list_flatten(items)
    if pa.types.is_struct(items.type):
        items = pc.struct_field(items, 0)
    if pa.types.is_dictionary(items.type):
        items = items.cast(items.type.value_type)
    if pa.types.is_nested(items.type):  # a struct within a struct, which Arrow cannot count
        items = pa.chunked_array([[None if item is None else repr(item) for item in items.to_pylist()]], pa.string())
    present = items.is_valid().to_numpy()
    rows, items = rows[present], items.drop_null()
    lengths = np.bincount(rows, minlength=len(column))
    counts = pc.value_counts(items).field("counts").to_numpy()
    limits = _limits(items)
    return ColumnFacts(
        name=name,
        type=str(column.type),
        missing=float(np.mean(lengths == 0)) if len(lengths) else 0.0,
        mean_length=float(lengths.mean()) if len(lengths) else 0.0,
        max_length=int(lengths.max(initial=0)),
        num_distinct=len(counts),
        once=float(np.mean(counts == 1)) if len(counts) else 0.0,
        top=float(counts.max() / counts.sum()) if len(counts) else 0.0,
        low=limits.get("min"),
        high=limits.get("max"),
    )


def _limits(items: pa.ChunkedArray) -> dict:
    try:
        return pc.min_max(items).as_py()
    except pa.ArrowNotImplementedError:  # a type without an order
        return {}
