"""The packing kernel against its definition and against batches built sample by sample."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels import pack_columns as module
from recfx.kernels.pack_columns import (
    Block,
    BlockColumn,
    PackedColumn,
    PackPlan,
    Segment,
    count_items,
    pack_columns,
    pack_columns_reference,
)
from recfx.types import Batch, Ragged

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


@given(segments=segments_of(), spare_rows=st.integers(1, 20), spare_items=st.integers(0, 20))
@settings(deadline=None, max_examples=100)
def test_kernel_writes_the_very_bytes_of_the_reference(segments, spare_rows, spare_items):
    plan = plan_for(segments, spare_rows, spare_items)
    assert torch.equal(pack_columns(plan, segments), pack_columns_reference(plan, segments))


@given(segments=segments_of(), spare_rows=st.integers(1, 3), spare_items=st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_lists_of_a_batch_are_those_of_its_rows(segments, spare_rows, spare_items):
    plan = plan_for(segments, spare_rows, spare_items)
    batch = Batch(pack_columns(plan, segments), plan.layout)
    for i, column in enumerate(COLUMNS):
        if column.num_levels == 0:
            rows: list[Any] = [
                s.block.columns[i].values.reshape(-1, 2)[r].tolist() for s in segments for r in range(s.begin, s.end)
            ]
            assert batch[column.name].tolist() == rows + [[0, 0]] * spare_rows
        else:
            rows = [row for s in segments for row in nested(s.block.columns[i], s.begin, s.end)]
            assert nested_of(batch[column.name]) == rows + [[]] * spare_rows
    assert batch["num_samples"].item() == sum(s.end - s.begin for s in segments)


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


def test_every_byte_is_written(monkeypatch):
    segments, empty = [Segment(simple_block(), 0, 2)], torch.empty
    plan = plan_for(segments, 3, 4)
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(255))
    assert torch.equal(pack_columns(plan, segments), pack_columns_reference(plan, segments))


def test_contents_by_hand():
    segments = [Segment(simple_block(), 1, 2), Segment(simple_block(), 0, 1)]
    plan = plan_for(segments, 1, 1)
    batch = Batch(pack_columns(plan, segments), plan.layout)
    assert batch["label"].tolist() == [[2, 3], [0, 1], [0, 0]]
    assert batch["c"].values.tolist() == [*EXTREMES[3:], *EXTREMES[:3], 0]
    assert batch["c"].offsets.tolist() == [0, 2, 5, 5]
    assert batch["c"].weights.tolist() == [3, 4, 0, 1, 2, 0]
    assert bytes(batch["words"].values) == b"abc\0"
    assert batch["words"].outer[0].tolist() == [0, 0, 2, 2]
    assert batch["words"].offsets.tolist() == [0, 1, 3, 3]
    assert nested_of(batch["deep"]) == [[[[7, 8]]], [[]], []]
    assert batch["num_samples"].dtype == torch.int32


def test_without_a_compiler_the_reference_runs(monkeypatch):
    segments = [Segment(simple_block(), 0, 2), Segment(simple_block(), 1, 2)]
    plan = plan_for(segments, 1, 1)
    counts, packed = count_items(plan, segments), pack_columns(plan, segments)
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert count_items(plan, segments).tolist() == counts.tolist() == [2, 7, 2, 3, 3, 2, 4]
    assert torch.equal(pack_columns(plan, segments), packed)


def test_what_does_not_fit_is_an_error():
    segments = [Segment(simple_block(), 0, 2)]
    counts = count_items(PackPlan.of(1, COLUMNS), segments)
    with pytest.raises(ValueError, match="segments: got 2 rows, expected at most 1"):
        pack_columns(PackPlan.of(1, COLUMNS, counts), segments)
    for level, name in enumerate(["x", "c", "words", "words", "deep", "deep", "deep"]):
        capacities = counts - (np.arange(len(counts)) == level)
        with pytest.raises(ValueError, match=f"column '{name}': got {counts[level]} items, expected at most"):
            pack_columns(PackPlan.of(2, COLUMNS, capacities), segments)
