import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.rows import add_row_grads
from tests.reference import on_threads, positions, random_lists, reading_of, streams, table_plan

DIMS = [(3, 1), (8, 1), (1,), (5,), (16, 4, 2)]


def case(lists, vocabularies, dims, seed, *, spare=2, num_unique=9):
    """As in a table: a unique row belongs to one vocabulary."""
    plan = table_plan(vocabularies, dims)
    g = torch.Generator().manual_seed(seed)
    reading = reading_of(lists, vocabularies, spare=spare)
    per = num_unique // (max(vocabularies) + 1)
    inverse_P = torch.randint(-1, per, reading.id.shape, generator=g, dtype=torch.int32)
    for _, l, p in positions(reading):
        if inverse_P[p] >= 0:
            inverse_P[p] += per * int(reading.vocabularies[l])
    blocks = [torch.randn(len(lists[0]), len(vocabularies), dim, generator=g) for dim in dims]
    grads = torch.randn(num_unique, plan.width, generator=g)
    return grads, inverse_P, reading, plan.firsts, plan.dims, blocks


def call(op, grads, inverse_P, reading, firsts, dims, blocks):
    grads = grads.clone()
    op(grads, inverse_P, reading.cell, firsts, dims, blocks)
    return grads


def loop(grads, inverse_P, reading, firsts, dims, blocks):
    grads = grads.clone()
    for b, l, p in positions(reading):
        if inverse_P[p] >= 0:
            for first, dim, block in zip(firsts, dims, blocks, strict=True):
                grads[int(inverse_P[p]), first : first + dim] += block[b, l]
    return grads


@given(stream=streams(max_batches=1), dims=st.sampled_from(DIMS), seed=st.integers(0, 2**31), threads=st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_kernel_is_definition_is_loop_exactly(stream, dims, seed, threads):
    """Occurrences are added in order, so even the rounding is one."""
    args = case(stream.batches[0], stream.vocabularies, dims, seed, spare=stream.spare)
    expected = loop(*args)
    for op in (add_row_grads.definition, add_row_grads.add_row_grads_):
        assert torch.equal(on_threads(threads, call, op, *args), expected)


@pytest.mark.parametrize("vocabularies", [[0, 0, 1, 0, 2, 2], [0, 1, 2, 3, 4, 5], [0]], ids=str)
def test_one_and_two_threads_give_the_same_bytes(vocabularies):
    lists = random_lists(random.Random(0), lookups=len(vocabularies), samples=300, longest=4, ids=range(50))
    args = case(lists, vocabularies, (8, 1), 0, num_unique=60)
    one, two = (on_threads(n, call, add_row_grads.add_row_grads_, *args) for n in (1, 2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, call(add_row_grads.definition, *args), rtol=1e-5, atol=1e-5)


def test_blocks_may_be_strided():
    grads, inverse_P, reading, firsts, dims, blocks = case([[[1], [2]], [[3], []]], [0, 1], (8, 1), 0)
    strided = [b.transpose(0, 2).contiguous().transpose(0, 2) for b in blocks]
    assert not strided[0].is_contiguous()
    op = add_row_grads.add_row_grads_
    assert torch.equal(
        call(op, grads, inverse_P, reading, firsts, dims, strided),
        call(op, grads, inverse_P, reading, firsts, dims, blocks),
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    grads, inverse_P, reading, firsts, dims, blocks = case([[[1, 2], []], [[1], [3, 3]]], [0, 1], (8, 1), 0)
    torch.library.opcheck(
        add_row_grads.add_row_grads_, (grads, inverse_P, reading.cell, list(firsts), list(dims), blocks)
    )
