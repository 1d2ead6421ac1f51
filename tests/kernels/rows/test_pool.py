import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.embeddings import Embedding, plan_tables
from recfx.kernels.lists import order_ids
from recfx.kernels.rows import pool
from recfx.kernels.rows.initial import initial_values
from recfx.table import Limits, initializer_tensors, table
from tests.reference import REFUSED, on_threads, positions, ragged, random_lists, reading_of, streams, table_plan

DIMS = [(3, 1), (8, 1), (1,), (5,), (16, 4, 2)]


def loop(rows, row_P, reading, batch_size, init, firsts, dims):
    keys, unknown_params = init
    blocks = [torch.zeros(batch_size, len(reading.vocabularies), dim) for dim in dims]
    for b, l, p in positions(reading):
        row, v = int(row_P[p]), int(reading.vocabularies[l])
        if row < 0 and unknown_params is None:
            continue
        if row < 0:
            weight = initial_values(reading.id[p : p + 1], keys[v : v + 1], unknown_params[v : v + 1])[0]
        else:
            weight = rows[row, 0]
        for block, first, dim in zip(blocks, firsts, dims, strict=True):
            block[b, l] += weight[first : first + dim]
    return blocks


def case(lists, vocabularies, dims, seed, spare=2, *, unknown=True):
    plan = table_plan(vocabularies, dims)
    g = torch.Generator().manual_seed(seed)
    reading = reading_of(lists, vocabularies, spare=spare)
    rows = torch.randn(10, 3, plan.width, generator=g)
    row_P = torch.randint(REFUSED, 10, reading.id.shape, generator=g, dtype=torch.int32)
    row_P = torch.where(reading.cell < 0, -1, row_P)
    keys, params = initializer_tensors(plan, 1)
    return rows, row_P, reading, len(lists[0]), (keys, params if unknown else None), plan.firsts, plan.dims


def call(op, rows, row_P, reading, batch_size, init, firsts, dims):
    return op(rows, row_P, *reading, batch_size, *init, firsts, dims)


@given(stream=streams(max_batches=1), dims=st.sampled_from(DIMS), seed=st.integers(0, 2**31), unknown=st.booleans())
@settings(max_examples=100, deadline=None)
def test_kernel_is_definition_is_loop(stream, dims, seed, unknown):
    args = case(stream.batches[0], stream.vocabularies, dims, seed, stream.spare, unknown=unknown)
    expected = loop(*args)
    for op in (pool.definition, pool.pool):
        for a, b in zip(call(op, *args), expected, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_single_known_ids_are_copied_exactly_and_empty_lists_are_zero():
    rows, _, reading, batch_size, init, firsts, dims = case([[[1], [], [2]]], [0], (8, 1), 0)
    row_P = torch.tensor([4, 9, 0, 0], dtype=torch.int32)[: reading.id.numel()]
    emb, bias = call(pool.pool, rows, row_P, reading, batch_size, init, firsts, dims)
    assert torch.equal(emb[:, 0], torch.stack([rows[4, 0, :8], torch.zeros(8), rows[9, 0, :8]]))
    assert torch.equal(bias[:, 0], torch.stack([rows[4, 0, 8:], torch.zeros(1), rows[9, 0, 8:]]))


def test_one_and_two_threads_give_the_same_bytes():
    rng = random.Random(0)
    lists = random_lists(rng, lookups=6, samples=300, longest=4, ids=range(50))
    args = case(lists, [0, 1, 2, 0, 1, 2], (8, 1), 0)
    one, two = (on_threads(n, call, pool.pool, *args) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for a, b in zip(one, call(pool.definition, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    rows, row_P, reading, batch_size, init, firsts, dims = case([[[1, 2], []], [[1], [3, 3]]], [0, 1], (8, 1), 0)
    torch.library.opcheck(pool.pool, (rows, row_P, *reading, batch_size, *init, firsts, dims))
    ends, (id_P, cell_P, vocabularies) = torch.tensor([2, 3, 3, 5], dtype=torch.int32), reading
    torch.library.opcheck(
        pool.pool_lists, (rows, row_P, id_P, cell_P, ends, vocabularies, batch_size, *init, firsts, dims)
    )


def test_a_table_pools_alike_with_and_without_the_ends_of_lists(monkeypatch):
    """Tables on a GPU ask for the ends; the same functions on a CPU, told that they are of use there."""
    columns = {"a": ragged([[1, 2], [], [9]], spare=2), "b": ragged([[4], [4, 1], []])}
    shared = {"dim": 3, "shared_name": "item", "unknown": "initial"}
    lookups = [Embedding("a", padding_id=2, **shared), Embedding("b", read_only=True, **shared)]
    plan = plan_tables({"emb": lookups}).tables[0]
    pooled = []
    for with_ends in (False, True):
        monkeypatch.setattr(order_ids, "uses_ends", lambda device, with_ends=with_ends: with_ends)
        functions = table(plan, optimizer_slots=2, seed=1, limits=Limits(max_rows=64))
        state = functions.init()
        found = functions.insert_(state, functions.read(columns))
        assert (found.reading.ends is not None) == with_ends == (found.read_only.reading.ends is not None)
        pooled.append(
            [*functions.pool(state, found), *functions.pool(state, functions.find(state, functions.read(columns)))]
        )
    torch.testing.assert_close(*pooled, rtol=1e-6, atol=1e-6)


def long_list(num, *, with_padding=False):
    """Sample 0 has two ids in the first lookup and `num` in the second, sample 1 has one: every row is 1."""
    cell = torch.cat([torch.zeros(2), torch.ones(num), torch.full((1,), 2.0)]).int()
    if with_padding:  # as many positions again, which hold nothing
        cell = torch.stack([cell, torch.full_like(cell, -1)], dim=1).flatten()
    row_P = torch.where(cell < 0, -1, 0).int()
    plan = table_plan([0, 0], (1,))
    init = initializer_tensors(plan, 1)[0], None
    rows = torch.ones(1, 1, 1)
    return rows, row_P, (torch.zeros(len(cell), dtype=torch.int64), cell, torch.zeros(2).int()), 2, init, (0,), (1,)


@pytest.mark.parametrize("num", [2**16 - 3, 2**16, 2**24 + 3])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_long_lists_are_counted_exactly(num, num_threads):
    (block,) = on_threads(num_threads, call, pool.pool, *long_list(num))
    assert block.flatten().tolist() == [2.0, float(torch.tensor(num, dtype=torch.float32)), 1.0, 0.0]


@pytest.mark.parametrize("num", [2**16 - 3, 2**16 + 1])
def test_padding_does_not_make_a_list_long(num):
    rows, row_P, reading, *rest = long_list(num, with_padding=True)
    rows, weight_P = rows + 0.3, torch.linspace(0.1, 2.0, len(row_P))
    kernel, definition = (
        op(rows, row_P, *reading, rest[0], *rest[1], *rest[2:], weight_P) for op in (pool.pool, pool.definition)
    )
    torch.testing.assert_close(kernel[0], definition[0], rtol=1e-6 if num > 2**16 else 1e-3, atol=0)
