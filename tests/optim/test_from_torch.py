"""A user's own formula as a sparse optimiser: equal to the kernels', in every form of step, and captured."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from recfx import checkpoint, optim, rows
from recfx.capture import capture
from recfx.capture import trace as trace_step
from recfx.embeddings import Embedding
from recfx.optim import from_torch, schedules
from recfx.table import RowLayout, policies
from recfx.table.policies import Life
from recfx.types import Batch, pack
from tests.capture.test_capture import largest_allocation
from tests.checkpoint.test_checkpoint import digests
from tests.conftest import deepfm_batches, deepfm_groups, deepfm_step
from tests.loop import Log, MemoryReader, fresh, go, interrupt
from tests.optim.test_optim import DUE, NOT_DUE, ONE, state_of, touch
from tests.step.test_step import assert_same_state

NUM_STEPS = 13
BIG = 2**21  # reserved rows: a table of 126 MB next to a few KB of activations


def adamw(w, m, v, g, lr, decay, t):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return (1 - lr * decay) * w - lr * m_hat / (v_hat.sqrt() + 1e-8), m, v


def in_place(w, m, v, g, lr, decay, t):
    """As torch's own optimisers are written."""
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    w.mul_(1 - lr * decay).sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return w, m, v


def sgd(w, g, lr, decay, t):
    return w - lr * (g + decay * w)


def rowwise_adagrad(w, sum, g, lr, decay, t):
    g = g + decay * w
    sum = sum + g.square().mean(dim=1, keepdim=True)
    return w - lr * g / (sum.sqrt() + 1e-8), sum


def momentum(w, m, norm, g, lr, decay, t):
    """A slot and a row slot: the step is divided by the largest norm that the row's gradient has had."""
    m = 0.9 * m + g
    norm = torch.maximum(norm, g.norm(dim=1, keepdim=True))
    return w - lr * m / (norm + 1e-3), m, norm


def mine(lr: Any = 1e-2, formula: Any = adamw, weight_decay: float = 0.01) -> optim.SparseOptimizer:
    return optim.sparse_optimizer(formula, lr, slots=["m", "v"], weight_decay=weight_decay)


def momentum_of(lr: float = 1e-2) -> optim.SparseOptimizer:
    return optim.sparse_optimizer(momentum, lr, slots=["m"], row_slots=["norm"])


def with_rates() -> dict[str, list[Embedding]]:
    """Every table with other rates, `bias/c` frozen, the two of a feature side by side in one row."""
    groups, factors = deepfm_groups(), iter([0.5, 2.0, 1.0, 1.0, 0.25, 0.0])
    groups = {name: [dataclasses.replace(e, lr_scale=next(factors)) for e in es] for name, es in groups.items()}
    groups["emb"][0] = dataclasses.replace(groups["emb"][0], weight_decay=0.3)
    groups["bias"][2] = dataclasses.replace(groups["bias"][2], lr_scale=1.0, frozen=True)
    return groups


def trained(optimizer: optim.SparseOptimizer, batches: list[Batch] | None = None, **kwargs: Any) -> Any:
    step = deepfm_step(sparse_optimizer=optimizer, **kwargs)
    state = fresh(step)
    for number, batch in enumerate(deepfm_batches(NUM_STEPS, short_last=True) if batches is None else batches, 1):
        state, _ = step.update_(state, batch)
        if number % step.accumulation == 0:
            state = step.sweep_(state, number // step.accumulation)
    return step.flush_(state)


def with_nan(place: int) -> list[Batch]:
    batches = deepfm_batches(NUM_STEPS)
    columns = {**batches[place]}
    batches[place] = pack({**columns, "numeric": torch.full_like(columns["numeric"], math.nan)})
    return batches


LIFE = Life(admit=policies.at_least(2), candidates=300, expire=policies.unseen_for(4), every=3)
EVICTING = Life(score=policies.least_frequently_used, keep=8, every=3, at_cap="evict")
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refused ids": {"max_rows": 6},
    "fewer unique rows than ids": {"max_unique": 5},
    "accumulation": {"accumulation": 4, "max_unique": 100},
    "refusals in a window": {"accumulation": 4, "max_unique": 7},
    "life": {"life": LIFE},
    "life in a window": {"life": EVICTING, "max_rows": 16, "accumulation": 2, "max_unique": 12},
    "read-only": {"embeddings": deepfm_groups(read_only=True)},
    "global norm": {"clip": optim.clip_global_norm(0.1)},
    "skip": {"on_nonfinite": "skip"},
    "skip in a window": {"on_nonfinite": "skip", "accumulation": 3, "max_unique": 64},
    "ignore": {"on_nonfinite": "ignore"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors: a second thread would only be waited for."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", STEPS)
def test_a_formula_of_adamw_is_sparse_adamw(name):
    assert_same_state(trained(optim.sparse_adamw(1e-2), **STEPS[name]), trained(mine(), **STEPS[name]))


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.02), schedules.warm_up(schedules.cosine(0.05, 25), 4)], ids=["tensor", "schedule"]
)
def test_learning_rates_that_are_not_numbers(lr):
    assert_same_state(trained(optim.sparse_adamw(lr)), trained(mine(lr)))


