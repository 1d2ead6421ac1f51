"""Ragged columns of nested Python lists."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from recfx.data import reader, varlen
from recfx.types import Ragged, pack
from tests.data.rows import lists_of


def same(a: Ragged, b: Ragged) -> bool:
    return a.parts.keys() == b.parts.keys() and all(
        torch.equal(t, b.parts[name]) and t.dtype == b.parts[name].dtype for name, t in a.parts.items()
    )


def test_ids_numbers_and_strings():
    ids = Ragged.from_lists([[1, 2], [], None, [3]])
    assert same(ids, Ragged(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2, 2, 3], dtype=torch.int32)))
    numbers = Ragged.from_lists([[1, 0.5], [float("nan")]])
    assert numbers.values.dtype == torch.float32
    assert numbers.values[:2].tolist() == [1.0, 0.5]
    strings = Ragged.from_lists([["a", b"bc"], ["é", ""]])
    assert lists_of(strings, 2) == [[b"a", b"bc"], ["é".encode(), b""]]
    assert strings.num_samples == 2
    assert pack({"ids": ids, "same": ids})["ids"].values.tolist() == [1, 2, 3]


@given(st.lists(st.none() | st.lists(st.none() | st.lists(st.integers(-(2**63), 2**63 - 1))), min_size=1))
def test_two_deep_lists_come_back(lists):
    if not any(lists) or all(inner is None for some in lists if some for inner in some):
        return
    column = Ragged.from_lists(lists, torch.int64)
    assert lists_of(column, len(lists)) == [[inner or [] for inner in some or []] for some in lists]


def test_as_a_reader_lays_them_out(tmp_path):
    rows = {"ids": [[1, 2**40], [], [3]], "deep": [[[1], []], [], [[2, 3]]], "x": [[0.5], [1.0, 2.0], []],
            "words": [["a", "bc"], [], ["d"]], "deep_words": [[["a"], []], [], [["bc", ""]]]}  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    dtypes = {"x": torch.float32, "words": torch.uint8, "deep_words": torch.uint8}
    columns = [varlen(n, dtypes.get(n, torch.int64), depth=1 + n.startswith("deep")) for n in rows]
    (batch,) = reader(tmp_path / "a.parquet", columns, 3)
    for name, lists in rows.items():
        capacity = batch[name].values.shape[0]
        column = Ragged.from_lists(lists, capacity=capacity)
        assert torch.equal(column.values, batch[name].values)
        assert lists_of(column, 3) == lists_of(batch[name], 3)
        assert len(column.outer) == len(batch[name].outer)


def test_64_bits_stay():
    high = 2**64 - 1
    assert Ragged.from_lists([[high, 2**63, 5]]).values.tolist() == [-1, -(2**63), 5]
    assert Ragged.from_lists([np.array([high], np.uint64)]).values.tolist() == [-1]
    assert Ragged.from_lists([[np.uint64(high)], [np.int8(3)]]).values.tolist() == [-1, 3]
    assert Ragged.from_lists([[2**53 + 1], [-(2**63)]]).values.tolist() == [2**53 + 1, -(2**63)]
    with pytest.raises(ValueError, match=rf"lists: got -1 at lists\[1\]\[0\] and {high} at lists\[0\]\[1\], expected"):
        Ragged.from_lists([[1, high], [-1]])
    for number in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"lists\[0\]\[1\]: got {number}, expected 64 bits"):
            Ragged.from_lists([[1, number]])


def test_arrays_and_tensors():
    ids = np.array([5, 6, 7])
    assert same(Ragged.from_lists([ids[:2], ids[2:]]), Ragged.from_lists([[5, 6], [7]]))
    assert same(Ragged.from_lists((ids[:2].astype(np.int16), None, ids[2:])), Ragged.from_lists([[5, 6], [], [7]]))
    assert same(Ragged.from_lists(torch.arange(6).view(3, 2)), Ragged.from_lists([[0, 1], [2, 3], [4, 5]]))
    assert same(
        Ragged.from_lists(np.arange(8).reshape(2, 2, 2)), Ragged.from_lists([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    )
    assert same(Ragged.from_lists(np.array([[0.5], [1]])), Ragged.from_lists([[0.5], [1]]))
    of_lists = np.empty(2, object)
    of_lists[:] = [[1, 2], [3]]
    assert same(Ragged.from_lists(of_lists), Ragged.from_lists([[1, 2], [3]]))
    assert Ragged.from_lists([np.array([1, 2])], torch.float32).values.dtype == torch.float32
    assert lists_of(Ragged.from_lists(np.array([["a"], ["bc"]])), 2) == [[b"a"], [b"bc"]]


def test_weights_and_capacity():
    column = Ragged.from_lists([[1, 2], [], [3]], weights=[[0.5, 1], [], [2]], capacity=5)
    assert column.values.tolist() == [1, 2, 3, 0, 0]
    assert column.weights.tolist() == [0.5, 1, 2, 0, 0]
    assert column.weights.dtype == torch.float32
    deep = Ragged.from_lists([[[1], [2, 3]]], weights=[[[1], [2.0, 3]]])
    assert lists_of(deep, 1) == [[[(1, 1.0)], [(2, 2.0), (3, 3.0)]]]


def test_nothing_at_all():
    assert Ragged.from_lists([[], None], torch.int64).offsets.tolist() == [0, 0, 0]
    assert Ragged.from_lists([], torch.float32).num_samples == 0
    assert len(Ragged.from_lists([[[]], []], torch.int64).outer) == 1
    assert len(Ragged.from_lists([[], []], torch.uint8).outer) == 1
    assert Ragged.from_lists([[], []], torch.int64, weights=[None, []]).weights.shape == (0,)
    assert Ragged.from_lists([np.empty(0, np.int64)]).values.dtype == torch.int64


BIG = 2**24 + 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"lists": [[1], [2, 3.0]], "dtype": torch.int64}, r"lists\[1\]\[1\]: got 3.0, expected an integer. Ids"),
        ({"lists": [np.array([1.0])], "dtype": torch.int64}, r"lists\[0\]\[0\]: got 1.0, expected an integer"),
        ({"lists": [[1, True]]}, r"lists\[0\]\[1\]: got True, expected an integer. Make 0 or 1"),
        ({"lists": [[1], [None]]}, r"lists\[1\]\[0\]: got None, expected an integer. Leave it out"),
        ({"lists": [["a"], [1]]}, r"lists\[1\]\[0\]: got 1, expected a string or bytes. Numbers are"),
        ({"lists": [[1], ["a"]]}, r"lists\[1\]\[0\]: got 'a', expected an integer. Strings become ids by a hash"),
        ({"lists": [[1], 2]}, r"lists\[1\]: got 2, expected a list, as at lists\[0\]. Lists are of one depth"),
        ({"lists": [1, 2]}, r"lists\[0\]: got 1, expected a list for each sample"),
        ({"lists": ["ab", "c"]}, r"lists\[0\]: got 'ab', expected a list for each sample"),
        ({"lists": [[[1]], [[2], 3]]}, r"lists\[1\]\[1\]: got 3, expected a list, as at lists\[0\]\[0\]"),
        ({"lists": [[1], [[2]]]}, r"lists\[0\]\[0\]: got 1, expected a list, as at lists\[1\]\[0\]"),
        ({"lists": [[0.5], [1, BIG]]}, rf"lists\[1\]\[1\]: got {BIG}, expected a number that float32 holds"),
        ({"lists": [[float(BIG)]]}, rf"lists\[0\]\[0\]: got {BIG}.0, expected a number that float32 holds"),
        ({"lists": [np.array([1, BIG])], "dtype": torch.float32}, rf"lists\[0\]\[1\]: got {BIG}, expected a number"),
        ({"lists": [[2**64 - 1]], "dtype": torch.float32}, r"lists\[0\]\[0\]: got 18446744073709551615, expected a nu"),
        ({"lists": [[10**400]], "dtype": torch.float32}, r"lists\[0\]\[0\]: got 1000.*, expected a number"),
        ({"lists": [[]]}, "lists: got no item, expected one at least, or a dtype"),
        ({"lists": [[1]], "dtype": torch.int32}, "dtype: got torch.int32, expected torch.int64"),
        ({"lists": [[1, 2], [3]], "weights": [[1, 2], [3, 4]]}, r"weights: got 2 in weights\[1\], expected 1, one for"),
        ({"lists": [[1, 2], [3]], "weights": [[1, 2]]}, r"weights: got 0 in weights\[1\], expected 1"),
        ({"lists": [[[1], [2]]], "weights": [[[1], [2, 3]]]}, r"weights: got 2 in weights\[0\]\[1\], expected 1"),
        ({"lists": [[1]], "weights": [1]}, r"weights\[0\]: got 1, expected a list"),
        ({"lists": [["a"], ["b", "\ud800"]]}, r"lists\[1\]\[1\]: got '.ud800', expected text of whole characters"),
        ({"lists": [["a"]], "weights": [[1]]}, "weights: got some for strings"),
        ({"lists": [[1, 2]], "capacity": 1}, "capacity: got 1, expected at least 2"),
    ],
)  # fmt: skip
def test_errors_name_the_place(arguments, error):
    with pytest.raises(ValueError, match=error):
        Ragged.from_lists(**arguments)


def test_half_precision_of_torch():
    """numpy has no bfloat16; float32 holds all of it."""
    column = Ragged.from_lists([torch.tensor([1.5, 2.0], dtype=torch.bfloat16), []])
    assert (column.values.dtype, column.values.tolist()) == (torch.float32, [1.5, 2.0])


def test_a_capacity_is_a_whole_number():
    with pytest.raises(TypeError, match=r"capacity: got 2\.0, expected an int"):
        Ragged.from_lists([[1]], capacity=2.0)


def test_what_is_not_a_list():
    for lists in (5, "ab", None, {1: [2]}):
        with pytest.raises(TypeError, match=r"lists: got .*, expected a list for each sample"):
            Ragged.from_lists(lists)


@given(st.lists(st.lists(st.floats(width=32)), min_size=1))
def test_float32_numbers_come_back(lists):
    column = Ragged.from_lists(lists, torch.float32)
    assert np.array_equal(
        column.values.numpy(), np.array([x for some in lists for x in some], np.float32), equal_nan=True
    )
