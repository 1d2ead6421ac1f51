"""What `repr` prints: a few lines for a person, whatever the state is made of, and no key of anything."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from recfx.describe import or_plain
from recfx.step import Step
from recfx.types import Batch, Ragged, pack
from tests.conftest import deepfm_batches, deepfm_step
from tests.loop import fresh


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step(accumulation=2)


def test_a_batch():
    """Its columns without their items."""
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    ids = Ragged(torch.arange(4), offsets)
    nested = Ragged(
        torch.zeros(9, dtype=torch.uint8),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        outer=(torch.tensor([0, 1, 2]).int(),),
    )
    batch = pack(
        {"label": torch.ones(2, 1), "item": ids, "weighted": ids._replace(weights=torch.ones(4)), "text": nested}
        | {"num_samples": torch.tensor(1, dtype=torch.int32)}
    )
    assert repr(batch).splitlines() == [
        "Batch(1 of 2 samples, 640 bytes on cpu)",
        "    item: lists of i64, room for 4",
        "    weighted: lists of i64, room for 4, weighted",
        "    label: f32 [2, 1]",
        "    text: lists of u8, room for 9, 2 deep",
    ]


def test_a_batch_of_many_columns():
    lines = repr(pack({f"c{i}": torch.ones(2, 1) for i in range(41)})).splitlines()
    assert len(lines) == 14
    assert lines[-2:] == ["    c11: f32 [2, 1]", "    and 29 more"]


def test_a_step(step):
    """What it is made of, and no address."""
    assert repr(step).splitlines() == [
        "Step(accumulation 2, seed 3, fp32, stop on NaN, rows keep m and v)",
        "    table 0: 3 vocabularies of width 4 + 1 on cpu, read by a, b, c",
        "    group 'emb': 3 embeddings",
        "    group 'bias': 3 embeddings",
    ]


def test_a_state(step):
    state = fresh(step)
    for batch in deepfm_batches(3):
        state, _ = step.update_(state, batch)
    rows = int(state.tables[0].num_rows)
    assert repr(state).splitlines() == [
        "TrainState(step 1, 219 parameters in 8 tensors, 876 bytes on cpu)",
        f"    table 0: {rows} of 512 rows, each f32 [3, 5], on cpu, index of 1,024 slots",
        "    window: open, batches in it: 1",
    ]
    assert repr(state.tables[0]) == f"TableState({rows} of 512 rows, each f32 [3, 5], on cpu, index of 1,024 slots)"


@pytest.mark.parametrize(
    "becomes", [lambda t: None, lambda t: t.shape, lambda t: t.to("meta"), lambda t: t[None], lambda t: object()]
)
def test_it_never_raises(step, becomes):
    """A tree of something else is printed as a tuple is, and what cannot be read is a question mark."""
    state, batch = fresh(step), deepfm_batches(1)[0]
    assert repr(tree_map(becomes, state)).startswith("TrainState(")
    assert repr(dataclasses.replace(step, plan=becomes(torch.zeros(1)))).startswith("Step(init=")
    assert repr(Batch(batch.buffer.to("meta"), batch.layout)).startswith("Batch(? of 8 samples")
    assert or_plain(lambda value: 1 / 0)(batch) == "Batch()"


def test_fake_and_vmapped_tensors(step):
    """A feature function or a model may print what it is given while it is traced."""
    state, mode = fresh(step), FakeTensorMode()
    with mode:
        assert repr(tree_map(mode.from_tensor, state)).startswith("TrainState(step ?, 219 parameters")
    printed = []

    def one(count: Tensor) -> Tensor:
        printed.append(repr(state._replace(step=count)))
        return count

    torch.func.vmap(one)(torch.zeros(2))
    assert printed[0].startswith("TrainState(step ?, ")
