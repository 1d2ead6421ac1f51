import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.lists import cross_lists as module
from tests.reference import on_threads, ragged, random_lists
from tests.reference_features import IDS, cross_pair, distinct

OPS = {"definition": module.definition, "kernel": module.cross_lists}
GOLDEN = {
    (1001, 1): -7808879811642834040,
    (1002, 2): -4967483181219983279,
    (1, 2): 2346165840139155392,
    (2, 1): -1274954391096260390,
}


def loop(x, x_weights, y, y_weights, capacity):
    values, weights, ends = [], [], [0]
    for sample in range(len(x)):
        a, b = distinct(x[sample], x_weights[sample]), distinct(y[sample], y_weights[sample])
        for i in a:
            values += [cross_pair(i, j) for j in b]
            weights += [a[i] * b[j] for j in b]
        ends.append(min(len(values), capacity))
    rest = [0] * (capacity - len(values))
    return (values + rest)[:capacity], (weights + rest)[:capacity], ends, max(len(values) - capacity, 0)


@st.composite
def sides(draw):
    samples = draw(st.integers(0, 4))
    lists = st.lists(st.lists(IDS, max_size=4), min_size=samples, max_size=samples)
    return draw(lists), draw(lists)


def call(op, x, y, capacity, *, weighted=(False, False), spare=0):
    columns = [ragged(lists, spare=spare) for lists in (x, y)]
    weights = [torch.arange(c.values.numel()) * 0.25 + 2 if w else None for c, w in zip(columns, weighted, strict=True)]
    return op(
        columns[0].values, columns[0].offsets, weights[0], columns[1].values, columns[1].offsets, weights[1], capacity
    )


def weights_of(lists, weighted):
    numbers = iter(range(10_000))
    return [[next(numbers) * 0.25 + 2 if weighted else 1.0 for _ in items] for items in lists]


@pytest.mark.parametrize("op", OPS)
@given(
    lists=sides(),
    capacity=st.integers(0, 40),
    weighted=st.tuples(st.booleans(), st.booleans()),
    spare=st.integers(0, 2),
)
@settings(max_examples=80, deadline=None)
def test_is_a_double_loop(op, lists, capacity, weighted, spare):
    got = call(OPS[op], *lists, capacity, weighted=weighted, spare=spare)
    weights = [weights_of(side, w) for side, w in zip(lists, weighted, strict=True)]
    assert tuple(t.tolist() for t in got) == loop(lists[0], weights[0], lists[1], weights[1], capacity)


@pytest.mark.parametrize("op", OPS)
def test_golden_values(op):
    for (x, y), value in GOLDEN.items():
        assert call(OPS[op], [[x]], [[y]], 1)[0].tolist() == [value]


def test_long_lists_with_many_duplicates():
    rng = random.Random(0)
    x, y = (random_lists(rng, lookups=1, samples=5, longest=200, ids=range(-40, 40))[0] for _ in range(2))
    total = sum(len({*a}) * len({*b}) for a, b in zip(x, y, strict=True))
    for capacity in (total, total - 777):
        kernel, definition = (call(op, x, y, capacity, weighted=(True, True)) for op in OPS.values())
        assert all(torch.equal(a, b) for a, b in zip(kernel, definition, strict=True))
        assert int(kernel[3]) == total - capacity
        one, two = (on_threads(n, call, module.cross_lists, x, y, capacity) for n in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    x, y = ragged([[1, 2], []], spare=1), ragged([[1], [3, 3]])
    for weights in (None, torch.ones(3)):
        torch.library.opcheck(module.cross_lists, (x.values, x.offsets, weights, y.values, y.offsets, weights, 5))
