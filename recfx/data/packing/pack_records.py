"""Rows as records, so that a batch of rows in any order reads a few cache lines per row, not two per column."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recfx.data.packing.pack_columns import (
    Block,
    BlockColumn,
    PackedColumn,
    PackPlan,
    Segment,
    count_items,
    pack_columns_reference,
)
from recfx.kernels.build import library
from recfx.kernels.op import c_function

__all__ = ["Records", "pack_records", "pack_records_reference", "write_records", "write_records_reference"]

_record_starts = c_function("recfx_record_starts")
_write_records = c_function("recfx_write_records")
_pack_records = c_function("recfx_pack_records")

SLACK = b"\0" * 8  # after the last record: the kernel always reads one item, also of an empty list


class Records(NamedTuple):
    """Rows from `write_records`, in any order and from any number of blocks."""

    addresses: np.ndarray  # i64 [rows], contiguous: of each row's record
    record_bytes: int  # of a typical record: so many bytes are prefetched
    memory: Any  # the owner of the records, kept alive

    @property
    def num_rows(self) -> int:
        return len(self.addresses)


def new_bytes(number: int) -> np.ndarray:
    return np.empty(number, dtype=np.uint8)


def write_records(
    plan: PackPlan, block: Block, allocate: Callable[[int], np.ndarray] = new_bytes
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a block as records: the offset of each, i64 [rows + 1], and their bytes.

    A record holds i32 lengths of the row's outermost lists, its fixed-length values, and the contents of each list: for
    a nested list the lengths of the inner lists level by level, then the values, then the weights. Lists of 8-byte
    values come first, then lists of 4-byte values, then all others.

    Args:     allocate: returns u8 [n] for n bytes. New memory from the system takes longer than writing it.
    Cost:     two passes over the values, one thread, without the GIL; about 150 ns per row of 40 columns.
    """
    if library() is None:
        return write_records_reference(plan, block)
    starts = np.empty(block.num_rows + 1, dtype=np.int64)
    columns = block.sources.ctypes.data, plan.targets.ctypes.data, len(plan.targets), block.num_rows
    _record_starts(*columns, starts.ctypes.data)
    records = allocate(int(starts[-1]))
    _write_records(*columns, starts.ctypes.data, records.ctypes.data)
    return starts, records


def pack_records(
    plan: PackPlan, segments: Sequence[Segment[Records]], *, pin_memory: bool = False
) -> tuple[Tensor, np.ndarray]:
    """The rows of the segments, end to end, in a new buffer of `plan.layout`, and their `count_items`.

    When there are more items than the plan has room for, the buffer is invalid: pack again with a larger plan. Counting
    first would read every record twice.

    Cost:     one pass over records and batch, one thread, without the GIL; per row of 40 columns 60 ns from a processor
              cache, 140 ns from memory.
    Raises:   ValueError when the segments hold more rows than a batch.
    """
    parts = [s.block.addresses[s.begin : s.end] for s in segments]
    addresses = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if len(addresses) > plan.batch_size:
        raise ValueError(
            f"segments: got {len(addresses)} rows, expected at most {plan.batch_size}, the plan's batch size."
        )
    if library() is None:
        buffer, counts = pack_records_reference(plan, addresses)
        return buffer.pin_memory() if pin_memory else buffer, counts
    buffer = torch.empty(plan.layout.num_bytes, dtype=torch.uint8, pin_memory=pin_memory)
    counts = np.empty(len(plan.capacities), dtype=np.int64)
    _pack_records(
        buffer.data_ptr(),
        addresses.ctypes.data,
        len(addresses),
        max(s.block.record_bytes for s in segments),
        plan.targets.ctypes.data,
        len(plan.targets),
        plan.levels.ctypes.data,
        counts.ctypes.data,
        plan.gaps.ctypes.data,
        len(plan.gaps),
        plan.num_samples_at,
    )
    return buffer, counts


