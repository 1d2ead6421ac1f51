import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels import owner as module
from tests.reference import EXTREMES, MAX_INT64, MIN_INT64

OPS = {"definition": module.definition, "kernel": module.owner}
KEYS = st.lists(
    st.tuples(st.integers(-1, 2**16 - 1), st.sampled_from(EXTREMES) | st.integers(MIN_INT64, MAX_INT64)), max_size=20
)


def reference(vocabulary: int, id: int, world_size: int) -> int:
    """In Python's own integers."""
    x = (id + (vocabulary + 1) * 0x9E3779B97F4A7C15 ^ 0x9E3779B97F4A7C15) % 2**64
    for _ in range(2):
        x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 % 2**64
    return ((x ^ x >> 32) >> 33) % world_size


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(keys=KEYS, world_size=st.sampled_from([1, 2, 3, 8, 1000, 2**31 - 1]))
@settings(max_examples=60, deadline=None)
def test_is_the_hash_modulo_the_world(op, keys, world_size):
    vocabularies = torch.tensor([v for v, _ in keys], dtype=torch.int32)
    ids = torch.tensor([i for _, i in keys], dtype=torch.int64)
    assert op(ids, vocabularies, world_size).tolist() == [reference(v, i, world_size) for v, i in keys]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    torch.library.opcheck(module.owner, (torch.arange(5), torch.zeros(5, dtype=torch.int32), 3))
