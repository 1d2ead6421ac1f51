"""deal_ids_ against a dict for each rank, in C++ and in its definition."""

import pytest
import torch

from recfx.kernels.definitions import definitions
from recfx.kernels.index.deal_ids import deal_ids_
from recfx.kernels.index.owner import owner

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


def test_threads_and_earlier_calls_change_nothing():
    small, large = ids_and_cells(300, 100, 0, True), ids_and_cells(20_000, 6_000, 1, True)
    expected = [dealt(*args, 3, 4096, True, None, True) for args in (small, large, small)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for args, results in zip((small, large, small), expected, strict=True):
            assert all(map(torch.equal, dealt(*args, 3, 4096, True, None), results))


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
