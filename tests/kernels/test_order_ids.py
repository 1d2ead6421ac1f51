import random

import pytest
import torch
from hypothesis import given, settings

from recfx.kernels import order_ids
from tests.reference import on_threads, ragged, random_lists, reading_of, streams


def call(op, lists, spare):
    columns = [ragged(lookup, spare=spare) for lookup in lists]
    return op([c.values for c in columns], [c.offsets for c in columns])


@given(stream=streams(max_batches=1))
@settings(max_examples=100, deadline=None)
def test_kernel_is_definition_is_loop(stream):
    expected = stream.readings()[0]
    for op in (order_ids.definition, order_ids.order_ids):
        id, cell = call(op, stream.batches[0], stream.spare)
        assert torch.equal(id, expected.id)
        assert torch.equal(cell, expected.cell)


@given(stream=streams(max_batches=1))
@settings(max_examples=50, deadline=None)
def test_ids_named_by_their_places_are_those_of_the_views(stream):
    columns = [ragged(lookup, spare=stream.spare) for lookup in stream.batches[0]]
    expected = order_ids.order_ids([c.values for c in columns], [c.offsets for c in columns])
    rng = random.Random(len(columns))
    which = [rng.randrange(2) for _ in columns]  # two tensors of values, one of offsets, with gaps between the columns
    values, offsets, places = [torch.zeros(1, dtype=torch.int64)] * 2, torch.zeros(3, dtype=torch.int32), []
    for column, v in zip(columns, which, strict=True):
        places += [v, len(values[v]), len(column.values), 0, len(offsets)]
        values[v] = torch.cat([values[v], column.values, torch.full((2,), -7)])
        offsets = torch.cat([offsets, column.offsets, torch.full((1,), -7, dtype=torch.int32)])
    num_samples = columns[0].num_samples
    for op in (order_ids.order_ids_at, order_ids._at_definition):
        assert all(map(torch.equal, op(values, [offsets], places, num_samples), expected))


def test_one_and_two_threads_give_the_same_order():
    lists = random_lists(random.Random(0), lookups=6, samples=301, longest=4, ids=range(50))
    expected = reading_of(lists, range(6), spare=3)
    for threads in (1, 2):
        id, cell = on_threads(threads, call, order_ids.order_ids, lists, 3)
        assert torch.equal(id, expected.id)
        assert torch.equal(cell, expected.cell)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    columns = [ragged([[1, 2], []], spare=1), ragged([[1], [3, 3]])]
    torch.library.opcheck(order_ids.order_ids, ([c.values for c in columns], [c.offsets for c in columns]))
    whole = torch.cat([c.offsets for c in columns])
    at = ([c.values for c in columns], [whole], [0, 0, 3, 0, 0, 1, 0, 3, 0, 3], 2)
    torch.library.opcheck(order_ids.order_ids_at, at)
