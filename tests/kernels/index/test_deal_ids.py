"""deal_ids_ against a dict for each rank, in C++ and in its definition."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.definitions import definitions
from recfx.kernels.index import deal_ids
from recfx.kernels.index.deal_ids import deal_ids_
from recfx.kernels.index.owner import owner
from tests.kernels.index.test_owner import mixed
from tests.reference import EXTREMES, id_of_hash, on_threads

VOCABULARIES = torch.tensor([0, 3, 3, 70], dtype=torch.int32)
TRAINS = torch.tensor([True, False, True, False])
FIRST = 5


def dealt(ids, cells, ranks, capacity, distinct, trains, by_definition=False):
    message = torch.full((ranks, FIRST + capacity + capacity // 2 + 2), 77)
    args = message, FIRST, ids, cells, VOCABULARIES, trains, capacity, distinct
    if by_definition:
        with definitions():
            place, counts = deal_ids_(*args)
    else:
        place, counts = deal_ids_(*args)
    return message, place, counts


def oracle(ids, cells, ranks, capacity, distinct, trains):
    buckets = [{} for _ in range(ranks)]
    message = torch.full((ranks, FIRST + capacity + capacity // 2 + 2), 77)
    place, counts = torch.full_like(cells, -1), torch.zeros(ranks, 2, dtype=torch.int64)
    trained = [set() for _ in range(ranks)]
    for k, (id, cell) in enumerate(zip(ids.tolist(), cells.tolist(), strict=True)):
        if cell < 0:
            continue
        vocabulary = int(VOCABULARIES[cell % 4])
        rank = int(owner(ids[k : k + 1], VOCABULARIES[cell % 4][None], ranks))
        key = (vocabulary, id) if distinct else (vocabulary, id, k)
        entry = buckets[rank].setdefault(key, len(buckets[rank]))
        counts[rank, 1] += 1
        if trains is None or trains[cell % 4]:
            trained[rank].add(entry)
        if entry < capacity:
            place[k] = rank * capacity + entry
    for rank, bucket in enumerate(buckets):
        counts[rank, 0] = len(bucket)
        kept = list(bucket)[:capacity]
        tags = [v << 1 | (k in trained[rank]) for k, (v, *_) in enumerate(kept)]
        empty = capacity - len(kept)
        message[rank, FIRST : FIRST + capacity] = torch.tensor([key[1] for key in kept] + [0] * empty)
        words = torch.tensor(tags + [-1] * empty, dtype=torch.int32).view(torch.int64)
        message[rank, FIRST + capacity : FIRST + capacity + capacity // 2] = words
    return message, place, counts


def ids_and_cells(num, num_distinct, seed, padding):
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(-(2**62), 2**62, (num_distinct,), generator=generator)
    pool[: min(4, num_distinct)] = torch.tensor([-1, 0, -(2**63), 2**63 - 1])[: min(4, num_distinct)]
    ids = pool[torch.randint(0, num_distinct, (num,), generator=generator)]
    cells = torch.randint(0, 4 * max(num, 1), (num,), generator=generator).int()
    if padding:
        cells[torch.rand(num, generator=generator) < 0.3] = -1
        cells[num - num // 4 :] = -1
    return ids, cells


@pytest.mark.parametrize("by_definition", [False, True])
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("trains", [None, TRAINS])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("num", "num_distinct", "padding"), [(0, 1, False), (1, 1, False), (40, 5, True), (500, 300, True)]
)
def test_is_a_dict_for_each_rank(ranks, num, num_distinct, padding, trains, distinct, by_definition):
    ids, cells = ids_and_cells(num, num_distinct, ranks, padding)
    for capacity in (2, 16, 2 * num + 2):
        args = ids, cells, ranks, capacity, distinct, trains
        for got, expected in zip(dealt(*args, by_definition), oracle(*args), strict=True):
            assert torch.equal(got, expected)


@settings(deadline=None, max_examples=60)
@given(
    places=st.lists(st.tuples(st.sampled_from(EXTREMES) | st.integers(0, 5), st.integers(-1, 15)), max_size=40),
    ranks=st.integers(1, 7),
    capacity=st.sampled_from([0, 2, 4, 64]),
    distinct=st.booleans(),
    trains=st.none() | st.lists(st.booleans(), min_size=4, max_size=4),
    threads=st.integers(1, 2),
)
def test_any_ids_with_padding_anywhere(places, ranks, capacity, distinct, trains, threads):
    ids = torch.tensor([id for id, _ in places], dtype=torch.int64)
    cells = torch.tensor([cell for _, cell in places], dtype=torch.int32)
    args = ids, cells, ranks, capacity, distinct, None if trains is None else torch.tensor(trains)
    expected = oracle(*args)
    for by_definition in (False, True):
        assert all(map(torch.equal, on_threads(threads, dealt, *args, by_definition), expected))


def test_threads_and_earlier_calls_change_nothing():
    small, large = ids_and_cells(300, 100, 0, True), ids_and_cells(20_000, 6_000, 1, True)
    expected = [dealt(*args, 3, 4096, True, None, True) for args in (small, large, small)]
    for threads in (1, 2):
        for args, results in zip((small, large, small), expected, strict=True):
            assert all(map(torch.equal, on_threads(threads, dealt, *args, 3, 4096, True, None), results))


def in_a_new_thread(function, *args):
    """Where the kernel has no index of an earlier call."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_ids_whose_hashes_begin_at_one_slot_and_have_one_tag():
    """More of them than a probe looks at in a row, and than the index has slots at first; each is met twice."""
    num, golden, mask = 1500, 0x9E3779B97F4A7C15, 2**64 - 1
    hashes = [0xABCD << 48 | k << 33 | 5 for k in range(num)]
    # id_of_hash has salt 0, `owner` the salt `golden`: vocabulary 0 adds `golden` to the id before it is salted.
    unsigned = [((id_of_hash(h, 0) + golden & mask) ^ golden) - golden & mask for h in hashes]
    ids = torch.tensor([x - 2**64 * (x >= 2**63) for x in unsigned])
    assert owner(ids, torch.zeros(num, dtype=torch.int32), 2**31).tolist() == [h >> 33 for h in hashes]
    args = ids.repeat(2), torch.zeros(2 * num, dtype=torch.int32), 3, num, True, None
    for got, expected in zip(in_a_new_thread(dealt, *args), oracle(*args), strict=True):
        assert torch.equal(got, expected)


