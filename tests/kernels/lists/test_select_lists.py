import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.lists import join as joining
from recfx.kernels.lists import select_lists as module
from tests.reference import on_threads, ragged

OPS = {"definition": module.definition, "kernel": module.select_lists}
NUMBERS = st.floats(width=32, allow_nan=False)


@st.composite
def columns(draw):
    samples = draw(st.integers(0, 4))
    lists = st.lists(st.lists(NUMBERS, max_size=4), min_size=samples, max_size=samples)
    return draw(st.lists(lists, min_size=1, max_size=4))


def call(op, lists, dim, fill, spare=0):
    tensors = [ragged(column, spare=spare, dtype=torch.float32) for column in lists]
    return op([c.values for c in tensors], [c.offsets for c in tensors], dim, fill)


@pytest.mark.parametrize("op", OPS)
@given(lists=columns(), dim=st.integers(1, 3), fill=NUMBERS, spare=st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_is_a_loop(op, lists, dim, fill, spare):
    rows = zip(*[[(items + [fill] * dim)[:dim] for items in column] for column in lists], strict=True)
    assert call(OPS[op], lists, dim, fill, spare).tolist() == [list(itertools.chain(*row)) for row in rows]


def test_threads_give_the_same_values_and_nan_fills():
    g = torch.Generator().manual_seed(0)
    lists = [[[float(n)] * int(n) for n in torch.randint(0, 4, (300,), generator=g)] for _ in range(7)]
    one, two = (on_threads(n, call, module.select_lists, lists, 2, float("nan")) for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(one, call(module.definition, lists, 2, float("nan")), rtol=0, atol=0, equal_nan=True)


@given(shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_split_undoes_join(shapes):
    parts = [torch.randint(0, 2**62, shape) for shape in shapes]
    joined = joining.join(parts)
    assert joined.tolist() == [v for part in parts for v in part.flatten().tolist()]
    assert all(torch.equal(a, b) for a, b in zip(joining.split(joined, parts), parts, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    x = ragged([[1.0, 2.0], []], dtype=torch.float32)
    torch.library.opcheck(module.select_lists, ([x.values, x.values], [x.offsets, x.offsets], 2, 0.5))
    torch.library.opcheck(joining.join, ([x.values, x.values],))
