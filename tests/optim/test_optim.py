"""Closed-form numbers, torch.optim.AdamW, and what must not move."""

import inspect
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx import optim
from recfx.optim.schedules import piecewise
from recfx.table import Limits, RowLayout, TableState, copy_of, table
from tests.by_definition import by_definition
from tests.reference import features_of, table_plan

ONE, DUE, NOT_DUE = torch.tensor(1.0), torch.tensor(True), torch.tensor(False)
ADAM_FAMILY = {
    "adamw": optim.sparse_adamw,
    "recis": optim.sparse_adamw_recis,
    "tf": optim.sparse_adamw_tf,
    "adam": optim.sparse_adam,
    "adam recis": optim.sparse_adam_recis,
}
DENSE_ADAM_FAMILY = {
    "adamw": optim.adamw,
    "recis": optim.adamw_recis,
    "tf": optim.adamw_tf,
    "adam": optim.adam,
    "adam recis": optim.adam_recis,
}
WITHOUT_DECAY = ("adam", "adam recis")
TORCH_S = ("adamw", "adam")  # the others have eps outside the bias correction
SPARSE = {
    **ADAM_FAMILY,
    "sgd": optim.sparse_sgd,
    "adagrad": optim.sparse_adagrad,
    "rowwise adagrad": optim.sparse_rowwise_adagrad,
    "ftrl": optim.sparse_ftrl,
}
DENSE = {**DENSE_ADAM_FAMILY, "sgd": optim.sgd, "adagrad": optim.adagrad}


def state_of(
    num_rows: int, *, step: int = 0, optimizer: optim.SparseOptimizer | None = None, dims: tuple[int, ...] = (4,)
) -> TableState:
    slots, row_slots = (2, 0) if optimizer is None else (len(optimizer.slots), len(optimizer.row_slots))
    t = table(table_plan([0], dims), optimizer_slots=slots, row_slots=row_slots, seed=1, limits=Limits(max_rows=64))
    state = t.init()
    t.insert_(state, t.read(features_of([[[i] for i in range(num_rows)]])))
    state.num_unique.zero_()
    state.step.fill_(step)
    return state


def touch(state: TableState, rows: list[int], grads: torch.Tensor) -> None:
    state.unique_rows[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    state.grads[: len(rows)] = grads
    state.num_unique.fill_(len(rows))


def moved(build, grad: float, *, steps: int = 1, first_step: int = 1, **kwargs) -> list[float]:
    """Weights after each step of a row of zeros whose gradient is `grad`, the row first touched at `first_step`."""
    optimizer, state, out = build(1e-3, **kwargs), state_of(1, step=first_step - 1), []
    state.rows.zero_()
    for _ in range(steps):
        touch(state, [0], torch.full((1, state.rows.shape[2]), grad))
        state = optimizer.apply_(state, ONE, DUE)
        assert len(state.rows[0, 0].unique()) == 1
        out.append(float(state.rows[0, 0, 0]))
    assert int(state.step) == first_step - 1 + steps
    return out


def moved_dense(build, grad: float, *, steps: int, **kwargs) -> list[float]:
    """The same for parameters."""
    optimizer, params = build(1e-3, **kwargs), {"w": torch.zeros(2)}
    state, out = optimizer.init(params), []
    for _ in range(steps):
        state, params = optimizer.update(state, params, {"w": torch.full((2,), grad)}, ONE, DUE)
        assert len(params["w"].unique()) == 1
        out.append(float(params["w"][0]))
    return out


def formula(name: str, w: float, grads: list[float], *, lr: float, wd: float, b1=0.9, b2=0.999, eps=1e-8) -> float:
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w *= {"adamw": 1 - lr * wd, "recis": 1 - lr * wd, "tf": 1 - wd, "adam": 1.0, "adam recis": 1.0}[name]
        if name in TORCH_S:
            w -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        else:
            w -= lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + eps)
    return w


def test_recis_numbers():
    assert moved(optim.sparse_adamw_recis, 1.0, steps=3) == pytest.approx(
        [-0.00099999968, -0.00199998946, -0.00299996928], rel=2e-7
    )
    assert moved(optim.sparse_adamw_recis, 1e-6) == [pytest.approx(-7.597e-4, rel=1e-4)]
    assert moved(optim.sparse_adamw, 1e-6) == [pytest.approx(-9.901e-4, rel=1e-4)]


def test_dense_recis_numbers():
    out = moved_dense(optim.adamw_recis, 1.0, steps=3)
    assert out == pytest.approx([-0.00099999968, -0.00199998946, -0.00299996928], rel=2e-7)


