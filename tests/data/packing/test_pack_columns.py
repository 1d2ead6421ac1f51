"""The packing kernel against its definition and against batches built sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.data.packing import pack_columns as module
from recfx.data.packing.pack_columns import PackPlan, Segment, count_items, pack_columns, pack_columns_reference
from recfx.types import Batch
from tests.kernels.blocks import COLUMNS, EXTREMES, nested, nested_of, plan_for, segments_of, simple_block


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
    monkeypatch.setattr(module, "library", lambda: None)
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
