"""Turns the arrays of a file into arrays of one type per column, and checks every row.

A conformed batch is an Arrow record batch: fixed_size_list<float>[width] for a fixed-length column; otherwise lists,
`depth` deep, of float, int64, binary, or struct<value, weight>. It contains no nulls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from recfx.data.columns import Between, Column, FixedLen, Valid, VarLen, finite
from recfx.data.exact_numbers import Wrong, rounded, to_float, to_int64
from recfx.data.packing.pack_columns import Block, BlockColumn
from recfx.data.schema import as_list, decoded, is_list, is_plain, typed, without_views
from recfx.data.unit_rows import BadRows, ColumnError

__all__ = ["BadRows", "block_of", "conform"]


class _Lists(NamedTuple):
    """A column split into the offsets of its lists and their items, end to end."""

    offsets: tuple[np.ndarray, ...]  # i32, outermost first, each from 0 to the number of items below
    items: pa.Array

    def rows_of(self, items: np.ndarray) -> np.ndarray:
        """The rows that hold these items, each once."""
        for offsets in reversed(self.offsets):
            items = np.searchsorted(offsets, items, side="right") - 1
        return np.unique(items)


def conform(batch: pa.RecordBatch, columns: Sequence[Column]) -> pa.RecordBatch:
    """The columns of a batch whose schema was checked, each in its conformed type.

    A column with missing="empty" that the batch does not have is empty in every row.

    Cost:     lists of float, int64 or binary are not copied; others take one pass, and checking numbers one more.
    Raises:   BadRows at the first column that has any, ColumnError where Arrow cannot convert a column.
    """
    arrays, names = [], set(batch.schema.names)
    for column in columns:
        try:
            if column.name not in names and column.missing == "empty":
                arrays.append(_conform(pa.nulls(batch.num_rows), replace(column, null="empty")))
            else:
                arrays.append(_conform(batch.column(column.name), column))
        except BadRows:
            raise
        except Exception as error:
            raise ColumnError(column.name, error) from error
    return pa.RecordBatch.from_arrays(arrays, [column.name for column in columns])


def _conform(array: pa.Array, column: Column) -> pa.Array:
    if _is_conformed(array, column):
        return array
    lists = _take_apart(array if is_plain(array.type) else without_views(typed(array, column)), column)
    if isinstance(column, FixedLen):
        return _fixed(_without_nulls(lists, column), column)
    lists = _truncated(lists, column)
    if column.weighted:
        keys, weights = (
            _without_nulls(lists._replace(items=decoded(items)), column) for items in lists.items.flatten()
        )
        fields = [_items(keys, column), _numbers(weights, column, pa.float32(), finite)]
        items = pa.StructArray.from_arrays(fields, ["value", "weight"])
    else:
        items = _items(_without_nulls(lists, column), column)
    for offsets in reversed(lists.offsets):
        items = pa.ListArray.from_arrays(pa.array(offsets), items)
    return items


def _is_conformed(array: pa.Array, column: Column) -> bool:
    """Whether the array already has the conformed type without nulls, and nothing needs to be checked."""
    if isinstance(column, FixedLen) or column.valid is not None or column.weighted or column.string_hash is not None:
        return False
    if column.truncate is not None:
        return False
    for _ in range(column.depth):
        if not pa.types.is_list(array.type) or array.null_count:
            return False
        array = array.values
    return array.type == column.item and not array.null_count


def _without_nulls(lists: _Lists, column: Column) -> _Lists:
    if lists.items.null_count:
        rows = lists.rows_of(np.flatnonzero(~_valid(lists.items)))
        raise BadRows(column.name, rows, lambda _: "a null element", "values only")
    return lists


def _take_apart(array: pa.Array, column: Column) -> _Lists:
    levels: list[np.ndarray] = []
    if not is_list(array.type):
        array = decoded(array)
        present = _present(array, column, "a value")
        offsets = np.append(np.int32(0), np.cumsum(present, dtype=np.int32))
        return _Lists((offsets,), array.drop_null() if array.null_count else array)
    while is_list(array.type):
        array = as_list(array)
        offsets, items = array.offsets.to_numpy(), array.values
        if array.null_count and not levels:
            present = _present(array, column, "a list, empty if missing")
            lengths = np.where(present, np.diff(offsets), 0)
            offsets, items = np.append(np.int32(0), np.cumsum(lengths, dtype=np.int32)), array.flatten()
        elif array.null_count:
            rows = _Lists(tuple(levels), array).rows_of(np.flatnonzero(~_valid(array)))
            raise BadRows(column.name, rows, lambda _: "a null element", "a list, empty if missing")
        if offsets[0] != 0 or offsets[-1] != len(items):
            items, offsets = items.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]
        levels.append(offsets)
        array = items
    return _Lists(tuple(levels), decoded(array))


def _truncated(lists: _Lists, column: VarLen) -> _Lists:
    """The innermost lists, cut to `column.truncate` items."""
    if column.truncate is None:
        return lists
    offsets = lists.offsets[-1]
    lengths = np.diff(offsets)
    if not len(lengths) or lengths.max() <= column.truncate:
        return lists
    kept = np.minimum(lengths, np.int32(min(column.truncate, 2**31 - 1)))
    ends = np.append(np.int32(0), np.cumsum(kept, dtype=np.int32))
    firsts = offsets[1:] - kept if column.side == "left" else offsets[:-1]
    places = np.arange(ends[-1], dtype=np.int32) + np.repeat(firsts - ends[:-1], kept)
    return lists._replace(offsets=(*lists.offsets[:-1], ends), items=lists.items.take(pa.array(places)))


def _valid(array: pa.Array) -> np.ndarray:
    return array.is_valid().to_numpy(zero_copy_only=False)


def _present(array: pa.Array, column: Column, expected: str) -> np.ndarray:
    """Which rows are not null. Raises BadRows where nulls are errors."""
    present = _valid(array)
    if array.null_count and column.null == "error":
        expected = f"{expected}, or null='empty' for the column"
        raise BadRows(column.name, np.flatnonzero(~present), lambda _: "null", expected)
    return present


def _fixed(lists: _Lists, column: FixedLen) -> pa.Array:
    lengths, width = np.diff(lists.offsets[0]), len(column.default)
    wrong = np.flatnonzero((lengths != width) & (lengths != 0))
    if len(wrong):
        expected = f"{width}, the length of the default, or none"
        raise BadRows(column.name, wrong, lambda row: f"{lengths[row]} values", expected)
    values = _numbers(lists, column, column.item, column.valid).to_numpy(zero_copy_only=False)
    if len(values) < len(lengths) * width:
        dense = np.tile(np.array(column.default, dtype=np.float32), (len(lengths), 1))
        dense[lengths > 0] = values.reshape(-1, width)
        values = dense.ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(values), width)


def _items(lists: _Lists, column: VarLen) -> pa.Array:
    if column.string_hash is not None:
        return _hash(lists.items.cast(pa.binary()), column)
    if column.item == pa.binary():
        return lists.items.cast(pa.binary())
    return _numbers(lists, column, column.item, column.valid)


def _hash(strings: pa.Array, column: VarLen) -> pa.Array:
    assert column.string_hash is not None
    parts = _bytes(strings)
    values, (offsets,) = parts.values, parts.offsets
    if offsets[0] != 0:  # a slice of a longer array
        values, offsets = values[offsets[0] : offsets[-1]], offsets - offsets[0]
    (hashes,) = column.string_hash([_tensor(values)], [_tensor(offsets)])
    values = hashes.numpy()
    if column.buckets == 0:
        values = values & np.int64(2**63 - 1)
    elif column.buckets is not None:
        values = (values.view(np.uint64) % np.uint64(column.buckets)).view(np.int64)
    return pa.array(values)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _numbers(lists: _Lists, column: Column, kind: pa.DataType, valid: Valid) -> pa.Array:
    """The items as numbers that keep their value or their 64 bits, all of them valid."""
    numbers = to_int64(lists.items) if kind == pa.int64() else to_float(lists.items, kind)
    if isinstance(numbers, Wrong):
        raise _bad(numbers, lists, column)
    values = numbers.to_numpy()
    if valid is not None and not _is_valid_throughout(values, valid):
        wrong = np.flatnonzero(~valid(values))
        if len(wrong):
            raise _bad(
                Wrong(wrong, _said(lists.items[int(wrong[0])].as_py(), values[wrong[0]]), str(valid)), lists, column
            )
    if kind == pa.float32() and column.rounding == "error":
        changed = rounded(lists.items, numbers)
        if changed is not None:
            advice = f"{changed.expected}, or rounding='allow' for the column"
            raise _bad(changed._replace(expected=advice), lists, column)
    return numbers


def _bad(wrong: Wrong, lists: _Lists, column: Column) -> BadRows:
    return BadRows(column.name, lists.rows_of(wrong.places), lambda _: wrong.got, wrong.expected)


def _said(item: Any, value: np.generic) -> str:
    """The value in the file and, where it became another, in float32."""
    return f"{item}, which is {value} in float32" if np.isinf(value) and item != float(value) else f"{value}"


def _is_valid_throughout(values: np.ndarray, valid: Valid) -> bool:
    """Whether the smallest and the largest value are valid. With a NaN among the values neither is."""
    if type(valid) is not Between or not len(values):
        return False
    return bool(values.min() >= valid.low and values.max() <= valid.high)


def block_of(batch: pa.RecordBatch) -> Block:
    """A conformed batch in the form that the packing kernel reads, without copying."""
    return Block.of(batch.num_rows, [_block_column(array) for array in batch.columns])


def _block_column(array: pa.Array) -> BlockColumn:
    if pa.types.is_fixed_size_list(array.type):
        return BlockColumn(array.flatten().to_numpy())
    levels = []
    while pa.types.is_list(array.type):
        levels.append(array.offsets.to_numpy())
        array = array.values
    if pa.types.is_struct(array.type):
        values, weights = array.flatten()
        column = _block_column(values)
        return BlockColumn(column.values, (*levels, *column.offsets), weights.to_numpy())
    if pa.types.is_binary(array.type):
        parts = _bytes(array)
        return BlockColumn(parts.values, (*levels, *parts.offsets))
    return BlockColumn(array.to_numpy(), tuple(levels))


def _bytes(array: pa.Array) -> BlockColumn:
    """The bytes of strings and their offsets, which Arrow stores in two buffers."""
    _, offsets, data = array.buffers()
    values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    if offsets is None or offsets.size == 0:
        return BlockColumn(values, (np.zeros(1, np.int32),))
    return BlockColumn(values, (np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1],))