@pytest.mark.parametrize("name", ADAM_FAMILY)
@pytest.mark.parametrize(("grad", "torch_s", "recis"), [(1e-7, -4.5455e-3, -1.7042e-3), (1e-6, -4.9505e-3, -4.1619e-3)])
def test_small_gradients_tell_torch_s_form_from_recis_s(name, grad, torch_s, recis):
    """RecIS computes AdamW, its TF variant and Adam with one kernel: five steps of a constant gradient, no decay."""
    kwargs = {} if name in WITHOUT_DECAY else {"weight_decay": 0.0}
    expected = pytest.approx(torch_s if name in TORCH_S else recis, abs=6e-8)
    assert moved(ADAM_FAMILY[name], grad, steps=5, **kwargs)[-1] == expected
    assert moved_dense(DENSE_ADAM_FAMILY[name], grad, steps=5, **kwargs)[-1] == expected


@pytest.mark.parametrize("name", ["recis", "tf", "adam recis"])
def test_a_row_that_is_first_touched_late(name):
    """The bias is corrected by the table's steps, in all of RecIS's forms. The row is 0, so that decay does nothing."""
    assert moved(ADAM_FAMILY[name], 1.0, first_step=10) == [pytest.approx(-4.84e-4, rel=1e-3)]
    assert moved(ADAM_FAMILY[name], 1.0, first_step=10_000) == [pytest.approx(-3.16e-3, rel=1e-3)]


@pytest.mark.parametrize(
    ("name", "factor"),
    [("adamw", 1 - 1e-5), ("recis", 1 - 1e-5), ("tf", 1 - 1e-2), ("adam", 1.0), ("adam recis", 1.0)],
)
def test_decay_by_default(name, factor):
    """A gradient of 0 leaves the decay alone: lr 1e-3, weight decay 1e-2, which the TF variant does not scale by lr."""
    state = state_of(1)
    before = state.rows[0, 0].double()
    touch(state, [0], torch.zeros(1, state.rows.shape[2]))
    state = ADAM_FAMILY[name](1e-3).apply_(state, ONE, DUE)
    torch.testing.assert_close(state.rows[0, 0].double(), before * factor, rtol=2e-7, atol=0)
    params = {"w": torch.full((2,), 3.0)}
    dense = DENSE_ADAM_FAMILY[name](1e-3)
    _, params = dense.update(dense.init(params), params, {"w": torch.zeros(2)}, ONE, DUE)
    assert params["w"].tolist() == pytest.approx([3 * factor] * 2, rel=2e-7)


@pytest.mark.parametrize("name", ADAM_FAMILY)
def test_variants_are_their_formulas(name):
    wd = {} if name in WITHOUT_DECAY else {"weight_decay": 0.05}
    state, grads = state_of(2), [0.3, -1.0, 2e-6, 0.7, 0.0]
    before = state.rows[:2, 0].double()
    optimizer = ADAM_FAMILY[name](1e-2, **wd)
    for g in grads:
        touch(state, [1, 0], torch.full((2, state.rows.shape[2]), g))
        state = optimizer.apply_(state, ONE, DUE)
    expected = before.clone().apply_(lambda w: formula(name, w, grads, lr=1e-2, wd=0.05))
    torch.testing.assert_close(state.rows[:2, 0].double(), expected, rtol=1e-5, atol=1e-7)

    dense, params = DENSE[name](1e-2, **wd), {"w": before.float()}
    dense_state = dense.init(params)
    for g in grads:
        dense_state, params = dense.update(dense_state, params, {"w": torch.full_like(params["w"], g)}, ONE, DUE)
    torch.testing.assert_close(params["w"].double(), expected, rtol=1e-5, atol=1e-7)


