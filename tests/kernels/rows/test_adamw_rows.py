import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.counters import NUM_UNIQUE, STEP, new_counters
from recfx.kernels.rows import adamw_rows
from tests.reference import on_threads

OPS = {"definition": adamw_rows.definition, "kernel": adamw_rows.adamw_rows_}
HYPER = torch.tensor([0.99, 0.9, 0.1, 0.999, 0.001, 0.05, 1e-4, 0.25], dtype=torch.float64)


def case(width, num_unique, seed=0, num_rows=40):
    g = torch.Generator().manual_seed(seed)
    rows, grads = torch.randn(num_rows, 3, width, generator=g), torch.randn(num_rows, width, generator=g)
    rows[:, 2].abs_()
    unique_rows = torch.randperm(num_rows, generator=g).int()
    return rows, grads, new_counters(num_unique=num_unique), unique_rows


def call(op, rows, grads, counters, unique_rows, due=True, hyper=HYPER):
    rows, grads, counters = rows.clone(), grads.clone(), counters.clone()
    op(rows, grads, counters, unique_rows, hyper, torch.tensor(due))
    return rows, grads, counters


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(width=st.sampled_from([1, 3, 9, 17]), num_unique=st.integers(0, 40), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_op_is_the_scalar_formula_on_the_unique_rows_alone(op, width, num_unique, seed):
    rows, grads, counters, unique_rows = case(width, num_unique, seed)
    decay, b1, c1, b2, c2, alpha, eps, scale = HYPER.tolist()
    new_rows, new_grads, new_counts = call(op, rows, grads, counters, unique_rows)
    expected = rows.double()
    for u in range(num_unique):
        row = int(unique_rows[u])
        for c in range(width):
            w, m, v = rows[row, :, c].tolist()
            g = grads[u, c].item() * scale
            m, v = b1 * m + c1 * g, b2 * v + c2 * g * g
            expected[row, :, c] = torch.tensor([decay * w - alpha * m / (math.sqrt(v) + eps), m, v])
    torch.testing.assert_close(new_rows.double(), expected, rtol=2e-5, atol=1e-6)
    untouched = unique_rows[num_unique:].long()
    assert torch.equal(new_rows[untouched], rows[untouched])
    assert not new_grads[:num_unique].any()
    assert torch.equal(new_grads[num_unique:], grads[num_unique:])
    assert torch.equal(new_counts, new_counters(step=1))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_nothing_moves_unless_due(op):
    before = case(9, 20)
    for a, b in zip(call(op, *before, due=False), before, strict=False):
        assert torch.equal(a, b)


def test_one_and_two_threads_give_the_same_bytes_and_the_definition():
    args = case(9, 3000, num_rows=4000)
    one, two = (on_threads(n, call, adamw_rows.adamw_rows_, *args) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    torch.testing.assert_close(one[0], call(adamw_rows.definition, *args)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    torch.library.opcheck(adamw_rows.adamw_rows_, (*case(9, 5), HYPER, torch.tensor(True)))


@pytest.mark.parametrize(
    "op", [adamw_rows.checked_definition, adamw_rows.adamw_rows_checked_], ids=["definition", "kernel"]
)
@pytest.mark.parametrize("width", [1, 9, 17])
def test_checked_is_the_same_and_says_whether_gradients_are_finite(op, width):
    rows, grads, counters, unique_rows = case(width, 20)
    expected = call(adamw_rows.adamw_rows_, rows, grads, counters, unique_rows)
    for bad in (None, math.nan, math.inf, -math.inf):
        for row in (0, 19, 20):  # the last one is not in use
            for others in ([], [torch.ones(3)], [torch.ones(3), torch.tensor([1, bad or 0.0])]):
                there, state = grads.clone(), (rows.clone(), counters.clone())
                there[row, -1] = there[row, -1] if bad is None else bad
                is_finite = op(state[0], there, state[1], unique_rows, HYPER, torch.tensor(True), others)
                assert bool(is_finite) == (bad is None or (row == 20 and len(others) < 2))
                if is_finite:
                    torch.testing.assert_close(state[0], expected[0], rtol=1e-6, atol=1e-6)
                assert (int(state[1][NUM_UNIQUE]), int(state[1][STEP])) == (0, 1)
    grads[:] = math.nan
    assert op(rows.clone(), grads, counters.clone(), unique_rows, HYPER, torch.tensor(False), [])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck_of_checked():
    rows, grads, counters, unique_rows = case(9, 5)
    arguments = rows, grads, counters, unique_rows, HYPER, torch.tensor(True), [torch.ones(3)]
    torch.library.opcheck(adamw_rows.adamw_rows_checked_, arguments)
