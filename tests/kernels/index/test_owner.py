"""owner against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.index import owner as module
from recfx.kernels.index.owner import owner

MASK = 2**64 - 1


def mixed(x: int) -> int:
    for _ in range(2):
        x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & MASK
    return x ^ x >> 32


def owner_of(id: int, vocabulary: int, world_size: int) -> int:
    golden = 0x9E3779B97F4A7C15
    return (mixed((id + (vocabulary + 1) * golden & MASK) ^ golden) >> 33) % world_size


keys = st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-1, 2**16 - 2))


@settings(deadline=None)
@given(st.lists(keys, max_size=40), st.one_of(st.integers(1, 1000), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62])))
def test_kernel_and_definition_are_the_oracle(keys, world_size):
    ids, vocabularies = (
        torch.tensor(column, dtype=torch.int64) for column in ([k[0] for k in keys], [k[1] for k in keys])
    )
    expected = [owner_of(*key, world_size) for key in keys]
    assert owner(ids, vocabularies.int(), world_size).tolist() == expected
    assert module.definition(ids, vocabularies.int(), world_size).tolist() == expected


def test_the_owner_of_an_id_is_even_and_fixed():
    ids = torch.arange(80_000)
    ranks = owner(ids, (ids % 7).int(), 8)
    assert (torch.bincount(ranks, minlength=8) - 10_000).abs().max() < 400
    assert owner(torch.tensor([0, 1, -1, 2**63 - 1]), torch.zeros(4).int(), 1).tolist() == [0] * 4


@pytest.mark.parametrize("world_size", [0, -1])
def test_no_ranks(world_size):
    with pytest.raises(RuntimeError, match=f"world_size: got {world_size}, expected at least 1 rank"):
        owner(torch.arange(4), torch.zeros(4).int(), world_size)


def test_opcheck():
    torch.library.opcheck(owner, (torch.arange(4), torch.zeros(4, dtype=torch.int32), 3))