TORCH = {  # sparse, dense, torch's, and the names torch gives the slots
    "adamw": (
        optim.sparse_adamw(1e-2, b1=0.8, b2=0.99, eps=1e-7, weight_decay=0.1),
        optim.adamw(1e-2, b1=0.8, b2=0.99, eps=1e-7, weight_decay=0.1),
        lambda w: torch.optim.AdamW(w, lr=1e-2, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.1),
        ("exp_avg", "exp_avg_sq"),
    ),
    "adam": (
        optim.sparse_adam(1e-2),
        optim.adam(1e-2),
        lambda w: torch.optim.Adam(w, lr=1e-2),
        ("exp_avg", "exp_avg_sq"),
    ),
    "sgd": (
        optim.sparse_sgd(1e-2, weight_decay=0.1),
        optim.sgd(1e-2, weight_decay=0.1),
        lambda w: torch.optim.SGD(w, lr=1e-2, weight_decay=0.1),
        (),
    ),
    "adagrad": (
        optim.sparse_adagrad(1e-2, eps=1e-7, weight_decay=0.1),
        optim.adagrad(1e-2, eps=1e-7, weight_decay=0.1),
        lambda w: torch.optim.Adagrad(w, lr=1e-2, eps=1e-7, weight_decay=0.1),
        ("sum",),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_sparse_optimiser_is_torch_s_when_all_rows_are_touched(name):
    optimizer, _, build, slots = TORCH[name]
    state = state_of(20, optimizer=optimizer)
    weight = torch.nn.Parameter(state.rows[:20, 0].clone())
    reference = build([weight])
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        grads, order = torch.randn(20, state.rows.shape[2], generator=g), torch.randperm(20, generator=g)
        touch(state, order.tolist(), grads[order])
        state = optimizer.apply_(state, ONE, DUE)
        weight.grad = grads
        reference.step()
    torch.testing.assert_close(state.rows[:20, 0], weight.detach(), rtol=1e-5, atol=2e-6)
    for slot, key in enumerate(slots, start=1):
        torch.testing.assert_close(state.rows[:20, slot], reference.state[weight][key], rtol=1e-5, atol=1e-6)


def test_initial_of_adagrad_is_torch_s_though_it_is_not_stored():
    optimizer = optim.sparse_adagrad(0.1, initial=0.3)
    state = state_of(4, optimizer=optimizer)
    weight = torch.nn.Parameter(state.rows[:4, 0].clone())
    reference = torch.optim.Adagrad([weight], lr=0.1, initial_accumulator_value=0.3)
    for i in range(5):
        weight.grad = torch.full_like(weight, 0.1 * i - 0.2)
        touch(state, [0, 1, 2, 3], weight.grad)
        state = optimizer.apply_(state, ONE, DUE)
        reference.step()
    torch.testing.assert_close(state.rows[:4, 0], weight.detach(), rtol=1e-6, atol=1e-7)


def test_rowwise_adagrad_keeps_one_float_per_row_of_each_logical_table():
    """Written out as fbgemm and torchrec define it, for an embedding of 3 and a bias of 1 in one row."""
    optimizer, columns = optim.sparse_rowwise_adagrad(0.1, eps=1e-6, weight_decay=0.02), RowLayout((3, 1), None)
    state = state_of(3, optimizer=optimizer, dims=(3, 1))
    assert state.rows.shape[1:] == (1, 4 + 2)
    rows = state.rows[:3, 0].double().tolist()
    assert all(row[4:] == [0, 0] for row in rows)
    g = torch.Generator().manual_seed(0)
    for touched in ([0, 2], [2], [0, 1, 2]):
        grads = torch.randn(len(touched), 4, generator=g)
        touch(state, touched, grads)
        state = optimizer.apply_(state, ONE, DUE, columns)
        for row, grad in zip(touched, grads.double().tolist(), strict=True):
            w = rows[row]
            for k, span in enumerate([range(3), range(3, 4)]):
                full = {c: grad[c] + 0.02 * w[c] for c in span}
                w[4 + k] += sum(x * x for x in full.values()) / len(span)
                for c in span:
                    w[c] -= 0.1 * full[c] / (math.sqrt(w[4 + k]) + 1e-6)
    torch.testing.assert_close(state.rows[:3, 0].double(), torch.tensor(rows).double(), rtol=1e-5, atol=1e-6)


def ftrl(w: float, grads: list[float], *, lr: float, beta: float, l1: float, l2: float) -> float:
    """Algorithm 1 of McMahan et al. 2013, each proximal term kept apart, from a weight that may not be 0."""
    history, linear, squares, before = [], 0.0, 0.0, 0.0  # (sigma, centre) of every step
    for g in grads:
        squares += g * g
        now = (beta + math.sqrt(squares)) / lr
        history.append((now - before, w))
        linear, before = linear + g, now
        z = linear - sum(sigma * centre for sigma, centre in history)
        w = 0.0 if abs(z) <= l1 else (math.copysign(l1, z) - z) / (sum(s for s, _ in history) + l2)
    return w


@pytest.mark.parametrize("l1", [0.0, 2.0])
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_ftrl_is_the_paper_s(l1, l2):
    optimizer = optim.sparse_ftrl(0.1, beta=0.7, l1=l1, l2=l2)
    state, grads = state_of(2, optimizer=optimizer), [0.3, -1.0, 2e-3, 0.7, 0.0, 0.2]
    before = state.rows[:2, 0].double().clone()
    for i, g in enumerate(grads):
        touch(state, [1, 0], torch.full((2, state.rows.shape[2]), g))
        state = optimizer.apply_(state, ONE, DUE)
        expected = before.clone().apply_(lambda w: ftrl(w, grads[: i + 1], lr=0.1, beta=0.7, l1=l1, l2=l2))  # noqa: B023
        torch.testing.assert_close(state.rows[:2, 0].double(), expected, rtol=1e-5, atol=1e-6)
    zeros = int((state.rows[:2, 0] == 0).sum())
    assert (zeros > 0) == (l1 > 0)


def test_ftrl_without_penalties_is_adagrad_with_beta_for_eps():
    """Also where the learning rate changes: it scales steps, not weights."""
    lr = piecewise([0.1, 0.02], [3])
    one, other = optim.sparse_ftrl(lr, beta=0.5), optim.sparse_adagrad(lr, eps=0.5)
    a, b = state_of(3, optimizer=one), state_of(3, optimizer=other)
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        grads = torch.randn(3, 4, generator=g)
        touch(a, [0, 1, 2], grads)
        touch(b, [0, 1, 2], grads)
        a, b = one.apply_(a, ONE, DUE), other.apply_(b, ONE, DUE)
    torch.testing.assert_close(a.rows[:3, 0], b.rows[:3, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPARSE)
def test_update_is_apply(name):
    optimizer = SPARSE[name](1e-2)
    state = state_of(5, step=4, optimizer=optimizer)
    grads, scale = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    touch(state, [4, 0, 2], grads)
    expected = optimizer.update(state.rows[[4, 0, 2]], grads, state.step, scale)
    applied, _ = by_definition(optimizer.apply_, state, scale, DUE)
    assert torch.equal(applied.rows[[4, 0, 2]], expected)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("spelling", ["update", "update_"])
def test_dense_optimiser_is_torch_s(spelling, name):
    g = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(4, 3, generator=g), "b": torch.randn(3, generator=g)}
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    _, optimizer, build, _ = TORCH[name]
    reference, state = build(weights.values()), optimizer.init(params)
    for _ in range(200):
        grads = {name: torch.randn(p.shape, generator=g) for name, p in params.items()}
        state, params = getattr(optimizer, spelling)(state, params, grads, ONE, DUE)
        for key, w in weights.items():
            w.grad = grads[key]
        reference.step()
    for key, w in weights.items():
        torch.testing.assert_close(params[key], w.detach(), rtol=1e-5, atol=2e-6)
    assert int(state.step) == 200


def test_rows_out_of_reach_keep_their_bytes():
    """Touched now and then, t counting steps of the table: a row's moments wait with it."""
    state, optimizer = state_of(6), optim.sparse_adamw(1e-2)
    for rows in ([0, 1], [1, 5], [], [0]):
        before = copy_of(state)
        touch(state, rows, torch.ones(len(rows), state.rows.shape[2]))
        state = optimizer.apply_(state, ONE, DUE)
        others = [r for r in range(64) if r not in rows]
        assert torch.equal(state.rows[others], before.rows[others])
        assert all((state.rows[r] != before.rows[r]).any() for r in rows)
    assert int(state.step) == 4
    assert not state.grads.any()


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("due", [True, False])
def test_apply_is_apply_and_leaves_its_input(name, due):
    optimizer = SPARSE[name](1e-2)
    pure = in_place = state_of(8, step=3, optimizer=optimizer)
    in_place = copy_of(in_place)
    g = torch.Generator().manual_seed(0)
    for rows in ([0, 3, 7], [3], []):
        grads, scale = torch.randn(len(rows), pure.grads.shape[1], generator=g), torch.tensor(0.25)
        touch(pure, rows, grads)
        touch(in_place, rows, grads)
        before = copy_of(pure)
        new, _ = by_definition(optimizer.apply_, pure, scale, torch.tensor(due))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(pure), strict=True))
        pure, returned = new, optimizer.apply_(in_place, scale, torch.tensor(due))
        assert returned is in_place
        for name_, a, b in zip(pure._fields, pure, in_place, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name_)


