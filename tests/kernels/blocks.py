"""Blocks of decoded rows, of every kind of column."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import strategies as st

from recfx.data.packing.pack_columns import Block, BlockColumn, PackedColumn, PackPlan, Segment, count_items
from recfx.types import Ragged

COLUMNS = (
    PackedColumn("label", torch.float32, width=2, num_levels=0),
    PackedColumn("x", torch.float32),
    PackedColumn("c", torch.int64, weighted=True),
    PackedColumn("words", torch.uint8, num_levels=2),
    PackedColumn("deep", torch.int64, num_levels=3),
)
EXTREMES = [0, -1, 2**63 - 1, -(2**63), 2**53 + 1]


def plan_for(segments: list[Segment], spare_rows: int = 0, spare_items: int = 0) -> PackPlan:
    batch_size = sum(s.end - s.begin for s in segments) + spare_rows
    return PackPlan.of(batch_size, COLUMNS, count_items(PackPlan.of(1, COLUMNS), segments) + spare_items)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    num_rows = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns = []
    for column in COLUMNS:
        offsets, num_lists = [], num_rows
        for _ in range(column.num_levels):
            unused = rng.integers(0, 3)  # items before the first list: offsets may begin anywhere
            offsets.append((unused + np.append(0, rng.integers(0, 4, num_lists).cumsum())).astype(np.int32))
            num_lists = int(offsets[-1][-1])
        num_values = num_lists * (column.width or 1)
        if column.dtype == torch.float32:
            values = rng.standard_normal(num_values).astype(np.float32)
        elif column.dtype == torch.int64:
            values = rng.choice(np.array(EXTREMES), num_values)
        else:
            values = rng.integers(0, 256, num_values).astype(np.uint8)
        weights = rng.random(num_values).astype(np.float32) if column.weighted else None
        columns.append(BlockColumn(values, tuple(offsets), weights))
    return Block.of(num_rows, columns)


@st.composite
def segments_of(draw: st.DrawFn) -> list[Segment]:
    segments = []
    for block in draw(st.lists(blocks(), min_size=1, max_size=3)):
        begin = draw(st.integers(0, block.num_rows))
        segments.append(Segment(block, begin, draw(st.integers(begin, block.num_rows))))
    return segments


def nested(column: BlockColumn, begin: int, end: int, level: int = 0) -> list:
    """Lists [begin, end) of a level as Python lists; pairs of value and weight where there are weights."""
    if level == len(column.offsets):
        values = column.values[begin:end].tolist()
        return values if column.weights is None else list(zip(values, column.weights[begin:end].tolist(), strict=True))
    return [nested(column, a, b, level + 1) for a, b in itertools.pairwise(column.offsets[level][begin : end + 1])]


def nested_of(ragged: Ragged) -> list:
    weights = None if ragged.weights is None else ragged.weights.numpy()
    column = BlockColumn(ragged.values.numpy(), tuple(o.numpy() for o in (*ragged.outer, ragged.offsets)), weights)
    return nested(column, 0, ragged.num_samples)


def simple_block() -> Block:
    def offsets(*lengths: int) -> np.ndarray:
        return np.append(0, np.cumsum(lengths)).astype(np.int32)

    return Block.of(
        2,
        [
            BlockColumn(np.arange(4, dtype=np.float32)),
            BlockColumn(np.ones(1, dtype=np.float32), (offsets(0, 1),)),
            BlockColumn(np.array(EXTREMES), (offsets(3, 2),), np.arange(5, dtype=np.float32)),
            BlockColumn(np.frombuffer(b"abc", dtype=np.uint8), (offsets(2, 0), offsets(1, 2))),
            BlockColumn(np.array([7, 8]), (offsets(1, 1), offsets(0, 1), offsets(2))),
        ],
    )
