import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings

from recfx.kernels.lists import order_ids, order_lists
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


@given(stream=streams(max_batches=1))
@settings(max_examples=30, deadline=None)
def test_ends_are_where_the_cells_end(stream):
    lists = stream.batches[0]
    id, cell, ends = call(order_ids.order_ids_ends, lists, stream.spare)
    assert all(map(torch.equal, (id, cell), call(order_ids.order_ids, lists, stream.spare)))
    lengths = [len(items) for of_sample in zip(*lists, strict=True) for items in of_sample]
    assert ends.tolist() == list(accumulate(lengths))


def test_one_and_two_threads_give_the_same_order():
    lists = random_lists(random.Random(0), lookups=6, samples=301, longest=4, ids=range(50))
    expected = reading_of(lists, range(6), spare=3)
    for threads in (1, 2):
        id, cell = on_threads(threads, call, order_ids.order_ids, lists, 3)
        assert torch.equal(id, expected.id)
        assert torch.equal(cell, expected.cell)


OUTSIDE = {
    "beyond": ([0, 3, 99], "got 99 at place 2, expected 3 to 8"),
    "far beyond": ([0, 1, 900_000_000], "got 900000000 at place 2, expected 1 to 8"),
    "below 0": ([-1, 2, 4], "got -1 at place 0, expected 0 to 8"),
    "ends below 0": ([0, 1, -5], "got -5 at place 2, expected 1 to 8"),
    "falling": ([0, 6, 2], "got 2 at place 2, expected 6 to 8"),
    "falling from beyond": ([0, 9, 4], "got 9 at place 1, expected 0 to 8"),
}


@pytest.mark.parametrize(("offsets", "says"), OUTSIDE.values(), ids=OUTSIDE)
def test_offsets_outside_the_values_are_an_error_that_names_the_list(offsets, says):
    values = [torch.arange(4), torch.arange(1, 9)]
    of_lookup = [torch.tensor([0, 2, 4]).int(), torch.tensor(offsets).int()]
    whole, places = torch.cat(of_lookup), [0, 0, 4, 0, 0, 1, 0, 8, 0, 3]
    calls = (
        lambda: order_ids.definition(values, of_lookup),
        lambda: order_ids.order_ids(values, of_lookup),
        lambda: order_ids.order_ids_at(values, [whole], places, 2),
        lambda: order_lists.definition(values, of_lookup, [None, None], [0, 2]),
        lambda: order_lists.order_lists(values, of_lookup, [None, None], [0, 2]),
    )
    for call_it in calls:
        with pytest.raises(RuntimeError, match=f"^offsets of lookup 1: {says}: offsets never fall"):
            call_it()


def test_lookups_of_unequal_samples_and_weights_that_are_too_few_are_errors():
    values, offsets = [torch.arange(4)] * 2, [torch.tensor([0, 2, 4]).int(), torch.tensor([0, 4]).int()]
    for op in (order_ids.definition, order_ids.order_ids):
        with pytest.raises(RuntimeError, match="offsets of lookup 1: got 2 numbers, expected 3, as many"):
            op(values, offsets)
    for op in (order_lists.definition, order_lists.order_lists):
        with pytest.raises(RuntimeError, match="weights of lookup 1: got 3, expected 4, one for each id"):
            op(values, [offsets[0]] * 2, [None, torch.zeros(3)], [0, 0])


def test_lists_may_begin_behind_the_first_value():
    values, offsets = (
        [torch.arange(8), torch.arange(10, 14)],
        [torch.tensor([3, 5, 5]).int(), torch.tensor([1, 1, 4]).int()],
    )
    for op in (order_ids.definition, order_ids.order_ids):
        id, cell = op(values, offsets)
        assert id.tolist() == [3, 4, 11, 12, 13, *[0] * 7]
        assert cell.tolist() == [0, 0, 3, 3, 3, *[-1] * 7]
    for op in (order_lists.definition, order_lists.order_lists):
        for lengths, expected in (([0, 0], [3, 4, 11, 12, 13]), ([1, 0], [3, 11, 12, 13])):
            id, cell, weight = op(values, offsets, [None, None], lengths)
            assert id[cell >= 0].tolist() == expected
            assert weight.tolist() == (cell >= 0).float().tolist()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    columns = [ragged([[1, 2], []], spare=1), ragged([[1], [3, 3]])]
    torch.library.opcheck(order_ids.order_ids, ([c.values for c in columns], [c.offsets for c in columns]))
    torch.library.opcheck(order_ids.order_ids_ends, ([c.values for c in columns], [c.offsets for c in columns]))
    whole = torch.cat([c.offsets for c in columns])
    at = ([c.values for c in columns], [whole], [0, 0, 3, 0, 0, 1, 0, 3, 0, 3], 2)
    torch.library.opcheck(order_ids.order_ids_at, at)
