"""From the arrays of a file to arrays of one type per column, every row checked.

A conformed batch is an Arrow record batch: fixed_size_list<float>[width] for a fixed-length column; otherwise lists,
`depth` deep, of float, int64, binary, or struct<value, weight>. Nothing in it is null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from recfx.data.columns import Column, FixedLen, Valid, VarLen, finite
from recfx.data.schema import as_list, decoded, is_list
from recfx.kernels.pack_columns import Block, BlockColumn

__all__ = ["BadRows", "block_of", "conform"]

EXACT_FLOAT = 2**24  # integers up to here are float32 numbers


class BadRows(Exception):  # noqa: N818  not an error yet: the policy decides
    """Rows of a batch that a column cannot take."""

    def __init__(self, column: str, rows: np.ndarray, got: Callable[[int], str], expected: str) -> None:
        self.column = column
        self.rows = rows  # rising indices
        self.got, self.expected = got(int(rows[0])), expected


class _Lists(NamedTuple):
    """A column taken apart: what lists there are, and what they hold, end to end."""

    offsets: tuple[np.ndarray, ...]  # i32, outermost first, each from 0 to the number of items below
    items: pa.Array

    def rows_of(self, items: np.ndarray) -> np.ndarray:
        """The rows that hold these items, each once."""
        for offsets in reversed(self.offsets):
            items = np.searchsorted(offsets, items, side="right") - 1
        return np.unique(items)


def conform(batch: pa.RecordBatch, columns: Sequence[Column]) -> pa.RecordBatch:
    """The columns of a batch whose schema was checked, each in its conformed type.

    Cost:     no copy of lists of float, int64 or binary; one pass otherwise, and one over numbers to check them.
    Raises:   BadRows at the first column that finds any.
    """
    arrays = [_conform(batch.column(column.name), column) for column in columns]
    return pa.RecordBatch.from_arrays(arrays, [column.name for column in columns])


def _conform(array: pa.Array, column: Column) -> pa.Array:
    if _is_conformed(array, column):
        return array
    lists = _take_apart(array, column)
    if isinstance(column, FixedLen):
        return _fixed(_without_nulls(lists, column), column)
    if column.weighted:
        keys, weights = (_without_nulls(lists._replace(items=items), column) for items in lists.items.flatten())
        fields = [_items(keys, column), _valid_numbers(weights, column.name, pa.float32(), finite)]
        items = pa.StructArray.from_arrays(fields, ["value", "weight"])
    else:
        items = _items(_without_nulls(lists, column), column)
    for offsets in reversed(lists.offsets):
        items = pa.ListArray.from_arrays(pa.array(offsets), items)
    return items


def _is_conformed(array: pa.Array, column: Column) -> bool:
    """Whether it is lists of the column's items already, without nulls, and there is nothing to check."""
    if isinstance(column, FixedLen) or column.valid is not None or column.weighted or column.string_hash is not None:
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


def _valid(array: pa.Array) -> np.ndarray:
    return array.is_valid().to_numpy(zero_copy_only=False)


def _present(array: pa.Array, column: Column, expected: str) -> np.ndarray:
    """Which rows are not null; a bad row where nulls are errors."""
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
    values = _checked(lists, column).to_numpy(zero_copy_only=False)
    if len(values) < len(lengths) * width:
        dense = np.tile(np.array(column.default, dtype=np.float32), (len(lengths), 1))
        dense[lengths > 0] = values.reshape(-1, width)
        values = dense.ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(values), width)


def _items(lists: _Lists, column: VarLen) -> pa.Array:
    if column.string_hash is not None:
        return _hash(lists.items.cast(pa.binary()), column)
    return lists.items.cast(pa.binary()) if column.item == pa.binary() else _checked(lists, column)


def _hash(strings: pa.Array, column: VarLen) -> pa.Array:
    assert column.string_hash is not None
    parts = _bytes(strings)
    (hashes,) = column.string_hash([_tensor(parts.values)], [_tensor(parts.offsets[0])])
    values = hashes.numpy()
    if column.buckets == 0:
        values = values & np.int64(2**63 - 1)
    elif column.buckets is not None:
        values = (values.view(np.uint64) % np.uint64(column.buckets)).view(np.int64)
    return pa.array(values)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _checked(lists: _Lists, column: Column) -> pa.Array:
    return _valid_numbers(lists, column.name, column.item, column.valid)


def _valid_numbers(lists: _Lists, name: str, kind: pa.DataType, valid: Valid) -> pa.Array:
    """The items as numbers, all of them valid."""
    numbers = _numbers(lists, name, kind)
    if valid is not None:
        values = numbers.to_numpy()
        wrong = np.flatnonzero(~valid(values))
        if len(wrong):
            got = f"{values[wrong[0]]}"
            raise BadRows(name, lists.rows_of(wrong), lambda _: got, str(valid))
    return numbers


def _numbers(lists: _Lists, name: str, kind: pa.DataType) -> pa.Array:
    """The items cast, where that keeps an integer's value, or its 64 bits."""
    items = lists.items
    if pa.types.is_integer(items.type) and items.type.bit_width > 16 and kind == pa.float32():
        values = items.to_numpy()
        wrong = np.flatnonzero((values < -EXACT_FLOAT) | (values > EXACT_FLOAT))
        if len(wrong):
            got, limits = f"{values[wrong[0]]}, which float32 would round", f"from {-EXACT_FLOAT} to {EXACT_FLOAT}"
            raise BadRows(name, lists.rows_of(wrong), lambda _: got, f"an integer {limits}")
    return items.view(kind) if (items.type, kind) == (pa.uint64(), pa.int64()) else items.cast(kind)


def block_of(batch: pa.RecordBatch) -> Block:
    """A conformed batch as the packing kernel reads it, without copying."""
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
    """The bytes of strings and their offsets, which Arrow keeps in two buffers."""
    _, offsets, data = array.buffers()
    values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    if offsets is None or offsets.size == 0:
        return BlockColumn(values, (np.zeros(1, np.int32),))
    return BlockColumn(values, (np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1],))
