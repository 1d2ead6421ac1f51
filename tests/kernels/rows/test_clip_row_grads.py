import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.counters import new_counters
from recfx.kernels.rows import clip_row_grads
from tests.reference import on_threads

OPS = {"definition": clip_row_grads.definition, "kernel": clip_row_grads.clip_row_grads_}
DIMS = (3, 1, 17)


def grads_of(num_rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    grads = torch.randn(num_rows, sum(DIMS), generator=g)
    grads[::4] = 0
    return grads


def clip(op, grads, num, *, scale=0.5, due=True, limit=math.inf, max_norm=math.inf):
    grads = grads.clone()
    op(grads, new_counters(num_unique=num), torch.tensor(scale), torch.tensor(due), DIMS, limit, max_norm)
    return grads


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(
    num=st.integers(0, 9),
    seed=st.integers(0, 99),
    limit=st.sampled_from([0.1, 0.4, math.inf]),
    max_norm=st.sampled_from([0.1, 1.0, math.inf]),
)
@settings(max_examples=30, deadline=None)
def test_op_is_the_loop_over_items_and_logical_rows(op, num, seed, limit, max_norm):
    grads, scale = grads_of(9, seed), 0.5
    expected = grads.double()
    for u in range(num):
        first = 0
        for dim in DIMS:
            part = [min(max(x * scale, -limit), limit) for x in grads[u, first : first + dim].tolist()]
            norm = math.sqrt(sum(x * x for x in part))
            factor = min(1.0, max_norm / norm) if norm else 1.0
            expected[u, first : first + dim] = torch.tensor([x * factor / scale for x in part])
            first += dim
    new = clip(op, grads, num, limit=limit, max_norm=max_norm)
    torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(new[num:], grads[num:])


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_nothing_is_cut_unless_due_and_nan_stays(op):
    grads = grads_of(9)
    assert torch.equal(clip(op, grads, 9, due=False, limit=0.1, max_norm=0.1), grads)
    grads[1, 0] = math.nan
    assert clip(op, grads, 9, limit=0.1)[1, 0].isnan()


def test_squared_norm_is_the_sum_over_the_used_rows_on_any_number_of_threads():
    grads = grads_of(3000)
    for num in (0, 1, 256, 257, 3000):
        counters = new_counters(num_unique=num)
        one, two = (on_threads(n, clip_row_grads.squared_norm, grads, counters) for n in (1, 2))
        assert torch.equal(one, two)
        assert float(one) == pytest.approx(sum(x * x for x in grads[:num].double().flatten().tolist()), rel=1e-12)
        assert float(clip_row_grads.squared_norm_definition(grads, counters)) == pytest.approx(float(one))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    counts = new_counters(num_unique=5), torch.tensor(0.5), torch.tensor(True)
    torch.library.opcheck(clip_row_grads.clip_row_grads_, (grads_of(9), *counts, DIMS, 0.5, 1.0))
    torch.library.opcheck(clip_row_grads.squared_norm, (grads_of(9), new_counters(num_unique=5)))