@pytest.mark.parametrize("name", SPARSE)
def test_nothing_moves_unless_due(name):
    sparse = SPARSE[name](1e-2)
    state = state_of(5, optimizer=sparse)
    touch(state, [1, 2], torch.ones(2, state.grads.shape[1]))
    before = copy_of(state)
    state = sparse.apply_(state, ONE, NOT_DUE)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(state), strict=True))
    if name not in DENSE:
        return

    params, optimizer = {"w": torch.randn(3)}, DENSE[name](1e-2)
    dense = optimizer.init(params)
    dense, new = optimizer.update(dense, params, {"w": torch.ones(3)}, ONE, NOT_DUE)
    assert torch.equal(new["w"], params["w"])
    assert not any(slot["w"].any() for slot in dense[:-1])
    assert int(dense.step) == 0


def test_dense_update_is_update_and_leaves_its_input():
    optimizer = optim.adamw(1e-2)
    params = {"w": torch.randn(3, 2)}
    mine = {"w": params["w"].clone()}
    a, b = optimizer.init(params), optimizer.init(mine)
    for _ in range(3):
        grads, before = {"w": torch.randn(3, 2)}, params["w"].clone()
        new_a, new_params = optimizer.update(a, params, grads, ONE, DUE)
        assert torch.equal(params["w"], before)
        a, params = new_a, new_params
        returned, same = optimizer.update_(b, mine, grads, ONE, DUE)
        assert returned is b
        assert same is mine
        assert torch.equal(params["w"], mine["w"])
        assert torch.equal(a.m["w"], b.m["w"])
        assert torch.equal(a.v["w"], b.v["w"])
        assert torch.equal(a.step, b.step)


