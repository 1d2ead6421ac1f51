import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels import pack_columns as module
from recfx.kernels.pack_columns import Block, PackPlan, Segment, count_values, pack_columns, pack_columns_reference
from recfx.types import Batch

DTYPES = {"label": torch.float32, "x": torch.float32, "y": torch.float32, "c": torch.int64}
DEFAULTS = {"label": np.array([7.0, -1.0], dtype=np.float32)}
EXTREMES = [0, -1, 2**63 - 1, -(2**63), 2**53 + 1]


def plan_of(batch_size: int, capacity: int) -> PackPlan:
    return PackPlan.of(batch_size, DTYPES, DEFAULTS, np.full(4, capacity, dtype=np.int64))


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    num_rows = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    fixed = rng.choice([0, 2], num_rows)
    lengths = [fixed, *rng.integers(0, 4, (3, num_rows))]
    numbers = [rng.standard_normal(n.sum()) * 10.0 ** rng.integers(-5, 39) for n in lengths[:3]]
    ids = rng.choice(np.array(EXTREMES), lengths[3].sum())
    return Block.of([numbers[0], numbers[1], numbers[2].astype(np.float32), ids], [offsets_of(n) for n in lengths])


@st.composite
def segments_of(draw: st.DrawFn) -> list[Segment]:
    segments = []
    for block in draw(st.lists(blocks(), min_size=1, max_size=3)):
        begin = draw(st.integers(0, block.num_rows))
        segments.append(Segment(block, begin, draw(st.integers(begin, block.num_rows))))
    return segments


@pytest.mark.filterwarnings("ignore:overflow")
@given(segments=segments_of(), spare_rows=st.integers(0, 20), spare_values=st.integers(0, 20))
@settings(deadline=None, max_examples=150)
def test_kernel_writes_the_very_bytes_of_the_reference(segments, spare_rows, spare_values):
    num_rows = sum(s.end - s.begin for s in segments)
    plan = plan_of(num_rows + spare_rows + 1, int(count_values(segments).max()) + spare_values)
    expected = pack_columns_reference(plan, segments)
    assert torch.equal(pack_columns(plan, segments), expected)


def test_every_byte_is_written(monkeypatch):
    block = Block.of([np.ones(2), np.ones(1), np.ones(0, np.float32), np.ones(3, np.int64)],
                     [offsets_of(n) for n in ([2, 0], [0, 1], [0, 0], [3, 0])])  # fmt: skip
    plan, segments, empty = plan_of(5, 7), [Segment(block, 0, 2)], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(255))
    assert torch.equal(pack_columns(plan, segments), pack_columns_reference(plan, segments))


def test_contents_by_hand():
    block = Block.of(
        [np.array([1.0, 2.0]), np.array([0.5, 1.5, 2.5]), np.array([], np.float32), np.array(EXTREMES)],
        [offsets_of(n) for n in ([0, 2, 0], [1, 0, 2], [0, 0, 0], [2, 3, 0])],
    )
    plan = plan_of(4, 6)
    batch = Batch(pack_columns(plan, [Segment(block, 1, 3), Segment(block, 0, 1)]), plan.layout)
    assert batch["label"].tolist() == [[1, 2], [7, -1], [7, -1], [0, 0]]
    assert batch["x"].values.tolist() == [1.5, 2.5, 0.5, 0, 0, 0]
    assert batch["x"].offsets.tolist() == [0, 0, 2, 3, 3]
    assert batch["y"].offsets.tolist() == [0, 0, 0, 0, 0]
    assert batch["c"].values.tolist() == [*EXTREMES[2:], *EXTREMES[:2], 0]
    assert batch["c"].offsets.tolist() == [0, 3, 3, 5, 5]
    assert batch["num_samples"].dtype == torch.int32
    assert batch["num_samples"].item() == 3


def test_without_a_compiler_the_reference_runs(monkeypatch):
    block = Block.of([np.ones(2), np.ones(1), np.ones(0, np.float32), np.ones(3, np.int64)],
                     [offsets_of(n) for n in ([2, 0], [0, 1], [0, 0], [3, 0])])  # fmt: skip
    plan, segments = plan_of(3, 4), [Segment(block, 0, 2), Segment(block, 1, 2)]
    counts, packed = count_values(segments), pack_columns(plan, segments)
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert count_values(segments).tolist() == counts.tolist() == [2, 2, 0, 3]
    assert torch.equal(pack_columns(plan, segments), packed)


def test_what_does_not_fit_is_an_error():
    block = Block.of([np.ones(2), np.ones(1), np.ones(0, np.float32), np.ones(3, np.int64)],
                     [offsets_of(n) for n in ([2, 0], [0, 1], [0, 0], [3, 0])])  # fmt: skip
    with pytest.raises(ValueError, match="segments: got 2 rows, expected at most 1"):
        pack_columns(plan_of(1, 9), [Segment(block, 0, 2)])
    with pytest.raises(ValueError, match="column 'c': got 3 values, expected at most 2"):
        pack_columns(plan_of(2, 2), [Segment(block, 0, 2)])
