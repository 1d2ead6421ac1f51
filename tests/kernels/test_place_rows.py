import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels import place_rows as module

OPS = {"definition": module.definition, "kernel": module.place_rows_}
CAPACITY = 12


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(
    at=st.lists(st.integers(0, CAPACITY - 1), unique=True, max_size=CAPACITY),
    left_out=st.sets(st.integers(0, CAPACITY - 1)),
    shape=st.sampled_from([(), (1,), (2, 9), (1, 27), (0,)]),
    gap=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.int32]),
)
@settings(max_examples=80, deadline=None)
def test_is_a_loop(op, at, left_out, shape, gap, dtype):
    width = torch.Size(shape).numel()
    memory = torch.full((CAPACITY, width + gap), 7, dtype=dtype)
    target = memory[:, :width].unflatten(1, shape) if shape else memory[:, 0]
    source = torch.arange(100, 100 + len(at) * width).to(dtype).view(len(at), *shape)
    expected = memory.clone()
    places = [-1 if k in left_out else place for k, place in enumerate(at)]
    for k, place in enumerate(places):
        if place >= 0:
            expected[place, :width] = source[k].flatten()
    op(target, source, torch.tensor(places, dtype=torch.int32))
    assert torch.equal(memory, expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    at = torch.tensor([2, -1], dtype=torch.int32)
    torch.library.opcheck(module.place_rows_, (torch.zeros(4, 3), torch.ones(2, 3), at))
