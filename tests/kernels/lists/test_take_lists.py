import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.lists import take_lists as module
from tests.reference import on_threads

DTYPES = (torch.int64, torch.float32, torch.uint8)
OPS = {"definition": module.definition, "kernel": module.take_lists}


def loop(values, first, length, capacity):
    """The kept items end to end, cut at the capacity, and where each list ends."""
    kept, ends = [], [0]
    for a, n in zip(first, length, strict=True):
        kept = (kept + values[a : a + n])[:capacity]
        ends.append(len(kept))
    return kept + [0] * (capacity - len(kept)), ends


@st.composite
def parts(draw):
    num_values = draw(st.integers(0, 12))
    lists = draw(st.lists(st.tuples(st.integers(0, num_values), st.integers(0, num_values)), max_size=5))
    lists = [(min(a, b), abs(a - b)) for a, b in lists]
    return list(range(100, 100 + num_values)), [a for a, _ in lists], [n for _, n in lists], draw(st.integers(0, 20))


def call(op, cases, dtypes):
    ints = [[torch.tensor(case[k], dtype=torch.int32) for case in cases] for k in (1, 2)]
    values = [torch.tensor(case[0], dtype=dtype) for case, dtype in zip(cases, dtypes, strict=True)]
    return op(values, *ints, [case[3] for case in cases])


@pytest.mark.parametrize("op", OPS)
@given(cases=st.lists(parts(), min_size=1, max_size=3), dtype=st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_is_a_loop(op, cases, dtype):
    out = call(OPS[op], cases, [dtype] * len(cases))
    for case, values, offsets in zip(cases, out[::2], out[1::2], strict=True):
        assert (values.tolist(), offsets.tolist()) == loop(*case)
        assert (values.dtype, offsets.dtype) == (dtype, torch.int32)


def test_threads_give_the_same_values():
    g = torch.Generator().manual_seed(0)
    first = torch.randint(0, 90_000, (5000,), generator=g, dtype=torch.int32)
    length = torch.randint(0, 20, (5000,), generator=g, dtype=torch.int32)
    values = torch.randint(0, 2**60, (100_000,), generator=g)
    one, two = (on_threads(n, module.take_lists, [values], [first], [length], [60_000]) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(one[0], module.definition([values], [first], [length], [60_000])[0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    ints = [torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)]
    torch.library.opcheck(module.take_lists, ([torch.arange(4)], ints[:1], ints[1:], [5]))
