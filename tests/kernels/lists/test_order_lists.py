import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.lists import order_lists
from recfx.kernels.lists.order_ids import order_ids
from tests.reference import MAX_INT64, MIN_INT64, on_threads, ragged

OPS = {"definition": order_lists.definition, "kernel": order_lists.order_lists}


@st.composite
def cases(draw):
    """Ragged features of one batch, weights for some, and a length of each lookup."""
    num_samples, spare = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    features, weights, lengths = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        id = st.integers(MIN_INT64, MAX_INT64)
        lists = draw(st.lists(st.lists(id, max_size=4), min_size=num_samples, max_size=num_samples))
        features.append(ragged(lists, spare=spare))
        g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        weight = torch.randn(features[-1].values.numel(), generator=g)
        weights.append(weight if draw(st.booleans()) else None)
        lengths.append(draw(st.integers(0, 3)))
    return features, weights, lengths


def arguments(features, weights, lengths):
    return [f.values for f in features], [f.offsets for f in features], weights, lengths


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_op_is_the_loop(op, case):
    features, weights, lengths = case
    expected, num_cells = [], sum(max(length, 1) for length in lengths)
    for b in range(features[0].num_samples):
        cell = b * num_cells
        for f, weight, length in zip(features, weights, lengths, strict=True):
            for i, p in enumerate(range(int(f.offsets[b]), int(f.offsets[b + 1]))):
                if length == 0 or i < length:
                    w = 1.0 if weight is None else float(weight[p])
                    expected.append((int(f.values[p]), cell + (i if length else 0), w))
            cell += max(length, 1)
    id, cell, weight = op(*arguments(*case))
    n, size = len(expected), sum(f.values.numel() for f in features)
    assert list(zip(id[:n].tolist(), cell[:n].tolist(), weight[:n].tolist(), strict=True)) == expected
    assert id[n:].tolist() == [0] * (size - n)
    assert cell[n:].tolist() == [-1] * (size - n)
    assert weight[n:].tolist() == [0.0] * (size - n)


@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_without_weights_and_lengths_it_is_order_ids(case):
    features, _, _ = case
    values, offsets = [f.values for f in features], [f.offsets for f in features]
    id, cell, _ = order_lists.order_lists(values, offsets, [None] * len(values), [0] * len(values))
    for a, b in zip((id, cell), order_ids(values, offsets), strict=True):
        assert torch.equal(a, b)


def large():
    lists = [[i, i + 1, i + 2][: i % 4] for i in range(1000)]
    features = [ragged(lists, spare=7), ragged(lists[::-1])]
    weights = torch.rand(features[0].values.numel(), generator=torch.Generator().manual_seed(0))
    return arguments(features, [weights, None], [2, 0])


def test_one_and_two_threads_give_the_same():
    one, two = (on_threads(n, order_lists.order_lists, *large()) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_list_sums():
    for op in (order_lists.list_sums, order_lists.list_sums_definition):
        f = ragged([[1.5, 2.0], [], [-3.0]], spare=2, dtype=torch.float32)
        assert op(f.values, f.offsets).tolist() == [3.5, 0.0, -3.0]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    torch.library.opcheck(order_lists.order_lists, large())
    _, offsets, weights, _ = large()
    torch.library.opcheck(order_lists.list_sums, (weights[0], offsets[0]))


def test_list_sums_count_ones_beyond_what_f32_can():
    ones, offsets = torch.ones(2**24 + 2), torch.tensor([0, 2**24 + 2], dtype=torch.int32)
    for op in (order_lists.list_sums, order_lists.list_sums_definition):
        assert op(ones, offsets).tolist() == [2**24 + 2]
