"""Records against their definition, and batches of records against batches of the same rows in columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.data.packing import pack_records as module
from recfx.data.packing.pack_columns import (
    Block,
    BlockColumn,
    PackedColumn,
    PackPlan,
    Segment,
    count_items,
    pack_columns_reference,
)
from recfx.data.packing.pack_records import Records, pack_records, write_records, write_records_reference
from tests.kernels.blocks import COLUMNS, blocks, plan_for, simple_block

PLAN = PackPlan.of(1, COLUMNS)


def records_of(block: Block) -> Records:
    starts, records = write_records(PLAN, block)
    return Records(records.ctypes.data + starts[:-1], len(records) // max(block.num_rows, 1), records)


def in_order(segments: list[Segment]) -> list[Segment]:
    return [Segment(records_of(s.block), s.begin, s.end) for s in segments]


@given(block=blocks())
@settings(deadline=None, max_examples=100)
def test_records_are_the_very_bytes_of_the_reference(block):
    (starts, records), (starts_by_definition, by_definition) = (
        f(PLAN, block) for f in (write_records, write_records_reference)
    )
    assert starts.tolist() == starts_by_definition.tolist()
    assert records.tobytes() == by_definition.tobytes()


@pytest.mark.parametrize("kinds", [[torch.int64], [torch.float32], [torch.int64, torch.float32], [torch.int64] * 3])
def test_many_rows_of_few_columns(kinds):
    """Rows are written in pieces, and an item more than there is may fall on the next record's first bytes."""
    rng, num_rows = np.random.default_rng(0), 600
    columns, sources = [], []
    for i, kind in enumerate(kinds):
        offsets = np.append(0, rng.integers(0, 3, num_rows).cumsum()).astype(np.int32)
        values = rng.integers(1, 100, offsets[-1]).astype(np.int64 if kind == torch.int64 else np.float32)
        columns.append(PackedColumn(f"c{i}", kind))
        sources.append(BlockColumn(values, (offsets,)))
    plan, block = PackPlan.of(1, columns), Block.of(num_rows, sources)
    written, by_definition = write_records(plan, block), write_records_reference(plan, block)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(written, by_definition, strict=True))


@given(
    given_blocks=st.lists(blocks(), min_size=1, max_size=3),
    data=st.data(),
    spare_rows=st.integers(0, 9),
    spare_items=st.integers(0, 9),
)
@settings(deadline=None, max_examples=150)
def test_a_batch_of_records_is_that_of_the_same_rows_in_columns(given_blocks, data, spare_rows, spare_items):
    """Any rows, in any order, some of them twice."""
    all_rows = [(b, row) for b, block in enumerate(given_blocks) for row in range(block.num_rows)]
    rows = data.draw(st.lists(st.sampled_from(all_rows), max_size=12) if all_rows else st.just([]))
    records = [records_of(block) for block in given_blocks]
    addresses = np.array([records[b].addresses[row] for b, row in rows], dtype=np.int64)
    cut = data.draw(st.integers(0, len(rows)))
    mixed = Records(addresses, 64, records)
    segments = [Segment(given_blocks[b], row, row + 1) for b, row in rows] or [Segment(given_blocks[0], 0, 0)]
    plan = plan_for(segments, spare_rows, spare_items)
    buffer, counts = pack_records(plan, [Segment(mixed, 0, cut), Segment(mixed, cut, len(rows))])
    assert counts.tolist() == count_items(plan, segments).tolist()
    assert torch.equal(buffer, pack_columns_reference(plan, segments))


def test_every_byte_is_written(monkeypatch):
    segments, empty = [Segment(simple_block(), 0, 2)], torch.empty
    plan = plan_for(segments, 3, 4)
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(255))
    assert torch.equal(pack_records(plan, in_order(segments))[0], pack_columns_reference(plan, segments))


def test_without_room_the_items_are_counted_and_nothing_else_is_touched(monkeypatch):
    segments = [Segment(simple_block(), 0, 2)]
    counts = count_items(PLAN, segments)
    guard, empty = 64, torch.empty
    whole: list[torch.Tensor] = []

    def guarded(size: int, **how) -> torch.Tensor:
        whole.append(empty(size + 2 * guard, **how).fill_(255))
        return whole[-1][guard : guard + size]

    monkeypatch.setattr(torch, "empty", guarded)
    for capacities in (counts - 1, counts // 2, counts * 0, *(counts - row for row in np.eye(len(counts), dtype=int))):
        plan = PackPlan.of(2, COLUMNS, capacities)
        assert pack_records(plan, in_order(segments))[1].tolist() == counts.tolist()
        assert whole[-1][:guard].eq(255).all()
        assert whole[-1][-guard:].eq(255).all()


def test_more_rows_than_a_batch_are_an_error():
    with pytest.raises(ValueError, match="segments: got 2 rows, expected at most 1"):
        pack_records(PLAN, in_order([Segment(simple_block(), 0, 2)]))


def test_without_a_compiler_the_reference_runs(monkeypatch):
    segments = [Segment(simple_block(), 0, 2), Segment(simple_block(), 1, 2)]
    plan = plan_for(segments, 1, 1)
    buffer, counts = pack_records(plan, in_order(segments))
    monkeypatch.setattr(module, "library", lambda: None)
    again, counts_again = pack_records(plan, in_order(segments))
    assert torch.equal(buffer, again)
    assert counts.tolist() == counts_again.tolist()
    assert pack_records(PackPlan.of(3, COLUMNS, counts - 1), in_order(segments))[1].tolist() == counts.tolist()
