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
