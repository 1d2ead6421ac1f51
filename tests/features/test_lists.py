import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx import features as ops
from recfx.types import Ragged
from tests.reference import ragged
from tests.reference_features import IDS, LISTS, lists_of, nested

SMALL = st.lists(st.lists(st.integers(-9, 9), max_size=4), min_size=1, max_size=5)
NESTED = st.lists(st.lists(st.lists(IDS, max_size=3), max_size=4), max_size=4)
SIDES = st.sampled_from(["left", "right"])
WORKED = [[[10], [11, 12, 13], []], [[14, 15, 16, 17]], [[], [18, 19]]]


def weighted(column):
    return column._replace(weights=torch.arange(column.values.numel()) + 0.5)


def cut(items, longest, side):
    return items[max(len(items) - longest, 0) :] if side == "left" else items[:longest]


def cut_and_pad(lists, count, side, pad):
    kept = cut(lists, count, side)
    return [[]] * (count - len(kept)) * (pad == "left") + kept + [[]] * (count - len(kept)) * (pad == "right")


@given(lists=SMALL, dim=st.integers(1, 3), spare=st.integers(0, 2), fill=st.sampled_from([0, -3]))
@settings(max_examples=100, deadline=None)
def test_select_dense_and_to_dense_are_the_first_values(lists, dim, spare, fill):
    expected = [(items + [fill] * dim)[:dim] for items in lists]
    column = ragged(lists, spare=spare, dtype=torch.float32)
    before = column.values.clone()
    assert ops.select_dense(column, dim, fill=fill).tolist() == expected
    assert ops.select_dense(column, dim, fill=fill).dtype == torch.float32
    assert torch.equal(column.values, before)
    ids = ops.to_dense(ragged(lists, spare=spare), dim, fill=fill)
    assert ids.tolist() == expected
    assert ids.dtype == torch.int64


def test_to_dense_keeps_the_extremes_and_wide_rows():
    lists = [[2**63 - 1, -(2**63)], [], [2**53 + 1]]
    assert ops.to_dense(ragged(lists), 3, fill=-1).tolist() == [(items + [-1] * 3)[:3] for items in lists]
    assert ops.to_dense(ragged([[], []]), 2).tolist() == [[0, 0], [0, 0]]
    assert ops.to_dense(nested([[[1], [2, 3]], []]), 2).tolist() == [[1, 0], [2, 3]]


def test_select_dense_of_a_dense_column():
    x = torch.arange(6.0).view(2, 3)
    assert ops.select_dense(x).tolist() == [[0], [3]]
    assert ops.select_dense(x, 2).tolist() == [[0, 1], [3, 4]]


def test_padding_samples_read_nothing():
    column = Ragged(torch.tensor([5.0, 77.0, 77.0]), torch.tensor([0, 1, 1, 1], dtype=torch.int32))
    assert ops.select_dense(column).tolist() == [[5], [0], [0]]


def test_select_ragged():
    column = ragged([[1], []])
    assert ops.select_ragged(column) is column
    with pytest.raises(TypeError, match="column: got Tensor, expected Ragged"):
        ops.select_ragged(torch.ones(2, 1))


