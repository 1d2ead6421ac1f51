"""Clipping against torch.nn.utils.clip_grad_* over leaf tensors, in the optimisers and in the whole step."""

import math
import random

import pytest
import torch

from recfx import optim
from tests.by_definition import by_definition
from tests.conftest import BATCH_SIZE, CAPACITY, FEATURES, NUM_NUMERIC, SMALL_IDS, deepfm_groups, deepfm_params
from tests.conftest import deepfm_step as step_of
from tests.optim.test_optim import DUE, ONE, state_of, touch
from tests.reference import NaiveTrainer, is_close, pack_samples, random_samples

LR = 0.5


def sparse(optimizer, grads, scale):
    """Weights after one in-place step from zero, checked against the pure spellings."""
    state = state_of(len(grads), optimizer=optimizer)
    state.rows[:, 0] = 0
    touch(state, list(range(len(grads))), grads)
    pure = by_definition(optimizer.apply_, state, scale, DUE)[0].rows[: len(grads)]
    update = optimizer.update(state.rows[: len(grads)], grads, state.step, scale)
    after = optimizer.apply_(state, scale, DUE).rows[: len(grads)]
    torch.testing.assert_close(pure, after, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(update, after, rtol=1e-5, atol=1e-7)
    return after[:, 0]


def test_value_and_row_norm_compose_in_the_order_they_are_read():
    grads, scale = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    values = (grads * scale).clamp(-0.7, 0.7)
    norms = values * (0.9 / values.norm(dim=1, keepdim=True)).clamp(max=1)
    sgd = optim.sparse_sgd(LR)
    both = optim.sparse_clip_value(optim.sparse_clip_row_norm(sgd, 0.9), 0.7)
    assert is_close(sparse(optim.sparse_clip_value(sgd, 0.7), grads, scale), -LR * values)
    assert is_close(sparse(both, grads, scale), -LR * norms, rtol=1e-5)
    assert not is_close(norms, values)


def test_dense_value():
    grads, optimizer = {"w": torch.tensor([0.1, -3.0, 0.5])}, optim.clip_value(optim.sgd(LR), 0.6)
    for spelling in (optimizer.update, optimizer.update_):
        params = {"w": torch.zeros(3)}
        _, params = spelling(optimizer.init(params), params, grads, 2 * ONE, DUE)
        assert is_close(params["w"], -LR * torch.tensor([0.2, -0.6, 0.6]))


class Sgd(NaiveTrainer):
    """The oracle with plain gradient descent, after torch's own clipping over every parameter and touched row."""

    max_norm = math.inf

    def train(self, samples):
        touched = set()
        loss, _ = self.loss_of(samples, touched)
        self.optimizer.zero_grad()
        loss.backward()
        leaves = [*self.model.parameters(), *(self.weights[key] for key in touched)]
        self.norm = torch.nn.utils.clip_grad_norm_(leaves, self.max_norm)
        with torch.no_grad():
            for p in leaves:
                p -= self.lr * p.grad
                p.grad = None
        return float(loss.detach())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_global_norm_is_torch_s_over_dense_and_sparse_together(accumulation, max_norm):
    step = step_of(
        sparse_optimizer=optim.sparse_sgd(LR),
        dense_optimizer=optim.sgd(LR),
        clip=optim.clip_global_norm(max_norm),
        accumulation=accumulation,
    )
    state = step.init(deepfm_params())
    oracle = Sgd(deepfm_params(), deepfm_groups(), seed=3, lr=LR)
    oracle.max_norm, rng, clipped = max_norm, random.Random(0), 0
    for i in range(3):
        parts = [
            random_samples(rng, BATCH_SIZE - i, features=FEATURES, num_numeric=NUM_NUMERIC, ids=SMALL_IDS)
            for _ in range(accumulation)
        ]
        for part in parts:
            state, _ = step.update_(state, pack_samples(part, BATCH_SIZE, capacity=CAPACITY))
        oracle.train([s for part in parts for s in part])
        clipped += oracle.norm > max_norm
    assert clipped == (3 if max_norm < 1 else 0)
    for name, p in oracle.model.params().items():
        assert is_close(state.params[name], p.detach(), atol=2e-6), name
    table, (plan,) = state.tables[0], step.plan.tables
    for row in range(int(table.num_rows)):
        for column in plan.vocabularies[int(table.vocabularies[row])]:
            got = table.rows[row, 0, column.first : column.first + column.dim]
            assert is_close(got, oracle.weights[column.name, int(table.ids[row])].detach(), atol=2e-6)


def test_global_norm_of_a_flushed_window():
    clip = optim.clip_global_norm(0.3)
    sgd = {"sparse_optimizer": optim.sparse_sgd(LR), "dense_optimizer": optim.sgd(LR), "clip": clip}
    one, four = step_of(**sgd), step_of(**sgd, accumulation=4)
    samples = random_samples(random.Random(0), 8, features=FEATURES, num_numeric=NUM_NUMERIC, ids=SMALL_IDS)
    batch = pack_samples(samples, BATCH_SIZE, capacity=CAPACITY)
    a, _ = one.update_(one.init(deepfm_params()), batch)
    b, _ = four.update_(four.init(deepfm_params()), batch)
    b = four.flush_(b)
    assert is_close(a.params["numeric_emb"], b.params["numeric_emb"])
    assert is_close(a.tables[0].rows[:, 0], b.tables[0].rows[:, 0])


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda x: optim.clip_value(optim.sgd(LR), x), "limit"),
        (lambda x: optim.sparse_clip_value(optim.sparse_sgd(LR), x), "limit"),
        (lambda x: optim.sparse_clip_row_norm(optim.sparse_sgd(LR), x), "max_norm"),
        (optim.clip_global_norm, "max_norm"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_errors(build, name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected > 0"):
        build(value)