def test_one_id_of_two_vocabularies_with_one_slot_and_tag():
    id, vocabularies, golden = 176, (409, 15315), 0x9E3779B97F4A7C15
    a, b = (mixed((id + (v + 1) * golden & 2**64 - 1) ^ golden) for v in vocabularies)
    assert a >> 48 == b >> 48
    assert a % 2**20 == b % 2**20
    message, ids = torch.zeros(1, 6, dtype=torch.int64), torch.full((4,), id)
    of_cells = torch.tensor(vocabularies, dtype=torch.int32)
    place, counts = deal_ids_(message, 0, ids, torch.arange(4, dtype=torch.int32), of_cells, None, 4, True)
    assert place.tolist() == [0, 1, 0, 1]
    assert counts.tolist() == [[2, 4]]
    assert message[0, 4:].view(torch.int32).tolist() == [v << 1 | 1 for v in vocabularies] + [-1, -1]


def test_an_id_of_65_535_calls_ago_is_new():
    """A slot holds its call's number modulo that. The third id of a call of old is still in the memory of entries."""
    cell, message = torch.zeros(3, dtype=torch.int32), torch.zeros(1, 6, dtype=torch.int64)

    def deal(ids):
        return deal_ids_(message, 0, ids, cell[: len(ids)], VOCABULARIES, None, 4, True)[0].tolist()

    def check():
        once, other = torch.tensor([3, 4, 5]), torch.tensor([6])
        assert deal(once) == [0, 1, 2]
        for _ in range(2**16 - 2):
            deal(other)
        assert deal(once[2:]) == [0]
        assert message[0, :4].tolist() == [5, 0, 0, 0]

    in_a_new_thread(check)