def test_a_formula_may_write_into_what_it_is_given():
    assert_same_state(
        trained(mine(), **STEPS["accumulation"]), trained(mine(formula=in_place), **STEPS["accumulation"])
    )


@pytest.mark.parametrize(
    "wrap", [lambda o: optim.sparse_clip_value(o, 1e-2), lambda o: optim.sparse_clip_row_norm(o, 1e-2)]
)
def test_clipping_wraps_it(wrap):
    clipped = trained(wrap(mine()))
    assert_same_state(trained(wrap(optim.sparse_adamw(1e-2))), clipped)
    assert not torch.allclose(clipped.tables[0].rows, trained(mine()).tables[0].rows)


@pytest.mark.parametrize("mode", ["skip", "stop"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_batch_with_nan(mode, accumulation):
    options = {"on_nonfinite": mode, "accumulation": accumulation, "max_unique": 100}
    a, b = (trained(o, with_nan(7), **options) for o in (optim.sparse_adamw(1e-2), mine()))
    assert [int(n) for n in a.nonfinite] == [int(n) for n in b.nonfinite]
    assert int(a.nonfinite.first_step) == 8 if accumulation == 1 else 3
    if mode == "skip":
        assert_same_state(a, b)


def test_rates_of_each_table():
    a, b = (trained(o, embeddings=with_rates()) for o in (optim.sparse_adamw(1e-2), mine()))
    assert_same_state(a, b)
    assert not torch.allclose(a.tables[0].rows, trained(mine()).tables[0].rows)


def test_rows_of_a_frozen_table_keep_their_values():
    """Whatever the formula makes of them: this one moves weights without a learning rate."""
    own = optim.sparse_optimizer(lambda w, m, g, lr, decay, t: (w + 1, m + 1), 0.1, slots=["m"])
    ids = torch.tensor([2, 3, 4, 5])
    read = {}
    for name, optimizer in {"moved": own, "still": optim.sparse_sgd(0.0)}.items():
        step = deepfm_step(embeddings=with_rates(), sparse_optimizer=optimizer)
        state = trained(optimizer, deepfm_batches(3), embeddings=with_rates())
        read[name] = [rows.read(step, state, table, ids) for table in ("bias/c", "bias/a")]
    (frozen, other), (frozen_before, other_before) = read["moved"], read["still"]
    assert frozen.known.any()
    assert other.known.any()
    assert torch.equal(frozen.weight, frozen_before.weight)
    assert not frozen.slots["m"].any()
    assert (other.weight > other_before.weight + 0.9)[other.known].all()
    assert (other.slots["m"] >= 1)[other.known].all()


@pytest.mark.parametrize("groups", [deepfm_groups, with_rates])
def test_a_row_slot_is_one_value_for_each_row_and_table(groups):
    own = optim.sparse_optimizer(rowwise_adagrad, 0.1, row_slots=["sum"], weight_decay=0.02)
    theirs = optim.sparse_rowwise_adagrad(0.1, weight_decay=0.02)
    assert_same_state(trained(theirs, embeddings=groups()), trained(own, embeddings=groups()))


def test_slots_and_row_slots_together_against_a_loop():
    """Two logical tables side by side, each with its own norm."""
    optimizer, g = momentum_of(0.1), torch.Generator().manual_seed(0)
    state = state_of(6, optimizer=optimizer, dims=(3, 2))
    expected = {
        (row, k): [state.rows[row, 0, c].clone(), torch.zeros(c.stop - c.start), torch.zeros(1)]
        for row in range(6)
        for k, c in enumerate((slice(0, 3), slice(3, 5)))
    }
    for touched in ([4, 1, 2], [1], [5, 4, 0, 1]):
        grads = torch.randn(len(touched), 5, generator=g)
        touch(state, touched, grads)
        state = optimizer.apply_(state, 0.5 * ONE, DUE, RowLayout((3, 2), None), 5)
        for row, grad in zip(touched, grads, strict=True):
            for k, part in enumerate(grad.split([3, 2])):
                old = [x[None] for x in expected[row, k]]
                expected[row, k] = [x[0] for x in momentum(*old, 0.5 * part[None], 0.1, 0.0, None)]
    for (row, k), (w, m, norm) in expected.items():
        c = slice(0, 3) if k == 0 else slice(3, 5)
        torch.testing.assert_close(state.rows[row, 0, c], w)
        torch.testing.assert_close(state.rows[row, 1, c], m)
        torch.testing.assert_close(state.rows[row, 0, 5 + k, None], norm)


def junk(w, m, v, g, lr, decay, t):
    return w + 1, m + 2, v + 3


@pytest.mark.parametrize("most", [None, 1, 3, 64, 1000])
@pytest.mark.parametrize("due", [DUE, NOT_DUE])
@pytest.mark.parametrize("num", [0, 1])
def test_other_rows_keep_their_bytes(most, due, num):
    """Row 2 alone is touched, or none; numbers of rows that earlier steps have left are not looked at."""
    optimizer, state = mine(formula=junk), state_of(20)
    state.rows[:20].uniform_(generator=torch.Generator().manual_seed(0))
    touch(state, [2, 7, 9, 7], torch.ones(4, 4))
    state.grads[num:] = 0
    state.num_unique.fill_(num)
    before = [t.clone() for t in tree_leaves(state)]
    old = state.rows.clone()
    state = optimizer.apply_(state, ONE, due, None, most)
    if due:
        old[2] += torch.tensor([1.0, 2.0, 3.0])[:, None] * num
        assert int(state.num_unique) == 0
        assert not state.grads.any()
        assert int(state.step) == 1
        assert torch.equal(state.rows, old)
    else:
        assert all(torch.equal(a, b) for a, b in zip(before, tree_leaves(state), strict=True))


def test_update_is_apply_on_a_block_of_rows():
    optimizer = mine()
    state, grads = state_of(6), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    touch(state, [3, 0, 5, 1], grads)
    new = optimizer.update(state.rows[[3, 0, 5, 1]], grads, state.step, 2 * ONE)
    state = optimizer.apply_(state, 2 * ONE, DUE)
    assert torch.equal(state.rows[[3, 0, 5, 1]], new)


@pytest.mark.parametrize("name", ["plain", "fewer unique rows than ids", "refusals in a window"])
def test_the_pure_step_is_update_(name):
    step = deepfm_step(sparse_optimizer=mine(), **STEPS[name])
    a, b = fresh(step), fresh(step)
    for batch in deepfm_batches(6, short_last=True):
        a, _ = step.update(a, batch)
        b, _ = step.update_(b, batch)
        assert_same_state(a, b)


# Faults planted: what these tests would see.


def no_mask(state: Any, due: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Every place is taken for a row of the step."""
    return torch.ones(num, dtype=torch.bool), state.unique_rows[:num].long()


def never_waits(state: Any, due: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Micro-batches within a window are taken for its last one."""
    in_use = torch.arange(num) < state.num_unique
    return in_use, torch.where(in_use, state.unique_rows[:num], state.unique_rows[:1]).long()


@pytest.mark.parametrize(
    ("fault", "name"), [(no_mask, "plain"), (no_mask, "refused ids"), (never_waits, "accumulation")]
)
def test_a_mask_that_is_dropped_is_seen(fault, name, monkeypatch):
    monkeypatch.setattr(from_torch, "_places", fault)
    with pytest.raises(AssertionError):
        test_a_formula_of_adamw_is_sparse_adamw(name)


def test_without_a_mask_other_rows_move(monkeypatch):
    monkeypatch.setattr(from_torch, "_places", no_mask)
    with pytest.raises(AssertionError):
        test_other_rows_keep_their_bytes(64, DUE, 1)


# Captured, saved and resumed.


@pytest.mark.parametrize("name", ["plain", "refused ids", "accumulation", "skip", "life"])
def test_captured(name):
    step = deepfm_step(sparse_optimizer=mine(), **STEPS[name])
    state, batches = fresh(step), deepfm_batches(NUM_STEPS, short_last=True)
    run = capture(step, state, batches[0], backend="eager")
    for number, batch in enumerate(batches, 1):
        state, _ = run(state, batch)
        state = step.sweep_(state, number)
    assert_same_state(trained(mine(), **STEPS[name]), step.flush_(state))


def everything(max_rows: int = 512) -> Any:
    lr = schedules.warm_up(schedules.cosine(0.05, 25), 4)
    optimizer = optim.sparse_optimizer(momentum, lr, slots=["m"], row_slots=["norm"], weight_decay=0.01)
    return deepfm_step(
        sparse_optimizer=optim.sparse_clip_row_norm(optimizer, 0.02), embeddings=with_rates(), max_rows=max_rows
    )


@pytest.fixture(scope="module")
def compiled() -> Any:
    step = everything(BIG)
    return step, capture(step, fresh(step), deepfm_batches(1)[0])


def test_compiled_once_for_all_steps_and_without_a_temporary_as_large_as_a_table(compiled):
    step, run = compiled
    a, b, batches = fresh(step), fresh(step), deepfm_batches(NUM_STEPS, short_last=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            a, _ = run(a, batch)
            b, _ = step.update_(b, batch)
    assert_same_state(a, b)
    again = fresh(step)
    for batch in batches:
        again, _ = run(again, batch)
    num_rows = int(a.tables[0].num_rows)
    assert torch.equal(a.tables[0].rows[:num_rows], again.tables[0].rows[:num_rows])
    assert a.tables[0].rows.nbytes > 2**26
    assert largest_allocation(lambda: [run(again, batch) for batch in batches[:3]]) < 2**20


def test_the_graph_reads_nothing_back():
    graph = trace_step(everything().in_graph_, fresh(everything()), deepfm_batches(1)[0]).graph
    operators = {str(n.target) for n in graph.nodes if n.op == "call_function"}
    assert any("index_put" in name for name in operators)
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in operators)


@pytest.mark.parametrize("how", ["train_steps", "interrupt"])
def test_saved_and_resumed_has_the_same_bytes(tmp_path, how):
    def run(folder: Path, **config: Any) -> Path:
        reader = MemoryReader(deepfm_batches(9, seed=5))
        go(tmp_path / folder, reader, make=lambda accumulation: everything(), resume=True, save_steps=4, **config)
        return checkpoint.latest(tmp_path / folder)

    whole = run("whole")
    stop = {"train_steps": 5} if how == "train_steps" else {"listener": Log(("after_step", 5), interrupt)}
    run("parts", **stop)
    parts = run("parts")
    assert digests(parts) == digests(whole)
    assert json.loads((parts / "manifest.json").read_text())["slots"] == ["m", "norm"]


# Errors.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: optim.sparse_optimizer(adamw, 0.1, slots=["m"]),
            TypeError,
            r"formula: got the function adamw that takes .*, expected a function \(w, m, g, lr, decay, t\) -> \(w, m\)",
        ),
        (lambda: optim.sparse_optimizer(None, 0.1), TypeError, r"formula: got None, expected a function \(w, g, lr"),
        (lambda: optim.sparse_optimizer(sgd, -1.0), ValueError, r"lr: got -1.0, expected 0 <= lr"),
        (lambda: optim.sparse_optimizer(sgd, 1.0, weight_decay=-1), ValueError, r"weight_decay: got -1, expected 0 <="),
        (lambda: optim.sparse_optimizer(sgd, 1.0, slots="m"), TypeError, r"slots: got 'm', expected list or tuple"),
        (lambda: optim.sparse_optimizer(sgd, 1.0, slots=[1]), TypeError, r"slots: got 1, expected str"),
        (lambda: optim.sparse_optimizer(sgd, 1.0, slots=["a b"]), ValueError, r"slots: got 'a b', expected a name"),
        (lambda: optim.sparse_optimizer(sgd, 1.0, row_slots=["weight"]), ValueError, r"row_slots: got 'weight', exp"),
        (
            lambda: optim.sparse_optimizer(adamw, 1.0, slots=["m"], row_slots=["m"]),
            ValueError,
            r"slots, row_slots: got \['m', 'm'\], expected different names",
        ),
        (
            lambda: deepfm_step(sparse_optimizer=mine(), accumulation=2),
            ValueError,
            r"max_unique: got None, expected a number with accumulation 2 and an optimiser from",
        ),
        (
            lambda: deepfm_step(sparse_optimizer=optim.sparse_clip_value(mine(), 1.0), accumulation=2),
            ValueError,
            r"max_unique: got None",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("formula", "error", "message"),
    [
        (lambda w, m, g, *_: w, ValueError, r"formula: got .*Tensor .* returned, expected \(w, m\)\. Return the new"),
        (lambda w, m, g, *_: (w, 0.0), TypeError, r"formula: got m 0.0 returned, expected \(w, m\) as tensors"),
        (
            lambda w, m, g, *_: (w.double(), m),
            ValueError,
            r"formula: got w torch.float64 \[\d+, 4\] returned, expected torch.float32 \[\d+, 4\]",
        ),
        (
            lambda w, m, g, *_: (w.to("meta"), m),
            ValueError,
            r"got w torch.strided on meta returned, exp.* on cpu",
        ),
        (
            lambda w, m, g, *_: (w, m.to_sparse()),
            ValueError,
            r"got m torch.sparse_coo on cpu returned, expected",
        ),
        (lambda w, m, g, *_: (w, m.mean()), ValueError, r"formula: got m torch.float32 \[\] returned, expected"),
    ],
)
def test_errors_when_traced(formula, error, message):
    step = deepfm_step(sparse_optimizer=optim.sparse_optimizer(formula, 0.1, slots=["m"]))
    state, batch = fresh(step), deepfm_batches(1)[0]
    with pytest.raises(error, match=message):
        step.update_(state, batch)
    with pytest.raises(error, match=message):
        capture(step, fresh(step), batch, backend="eager")
