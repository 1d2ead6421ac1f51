import random

import pytest
import torch

from recfx.kernels.counters import NUM_UNIQUE, new_counters
from recfx.kernels.rows import adamw_rows, add_row_grads, sum_adamw_rows
from tests.kernels.rows import test_adamw_rows, test_add_row_grads
from tests.reference import on_threads, random_lists

OPS = {"definition": sum_adamw_rows.definition, "kernel": sum_adamw_rows.sum_adamw_rows_}
DUE = torch.tensor(True)
LISTS = {
    "no samples": [[], [], []],
    "no ids": [[[], []], [[], []], [[], []]],
    "one id": [[[5]], [[]], [[]]],
    "many": random_lists(random.Random(0), lookups=3, samples=60, longest=4, ids=range(9)),
}


def case(lists, dims, *, weighted=False, num_unique=9, seed=0):
    """rows, counters, unique_rows, hyper, and the occurrences: of some unique rows, if any, there is none."""
    _, inverse_P, reading, firsts, dims, blocks = test_add_row_grads.case(
        lists, [0, 1, 0], dims, seed, num_unique=num_unique
    )
    num_unique = min(num_unique, inverse_P.numel())
    inverse_P = torch.where(inverse_P < num_unique, inverse_P, -1)
    rows, _, counters, unique_rows = test_adamw_rows.case(sum(dims), num_unique, seed, num_rows=num_unique + 5)
    weight_P = torch.randn(inverse_P.numel()) if weighted else None
    occurrences = inverse_P, reading.cell, list(firsts), list(dims), blocks, weight_P
    return rows, counters, unique_rows, test_adamw_rows.HYPER, *occurrences


def call(op, rows, counters, *rest):
    rows, counters = rows.clone(), counters.clone()
    op(rows, counters, *rest)
    return rows, counters


def in_two(rows, counters, unique_rows, hyper, *occurrences):
    """The two operators that it replaces."""
    grads = torch.zeros(len(rows), rows.shape[2])
    add_row_grads.add_row_grads_(grads, *occurrences)
    adamw_rows.adamw_rows_(rows, grads, counters, unique_rows, hyper, DUE)
    assert not grads.any()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dims", [(8, 1), (16, 4, 2), (5,)], ids=str)
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_is_the_sum_and_then_adamw(op, dims, lists, weighted):
    arguments = case(lists, dims, weighted=weighted)
    rows, counters = call(op, *arguments)
    expected, _ = call(in_two, *arguments)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(counters, new_counters(step=1))
    untouched = arguments[2][int(arguments[1][NUM_UNIQUE]) :].long()
    assert torch.equal(rows[untouched], arguments[0][untouched])


def test_one_and_two_threads_give_the_bytes_of_the_two_operators():
    lists = random_lists(random.Random(0), lookups=3, samples=300, longest=4, ids=range(50))
    arguments = case(lists, (8, 1), num_unique=60)
    one, two = (on_threads(n, call, sum_adamw_rows.sum_adamw_rows_, *arguments)[0] for n in (1, 2))
    assert torch.equal(one, two)
    assert torch.equal(one, call(in_two, *arguments)[0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    for weighted in (False, True):
        torch.library.opcheck(sum_adamw_rows.sum_adamw_rows_, case(LISTS["many"], (8, 1), weighted=weighted))