def test_the_definition_compiles_whole():
    ids, cells = ids_and_cells(64, 20, 2, True)

    def run(message, ids, cells, trains):
        return deal_ids.definition(message, FIRST, ids, cells, VOCABULARIES, trains, 32, True)

    message = torch.full((2, FIRST + 50), 77)
    place, counts = torch.compile(run, fullgraph=True, backend="aot_eager")(message, ids, cells, TRAINS)
    assert all(map(torch.equal, (message, place, counts), dealt(ids, cells, 2, 32, True, TRAINS)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("trains", [None, TRAINS])
def test_opcheck(trains):
    message = torch.zeros(2, FIRST + 48, dtype=torch.int64)
    torch.library.opcheck(deal_ids_, (message, FIRST, *ids_and_cells(64, 20, 2, True), VOCABULARIES, trains, 32, True))


def test_the_definition_is_one_graph_of_fixed_shapes():
    ids, cells = ids_and_cells(64, 20, 2, True)
    expected = dealt(ids, cells, 2, 32, True, None)

    def run(ids, cells):
        message = torch.full((2, FIRST + 50), 77)
        with definitions():
            place, counts = deal_ids_(message, FIRST, ids, cells, VOCABULARIES, None, 32, True)
        return message, place, counts

    graph = torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(
        ids, cells
    )
    assert all(map(torch.equal, graph(ids, cells), expected))


@pytest.mark.parametrize("capacity", [3, -2, 64])
def test_a_capacity_that_does_not_fit(capacity):
    message = torch.zeros(2, 40, dtype=torch.int64)
    ids, cells = ids_and_cells(8, 4, 0, False)
    with pytest.raises(RuntimeError, match=f"capacity: got {capacity}, expected an even number"):
        deal_ids_(message, 0, ids, cells, VOCABULARIES, None, capacity, True)


BAD = {
    "no ranks": ({"message": torch.zeros(0, 40, dtype=torch.int64)}, "message: got 0 ranks, expected at least 1"),
    "i32 message": ({"message": torch.zeros(2, 40, dtype=torch.int32)}, "got other tensors than an i64 message"),
    "i32 ids": ({"id_P": torch.zeros(8, dtype=torch.int32)}, "got other tensors than an i64 message"),
    "few ids": ({"id_P": torch.zeros(3, dtype=torch.int64)}, "got other tensors than an i64 message"),
    "i64 cells": ({"cell_P": torch.zeros(8, dtype=torch.int64)}, "got other tensors than an i64 message"),
    "no lookups": ({"vocabularies": torch.zeros(0, dtype=torch.int32)}, "vocabularies: got none, expected one"),
    "few trains": ({"trains": TRAINS[:3].clone()}, "trains: got 3 items, expected 4 booleans"),
    "i64 trains": ({"trains": torch.ones(4, dtype=torch.int64)}, "trains: got 4 items, expected 4 booleans"),
    "first": ({"first": -1}, "capacity: got 4, expected an even number"),
}


@pytest.mark.parametrize(("changed", "error"), BAD.values(), ids=BAD)
def test_bad_arguments(changed, error):
    good = {
        "message": torch.zeros(2, 40, dtype=torch.int64),
        "first": 0,
        "id_P": torch.arange(8),
        "cell_P": torch.arange(8, dtype=torch.int32),
        "vocabularies": VOCABULARIES,
        "trains": TRAINS,
        "capacity": 4,
        "distinct": True,
    }
    deal_ids_(*good.values())
    with pytest.raises(RuntimeError, match=error):
        deal_ids_(*(good | changed).values())
