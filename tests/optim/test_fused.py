"""The sum of row gradients and the sparse optimiser in one operator, as a step on a GPU has it; here on a CPU."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx import optim
from recfx.capture import trace
from recfx.capture.recorded import untouched
from recfx.embeddings import Embedding
from recfx.kernels.rows.add_row_grads import add_row_grads_atomic_
from recfx.step import update as update_module
from recfx.table.policies import Life
from recfx.types import Batch
from tests.conftest import FEATURES, deepfm_batches, deepfm_groups, deepfm_step
from tests.step.test_step import COMBINED, assert_same_state, fresh, train_against_oracle

ADAMW = optim.sparse_adamw(1e-2)


@pytest.fixture(autouse=True)
def _fused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(update_module, "FUSED_ON", ("cpu",))


def operators(**kwargs) -> set[str]:
    step = deepfm_step(**kwargs)
    graph = trace(step.in_graph_, fresh(step), deepfm_batches(1)[0]).graph
    return {str(n.target) for n in graph.nodes if "recfx" in str(n.target)}


def train(monkeypatch, fused_on, **kwargs):
    monkeypatch.setattr(update_module, "FUSED_ON", fused_on)
    step = deepfm_step(**kwargs)
    state = fresh(step)
    for number, batch in enumerate(deepfm_batches(30, short_last=True), 1):
        state, _ = step.update_(state, batch)
        for table in state.tables:
            assert not table.grads.any()
            assert int(table.num_unique) == 0
            assert int(table.step) == number
    return state


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"embeddings": deepfm_groups(read_only=True)},
        {"max_unique": 5},
        {"max_rows": 6},
        {"life": Life()},
        {"sparse_optimizer": optim.sparse_adamw_recis(1e-2)},
        {"sparse_optimizer": optim.sparse_adam(lambda t: 1e-2 / (1 + t))},
    ],
    ids=lambda kwargs: next(iter(kwargs), "plain"),
)
def test_a_fused_step_has_the_bytes_of_two_operators(kwargs, monkeypatch):
    a, b = (train(monkeypatch, on, **kwargs) for on in (("cpu",), ()))
    assert_same_state(a, b, exact=True)


def test_a_fused_step_is_a_plain_module_with_adamw_per_row():
    train_against_oracle(deepfm_step(embeddings=COMBINED), COMBINED, (*FEATURES, "d"))


def test_it_is_one_operator():
    got = operators()
    assert "recfx.sum_adamw_rows_.default" in got
    assert not {"recfx.add_row_grads_.default", "recfx.adamw_rows_.default"} & got


def test_the_empty_batch_of_a_recording_reaches_no_row():
    """`recfx.capture.recorded` records on it, with `num_batches` at -1: not due, whatever the accumulation."""
    step, batches = deepfm_step(), deepfm_batches(4)
    state = fresh(step)
    for batch in batches:
        state, _ = step.update_(state, batch)
    before = [t.clone() for t in tree_leaves(state.tables)]
    with untouched(state):
        step.update_(state, Batch(torch.zeros_like(batches[0].buffer), batches[0].layout))
        written = {id(s.counters) for s in state.tables}  # the fused kernel counts a step, whether it is due or not
        pairs = zip(before, tree_leaves(state.tables), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if id(b) not in written)
    assert all(torch.equal(a, b) for a, b in zip(before, tree_leaves(state.tables), strict=True))


def replaced(state, scale, due, columns, most_rows):
    return ADAMW.apply_(state, scale, due, columns, most_rows)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulation": 2},
        {"clip": optim.clip_global_norm(1.0)},
        {"sparse_optimizer": optim.sparse_clip_value(ADAMW, 0.1)},
        {"sparse_optimizer": optim.sparse_clip_row_norm(ADAMW, 0.1)},
        {"sparse_optimizer": ADAMW._replace(apply_=replaced)},
        {"sparse_optimizer": optim.sparse_adagrad(1e-2)},
        {"sum_row_grads": add_row_grads_atomic_},
        {
            "embeddings": {
                "emb": deepfm_groups()["emb"],
                "bias": [Embedding(f, dim=1, lr_scale=2.0) for f in FEATURES],
            }
        },
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_not_where_something_comes_between_or_the_optimiser_is_another(kwargs):
    got = operators(**kwargs)
    assert "recfx.sum_adamw_rows_.default" not in got
    assert any("add_row_grads" in name for name in got)


def test_the_pure_step_agrees():
    step, batches = deepfm_step(), deepfm_batches(6)
    a, b = fresh(step), fresh(step)
    for batch in batches:
        a, _ = step.update(a, batch)
        b, _ = step.update_(b, batch)
    assert_same_state(a, b)


def test_sums_in_any_order_on_request():
    step = deepfm_step(sum_row_grads=add_row_grads_atomic_)
    assert "recfx.add_row_grads_atomic_.default" in operators(sum_row_grads=add_row_grads_atomic_)
    a, b = fresh(step), fresh(step)
    for batch in deepfm_batches(6):
        a, _ = step.update(a, batch)
        b, _ = step.update_(b, batch)
    assert_same_state(a, b)
    assert torch.equal(a.tables[0].num_rows, b.tables[0].num_rows)