def write_records_reference(plan: PackPlan, block: Block) -> tuple[np.ndarray, np.ndarray]:
    """The definition of `write_records`."""
    records = [_record(plan.columns, block, row) for row in range(block.num_rows)]
    records[-1:] = [record + SLACK for record in records[-1:]]
    starts = np.cumsum([0, *map(len, records)], dtype=np.int64)
    return starts, np.frombuffer(bytearray(b"".join(records)), dtype=np.uint8)


def pack_records_reference(plan: PackPlan, addresses: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The definition of `pack_records`: it reads the records back into a block."""
    block = _block(plan.columns, addresses)
    segments = [Segment(block, 0, block.num_rows)]
    counts = count_items(plan, segments)
    if (counts > plan.capacities).any():
        return torch.empty(plan.layout.num_bytes, dtype=torch.uint8), counts
    return pack_columns_reference(plan, segments), counts


def _in_record_order(columns: Sequence[PackedColumn]) -> list[int]:
    """Indices of the list columns, in the order of their contents in a record."""

    def kind(i: int) -> int:
        column = columns[i]
        is_plain = column.num_levels == 1 and not column.weighted and column.dtype.itemsize >= 4
        return -column.dtype.itemsize if is_plain else 0

    return sorted((i for i, column in enumerate(columns) if column.num_levels), key=kind)


def _record(columns: Sequence[PackedColumn], block: Block, row: int) -> bytes:
    lengths: list[np.ndarray] = []
    contents: list[np.ndarray] = []
    for i in _in_record_order(columns):
        source, begin, end = block.columns[i], row, row + 1
        for level, offsets in enumerate(source.offsets):
            inner = np.diff(offsets[begin : end + 1])
            (contents if level else lengths).append(inner)
            begin, end = int(offsets[begin]), int(offsets[end])
        contents.append(source.values[begin:end])
        if source.weights is not None:
            contents.append(source.weights[begin:end])
    fixed = [
        block.columns[i].values[row * column.width : (row + 1) * column.width]
        for i, column in enumerate(columns)
        if not column.num_levels
    ]
    return b"".join(part.tobytes() for part in (*lengths, *fixed, *contents))


def _block(columns: Sequence[PackedColumn], addresses: np.ndarray) -> Block:
    rows = [_parts(columns, int(address)) for address in addresses]
    out = []
    for i, column in enumerate(columns):
        kinds = enumerate(_kinds(column))
        arrays = [np.concatenate([np.empty(0, kind), *(row[i][part] for row in rows)]) for part, kind in kinds]
        offsets = tuple(np.append(0, np.cumsum(lengths)).astype(np.int32) for lengths in arrays[: column.num_levels])
        out.append(BlockColumn(arrays[column.num_levels], offsets, arrays[-1] if column.weighted else None))
    return Block.of(len(addresses), out)


def _kinds(column: PackedColumn) -> list[type]:
    """The types of a column's parts in a record: lengths of lists level by level, values, weights."""
    values = {torch.float32: np.float32, torch.int64: np.int64, torch.uint8: np.uint8}[column.dtype]
    return [*[np.int32] * column.num_levels, values, *[np.float32] * column.weighted]


def _parts(columns: Sequence[PackedColumn], address: int) -> list[list[np.ndarray]]:
    """The parts of a record, by column."""
    place = address

    def read(count: int, kind: type) -> np.ndarray:
        nonlocal place
        num_bytes = count * np.dtype(kind).itemsize
        place += num_bytes
        return np.frombuffer(ctypes.string_at(place - num_bytes, num_bytes), dtype=kind)

    order = _in_record_order(columns)
    parts = {i: [read(1, np.int32)] for i in order}
    parts |= {i: [read(column.width, np.float32)] for i, column in enumerate(columns) if not column.num_levels}
    for i in order:
        for kind in _kinds(columns[i])[1 : columns[i].num_levels + 1]:
            parts[i].append(read(int(parts[i][-1].sum()), kind))
        if columns[i].weighted:
            parts[i].append(read(len(parts[i][-1]), np.float32))
    return [parts[i] for i in range(len(columns))]