def test_gradients_are_multiplied_by_scale():
    g = torch.full((1, 4), 0.3)
    rows = []
    for grads, scale in ((g, torch.tensor(0.25)), (g * 0.25, ONE)):
        state = state_of(1)
        touch(state, [0], grads)
        rows.append(optim.sparse_adamw(1e-2).apply_(state, scale, DUE).rows[0])
    torch.testing.assert_close(*rows, rtol=1e-6, atol=0)


def test_learning_rate_as_a_tensor():
    lr = torch.tensor(1e-2)
    a, b = state_of(3), state_of(3)
    with_tensor, with_float = optim.sparse_adamw(lr), optim.sparse_adamw(1e-2)
    for _ in range(2):
        for state in (a, b):
            touch(state, [0, 2], torch.ones(2, 4))
        a, b = with_tensor.apply_(a, ONE, DUE), with_float.apply_(b, ONE, DUE)
    torch.testing.assert_close(a.rows[:3], b.rows[:3], rtol=1e-6, atol=0)
    lr.fill_(0)
    before = a.rows[:3, 0].clone()
    touch(a, [0, 2], torch.ones(2, 4))
    assert torch.equal(with_tensor.apply_(a, ONE, DUE).rows[:3, 0], before)


@pytest.mark.parametrize("build", [*SPARSE.values(), *DENSE.values()], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", -1e-3, r"0 <= lr < inf"),
        ("lr", math.nan, r"0 <= lr < inf"),
        ("b1", 1.0, r"0 <= b1 < 1"),
        ("b2", -0.1, r"0 <= b2 < 1"),
        ("eps", -1e-8, r"eps"),
        ("weight_decay", -0.1, r"0 <= weight_decay < inf"),
        ("initial", -0.1, r"0 <= initial < inf"),
        ("beta", -0.1, r"0 <= beta < inf"),
        ("l1", -0.1, r"0 <= l1 < inf"),
        ("l2", math.inf, r"0 <= l2 < inf"),
    ],
)
def test_values_out_of_range(build, name, value, expected):
    if name not in inspect.signature(build).parameters:
        return
    with pytest.raises(ValueError, match=rf"^{name}: got {value}, expected .*{expected}"):
        build(**{"lr": 1e-3} | {name: value})


def test_moments_of_a_dead_unit_end_as_zeros():
    """Not as denormal numbers, which take a processor many times as long."""
    opt, params = optim.adamw(1e-3), {"w": torch.ones(3)}
    state, one = opt.init(params), torch.tensor(1.0)
    state, params = opt.update(state, params, {"w": torch.ones(3)}, one, None)
    for _ in range(800):
        state, params = opt.update(state, params, {"w": torch.zeros(3)}, one, None)
        m = state.m["w"]
        assert bool(((m == 0) | (m.abs() >= torch.finfo(torch.float32).tiny)).all())
    assert not state.m["w"].any()