@given(samples=st.integers(0, 4), dim=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_from_dense_is_undone_by_to_dense(samples, dim):
    x = torch.arange(samples * dim).view(samples, dim)
    column = ops.from_dense(x)
    assert lists_of(column) == x.tolist()
    assert torch.equal(ops.to_dense(column, dim), x)
    assert column.offsets.dtype == torch.int32


@given(lists=LISTS, longest=st.integers(0, 5), side=SIDES, spare=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_truncate_is_a_slice_of_each_list(lists, longest, side, spare):
    column = weighted(ragged(lists, spare=spare))
    kept, before = ops.truncate(column, longest, side=side), [t.clone() for t in column[:3]]
    assert lists_of(kept) == [cut(items, longest, side) for items in lists]
    assert lists_of(kept, kept.weights) == [cut(w, longest, side) for w in lists_of(column, column.weights)]
    assert kept.values.numel() == min(column.values.numel(), longest * len(lists))
    assert all(torch.equal(a, b) for a, b in zip(column[:3], before, strict=True))
    assert ops.truncate(ragged(lists), longest, side=side).weights is None


def test_truncate_golden_values():
    kept = ops.truncate(ragged([[-7], [-1], [-2, -3], [-4, -5, -6]]), 2, side="left")
    assert lists_of(kept) == [[-7], [-1], [-2, -3], [-5, -6]]


def test_truncate_many_is_truncate_each():
    columns = {"a": weighted(ragged([[1, 2, 3], []])), "b": ragged([[4.0], [5.0, 6.0]], dtype=torch.float32)}
    together = ops.truncate(columns, 1, side="right")
    assert list(together) == ["a", "b"]
    for name, column in columns.items():
        alone = ops.truncate(column, 1, side="right")
        for a, b in zip(together[name].parts.values(), alone.parts.values(), strict=True):
            assert torch.equal(a, b)
    assert ops.truncate({}, 1, side="left") == {}


@given(samples=NESTED, longest=st.integers(0, 3), side=SIDES, spare=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_truncate_reaches_the_innermost_lists_of_a_nested_column(samples, longest, side, spare):
    kept = ops.truncate(nested(samples, spare=spare), longest, side=side)
    assert lists_of(kept) == [[cut(items, longest, side) for items in lists] for lists in samples]


@given(samples=NESTED, count=st.integers(1, 4), side=SIDES, pad=SIDES, spare=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_truncate_lists_cuts_and_pads_the_outer_list(samples, count, side, pad, spare):
    column = nested(samples, spare=spare, weighted=True)
    kept, before = ops.truncate_lists(column, count, side=side, pad=pad), [t.clone() for t in column[:3]]
    assert lists_of(kept) == [cut_and_pad(lists, count, side, pad) for lists in samples]
    weights = lists_of(column, column.weights)
    assert lists_of(kept, kept.weights) == [cut_and_pad(lists, count, side, pad) for lists in weights]
    assert kept.offsets.numel() == len(samples) * count + 1
    assert all(torch.equal(a, b) for a, b in zip(column[:3], before, strict=True))


def test_truncate_lists_golden_values():
    left = [[[11, 12, 13], []], [[14, 15, 16, 17], []], [[], [18, 19]]]
    assert lists_of(ops.truncate_lists(nested(WORKED), 2, side="left")) == left
    left[1] = [[], [14, 15, 16, 17]]
    assert lists_of(ops.truncate_lists(nested(WORKED), 2, side="left", pad="left")) == left


def three_levels() -> Ragged:
    inner = nested([[[1], [2, 3]], [[4]], [], [[5], [6], [7]]])
    return inner._replace(outer=(torch.tensor([0, 2, 4], dtype=torch.int32), *inner.outer))


def test_deeper_levels_are_kept():
    assert lists_of(three_levels()) == [[[[1], [2, 3]], [[4]]], [[], [[5], [6], [7]]]]
    assert lists_of(ops.truncate(three_levels(), 1, side="left")) == [[[[1], [3]], [[4]]], [[], [[5], [6], [7]]]]
    cut_lists = ops.truncate_lists(three_levels(), 2, side="right")
    assert lists_of(cut_lists) == [[[[1], [2, 3]], [[4], []]], [[[], []], [[5], [6]]]]
    assert lists_of(ops.flatten(three_levels())) == [[[1, 2, 3], [4]], [[], [5, 6, 7]]]
    assert lists_of(ops.flatten(ops.flatten(three_levels()))) == [[1, 2, 3, 4], [5, 6, 7]]


@given(samples=NESTED, spare=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_flatten_is_concatenation(samples, spare):
    flat = ops.flatten(nested(samples, spare=spare, weighted=True))
    assert lists_of(flat) == [[id for items in lists for id in items] for lists in samples]
    assert flat.weights is not None


def test_check_length_raises_in_eager_code():
    column = ragged([[1, 2], [], [3]])
    assert int(ops.check_length(column, 2)) == 0
    with pytest.raises(ValueError, match=r"hist: got a list of 2 values, expected at most 1\. Truncate it"):
        ops.check_length(column, 1, "hist")


def test_errors():
    column = ragged([[1]])
    with pytest.raises(ValueError, match="column: got lists nested 1 level, expected at least 2"):
        ops.flatten(column)
    with pytest.raises(ValueError, match=r"column: got lists nested 1 level, expected at least 2\. Use truncate"):
        ops.truncate_lists(column, 2, side="left")
    with pytest.raises(ValueError, match="longest: got -1, expected at least 0"):
        ops.truncate(column, -1, side="left")
    with pytest.raises(ValueError, match="count: got 0, expected at least 1"):
        ops.truncate_lists(nested([[[1]]]), 0, side="left")
    with pytest.raises(TypeError, match=r"hist: got Tensor, expected Ragged\. Declare it varlen"):
        ops.truncate({"hist": torch.ones(1, 1)}, 1, side="left")


def test_select_dense_of_a_list_stands_side_by_side_and_split_dense_undoes_it():
    columns = [ragged(lists, dtype=torch.float32) for lists in ([[1.0], [2.0, 9.0]], [[], [3.0]])]
    x = ops.select_dense(columns, fill=-1.0)
    assert x.tolist() == [[1, -1], [2, 3]]
    assert ops.select_dense(columns, 2).tolist() == [[1, 0, 0, 0], [2, 9, 3, 0]]
    apart = ops.split_dense(x, ["a", "b"])
    assert {name: lists_of(c) for name, c in apart.items()} == {"a": [[1], [2]], "b": [[-1], [3]]}
    assert torch.equal(ops.select_dense(list(apart.values())), x)
    with pytest.raises(ValueError, match="x: got 2 columns, expected 1, one per name"):
        ops.split_dense(x, ["a"])
    with pytest.raises(
        TypeError, match=r"column: got torch\.int64 values, expected torch\.float32 in a list of columns"
    ):
        ops.select_dense([ragged([[1]])])
