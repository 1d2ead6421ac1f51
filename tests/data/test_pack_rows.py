"""Rows of a request, packed as a reader packs a file that holds them."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from recfx.data import OneOf, fixedlen, hashed, pack_rows, reader, varlen
from recfx.kernels.lists.string_hash import farm_hashes
from recfx.types import NUM_SAMPLES
from tests.data.rows import all_rows, rows_of

COLUMNS = [
    fixedlen("label", [0.0], valid=OneOf(0, 1), null="empty"),
    fixedlen("xy", [0.5, 0.25]),
    fixedlen("price", [-1.0], null="empty"),
    fixedlen("cost", [-1.0], null="empty"),
    varlen("item", torch.int64),
    varlen("history", torch.int64, truncate=3, side="left"),
    varlen("recent", torch.int64, truncate=3, side="left"),
    hashed("word", farm_hashes, buckets=1000, null="empty"),
    hashed("city", farm_hashes, buckets=1000, null="empty"),
    hashed("tags", farm_hashes),
    varlen("text", torch.uint8),
    varlen("pairs", torch.int64, weighted=True, null="empty"),
    hashed("likes", farm_hashes, weighted=True),
    varlen("deep", torch.float32, depth=2),
    varlen("user.age", torch.int64, null="empty"),
]
ROWS = [
    {"label": 1, "xy": [1, 2.5], "price": 3, "cost": 0.5, "item": 2**53 + 1, "history": [1, 2, 3, 4], "recent": [],
     "word": "a", "city": "é", "tags": ["x", "y"], "text": "hello", "likes": [{"k": "b", "v": 2}],
     "pairs": [{"k": 5, "v": 0.5}, {"k": 2**60 + 1, "v": 1}], "deep": [[1.5], []], "user": {"age": 33}},
    {"label": None, "xy": [], "price": None, "cost": 2, "item": 7, "history": [], "recent": [9], "word": None,
     "city": "b", "tags": [], "text": "", "pairs": None, "likes": [], "deep": [], "user": None},
    {"label": 0, "xy": [0, 0], "price": 0.1, "cost": 1, "item": -1, "history": [5], "recent": [1, 2, 3, 4, 5],
     "word": "", "city": None, "tags": ["x"], "text": "z", "pairs": [], "likes": [{"k": "a", "v": 1}],
     "deep": [[], [2.0, 3.0]], "user": {"age": None}},
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_the_very_bytes_of_a_parquet_file(path):
    (expected,) = reader(path, COLUMNS, 3)
    batch = pack_rows(COLUMNS, ROWS)
    assert batch.layout == expected.layout
    assert torch.equal(batch.buffer, expected.buffer)
    assert all_rows([batch])[0]["history"] == [2, 3, 4]
    again = pack_rows(COLUMNS, json.loads(json.dumps(ROWS)), layout=expected.layout)
    assert torch.equal(again.buffer, expected.buffer)


def test_the_very_bytes_of_a_file_of_json_lines(tmp_path):
    pytest.importorskip("recfx.data.text.json_lines", reason="the reader does not read JSON lines")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (expected,) = reader(tmp_path / "a.jsonl", COLUMNS, 3)
    assert torch.equal(pack_rows(COLUMNS, ROWS).buffer, expected.buffer)


IDS, TEXT, WORDS = varlen("c", torch.int64), varlen("c", torch.uint8), hashed("c", farm_hashes)
WEIGHTED = varlen("c", torch.int64, weighted=True)


@pytest.mark.parametrize(
    ("column", "of_rows"),
    [
        (IDS, [5, [6, 7], [], 3.0, [2.0, 1]]),
        (IDS, [2**64 - 1, 5]),
        (TEXT, ["a", 12, ["b", 13, "é"], []]),
        (WORDS, ["a", 12, ["b", 13, "é"], []]),
        (WEIGHTED, [{"5": 1.0, "6": 2}, {}]),
        (WEIGHTED, [[{"v": 2, "k": 1}], []]),
        (WEIGHTED, [[{"weight": 2, "id": 1}], []]),
        (hashed("c", farm_hashes, weighted=True), [{"a": 1.0, "6": 2}]),
        (varlen("c", torch.int64, null="empty"), [None, 5, [1]]),
        (fixedlen("c", [0.5]), [True, 1, [0], 1e3, 0.1]),
        (fixedlen("c", [0.5], rounding="allow"), [2**60 + 1, 0.1]),
        (varlen("c", torch.int64, depth=2), [[[1]], [[2, 3], []], []]),
        (IDS, [-1, 2**64 - 1]),
        (IDS, [[1, None]]),
        (IDS, ["12"]),
        (IDS, [True]),
        (TEXT, [1.5]),
        (varlen("c", torch.int64, depth=2), [[1, 2]]),
    ],
)
def test_odd_rows_as_in_a_file_of_json_lines(tmp_path, column, of_rows):
    pytest.importorskip("recfx.data.text.json_lines", reason="the reader does not read JSON lines")
    rows = [{"c": value} for value in of_rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        (expected,) = reader(tmp_path / "a.jsonl", [column], len(rows))
    except ValueError:
        with pytest.raises(ValueError, match="column 'c' of the rows, row 0: got"):
            pack_rows([column], rows)
    else:
        assert torch.equal(pack_rows([column], rows).buffer, expected.buffer)


def test_fewer_rows_are_padded_to_the_layout(path):
    (expected,) = reader(path, COLUMNS, 8)
    for rows in (ROWS, ROWS[:1], []):
        batch = pack_rows(COLUMNS, rows, layout=expected.layout)
        assert batch.layout is expected.layout
        assert int(batch[NUM_SAMPLES]) == len(rows)
        assert rows_of(batch) == rows_of(expected)[: len(rows)]
    assert torch.equal(pack_rows(COLUMNS, ROWS, batch_size=8).buffer, expected.buffer)


def test_a_layout_in_another_order(path):
    (expected,) = reader(path, COLUMNS[::-1], 3)
    batch = pack_rows(COLUMNS, ROWS, layout=expected.layout)
    assert batch.layout is expected.layout
    assert torch.equal(batch.buffer, expected.buffer)


NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=3)


@given(rows=st.lists(st.fixed_dictionaries({
    "ids": NUMBERS | st.none(), "other": NUMBERS, "words": TEXTS, "x": st.none() | st.floats(width=32, allow_nan=False,
    allow_infinity=False), "y": st.integers(-(2**24), 2**24)}), min_size=1, max_size=6))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_rows_as_from_a_file(tmp_path_factory, rows):
    types = {"ids": pa.list_(pa.int64()), "other": pa.list_(pa.int64()), "words": pa.list_(pa.string()),
             "x": pa.float64(), "y": pa.int64()}  # fmt: skip
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types)), path)
    columns = [varlen("ids", torch.int64, null="empty"), varlen("other", torch.int64), fixedlen("y", [0.0]),
               hashed("words", farm_hashes), fixedlen("x", [0.5], null="empty")]  # fmt: skip
    (expected,) = reader(path, columns, len(rows))
    assert torch.equal(pack_rows(columns, rows).buffer, expected.buffer)


def values(column, *given, **kwargs):
    return [row[column.name] for row in all_rows([pack_rows([column], [{column.name: value} for value in given])])]


def test_integers_keep_their_64_bits():
    ids = [2**63, 2**64 - 1, 5]
    assert values(varlen("c", torch.int64), *ids) == [[-(2**63)], [-1], [5]]
    assert values(varlen("c", torch.int64), [2**53 + 1, -(2**63)]) == [[2**53 + 1, -(2**63)]]
    one, other = varlen("c", torch.int64), varlen("d", torch.int64)
    batch = pack_rows([one, other], [{"c": 2**64 - 1, "d": -1}])  # bits that are equal in two columns are two ids
    assert [batch["c"].values.tolist(), batch["d"].values.tolist()] == [[-1], [-1]]
    with pytest.raises(
        ValueError, match="column 'c' of the rows, row 1: got -1, expected no number below 0, since the column"
    ):
        values(one, 2**64 - 1, -1)
    with pytest.raises(
        ValueError, match="column 'c' of the rows, row 0: got 18446744073709551616, expected an integer"
    ):
        values(one, 2**64)
    assert values(one, 3.0, [4.0, 5]) == [[3], [4, 5]]
    with pytest.raises(ValueError, match=r"row 0: got 9007199254740992\.0, expected an integer"):
        values(one, float(2**53))


def test_spellings_of_weights():
    column = varlen("c", torch.int64, weighted=True)
    expected = [[(5, 0.5), (2**60 + 1, 1.0)]]
    for pairs in (
        [{"k": 5, "v": 0.5}, {"v": 1, "k": 2**60 + 1}],
        [{"key": 5, "value": 0.5}, {"key": 2**60 + 1, "value": 1}],
        [{"id": 5, "weight": 0.5}, {"id": 2**60 + 1, "weight": 1}],
        [{"value": 5, "weight": 0.5}, {"value": 2**60 + 1, "weight": 1}],
        [[5, 0.5], (2**60 + 1, 1)],
        {"5": 0.5, f"{2**60 + 1}": 1},
        {5: 0.5, 2**60 + 1: 1},
    ):
        assert values(column, pairs) == expected
    words = hashed("c", farm_hashes, weighted=True)
    assert values(words, {"5": 1.0}) == values(words, [["5", 1]]) == values(words, [[5, 1]])
    for pairs, match in (
        ({"05": 1.0}, "got '05', expected an integer"),
        ([[5]], "got a list of int, expected a pair"),
        ([{"k": 5, "w": 1}], r"got a dict of \['k', 'w'\], expected an object such as"),
        (5, "got 5, expected a list of values with weights"),
        ([[5, "x"]], "got 'x', expected a number"),
        ([[5, None]], "got a null element, expected a number"),
    ):
        with pytest.raises(ValueError, match=f"column 'c' of the rows, row 0: {match}"):
            values(column, pairs)


def test_arguments_of_another_kind():
    columns, rows = [varlen("c", torch.int64)], [{"c": 1}]
    with pytest.raises(TypeError, match=r"layout: got .*Batch of .*, expected .*Layout or None\. Use `batch.layout`"):
        pack_rows(columns, rows, layout=pack_rows(columns, rows))
    with pytest.raises(TypeError, match="transform: got 3, expected a function"):
        pack_rows(columns, rows, transform=3)
    with pytest.raises(TypeError, match="columns: got generator, expected list or tuple"):
        pack_rows((c for c in columns), rows)


def test_an_error_can_be_printed():
    """Of text that has no bytes in UTF-8, too."""
    with pytest.raises(ValueError, match=r"row 0: got '.ud800', expected text of whole characters") as caught:
        values(hashed("c", farm_hashes), "\ud800")
    str(caught.value).encode()


@pytest.mark.parametrize(("side", "row"), [("right", [5, None, "x"]), ("left", ["x", None, 5])])
def test_what_is_cut_off_is_not_looked_at(side, row):
    """As in a file: there may be a null in it."""
    assert values(varlen("c", torch.int64, truncate=1, side=side), row) == [[5]]
    pairs = [[n, 1.0] for n in row]
    assert values(varlen("c", torch.int64, weighted=True, truncate=1, side=side), pairs) == [[(5, 1.0)]]
    assert values(varlen("c", torch.int64, depth=2, truncate=1, side=side), [row, []]) == [[[5], []]]
    assert values(varlen("c", torch.int64, truncate=0, side=side), row) == [[]]


def test_weights_of_strings_are_refused():
    """A batch has a weight for each value, and values of strings are bytes."""
    with pytest.raises(
        ValueError, match=r"column 'c': got weighted=True for strings, expected False. A weight belongs"
    ):
        varlen("c", torch.uint8, weighted=True)


def test_plain_values_and_lists_and_numbers_as_text():
    assert values(varlen("c", torch.int64), 5, [6, 7], []) == [[5], [6, 7], []]
    assert values(fixedlen("c", [0.5]), 1, [2.5], True, []) == [[1.0], [2.5], [1.0], [0.5]]
    assert values(varlen("c", torch.uint8), 12, "12", b"12", [12, "a"]) == [[b"12"], [b"12"], [b"12"], [b"12", b"a"]]
    words = hashed("c", farm_hashes)
    assert values(words, 12) == values(words, "12")


LABEL = fixedlen("label", [0.0], missing="empty")


def test_names_that_are_absent():
    null, may_miss = varlen("c", torch.int64, null="empty"), varlen("c", torch.int64, missing="empty")
    for column in (null, may_miss):
        assert all_rows([pack_rows([column], [{}, {"c": 5}, {"c": [6, 7]}])]) == [{"c": []}, {"c": [5]}, {"c": [6, 7]}]
    with pytest.raises(
        ValueError, match="column 'c' of the rows, row 1: got no such name, expected a value, or missing="
    ):
        pack_rows([varlen("c", torch.int64)], [{"c": 1}, {"d": 2}])
    with pytest.raises(ValueError, match="column 'c' of the rows, row 1: got null, expected a list, empty"):
        pack_rows([may_miss], [{"c": 1}, {"c": None}, {}])
    assert all_rows([pack_rows([LABEL, null], [{"c": 5}])]) == [{"label": [0.0], "c": [5]}]
    of_user = varlen("user.age", torch.int64, null="empty")
    rows = [{"user.age": 1}, {"user": {"age": 2}}, {"user": None}, {"user": {}}, {}]
    assert [row["user.age"] for row in all_rows([pack_rows([of_user], rows)])] == [[1], [2], [], [], []]


def test_a_transform_as_in_training(path):
    def twice(columns):
        return {"twice": columns["price"] * 2, "item": columns["item"]}

    (expected,) = reader(path, COLUMNS, 3, transform=twice)
    assert torch.equal(pack_rows(COLUMNS, ROWS, transform=twice).buffer, expected.buffer)
    small = pack_rows(COLUMNS, ROWS[:1], transform=twice, layout=expected.layout)
    assert small.layout is expected.layout
    assert rows_of(small) == rows_of(expected)[:1]


PRICES = [fixedlen("a", [0.0]), fixedlen("b", [0.0]), varlen("c", torch.int64), varlen("d", torch.int64)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"b": float("nan")}, "column 'b' of the rows, row 1: got nan, expected a finite number"),
        ({"b": 2**24 + 1}, r"column 'b' of the rows, row 1: got 16777217\.0, which float32 would round"),
        ({"b": 2**60 + 1}, "column 'b' of the rows, row 1: got 1152921504606846977, expected a number that float32"),
        ({"b": None}, "column 'b' of the rows, row 1: got null, expected a value, or null='empty'"),
        ({"b": [1, 2]}, "column 'b' of the rows, row 1: got 2 values, expected 1"),
        ({"b": "x"}, "column 'b' of the rows, row 1: got 'x', expected a number"),
        ({"d": "x"}, "column 'd' of the rows, row 1: got 'x', expected an integer"),
        ({"d": [1, None]}, "column 'd' of the rows, row 1: got a null element, expected"),
        ({"d": [[1]]}, "column 'd' of the rows, row 1: got a list of int, expected an integer"),
        ({"d": 1.5}, r"column 'd' of the rows, row 1: got 1\.5, expected an integer"),
        ({"d": True}, "column 'd' of the rows, row 1: got True, expected an integer"),
    ],
)
def test_errors_name_column_and_row(change, match):
    good = {"a": 1, "b": 2.5, "c": 1, "d": [2]}
    with pytest.raises(ValueError, match=match):
        pack_rows(PRICES, [good, {**good, **change}])


def test_depth_of_lists():
    column = varlen("c", torch.int64, depth=2)
    assert values(column, [[1], []], []) == [[[1], []], []]
    null = varlen("c", torch.int64, depth=3, null="empty")
    assert values(null, None, None) == values(null, [], None) == [[], []]
    assert values(null, [[]], [[[]]]) == [[[]], [[[]]]]
    with pytest.raises(ValueError, match="column 'c' of the rows, row 0: got 1, expected lists in lists, 2 deep"):
        values(column, 1)
    with pytest.raises(ValueError, match="column 'c' of the rows, row 1: got 2, expected lists in lists, 2 deep"):
        values(column, [[1]], [2, 3])
    with pytest.raises(ValueError, match="column 'c' of the rows, row 0: got a null element, expected a list"):
        values(column, [[1], None])


def test_requests_that_are_too_large():
    columns = [varlen("history", torch.int64), fixedlen("x", [0.0])]
    layout = pack_rows(columns, [{"history": [1, 2], "x": 0}] * 4).layout
    with pytest.raises(
        ValueError, match=r"rows: got 5, expected at most 4, the samples of the layout. Split the request"
    ):
        pack_rows(columns, [{"history": 1, "x": 0}] * 5, layout=layout)
    with pytest.raises(
        ValueError, match="column 'history' of the rows: got 9 items, expected at most 8, the layout's capacity"
    ):
        pack_rows(columns, [{"history": list(range(9)), "x": 0}], layout=layout)
    with pytest.raises(ValueError, match="rows: got 5, expected at most 4, the batch_size"):
        pack_rows(columns, [{"history": 1, "x": 0}] * 5, batch_size=4)
    with pytest.raises(ValueError, match="batch_size: got 3, expected 4, as in the layout"):
        pack_rows(columns, [], layout=layout, batch_size=3)
    with pytest.raises(ValueError, match="rows: got none, expected at least one"):
        pack_rows(columns, [])


@pytest.mark.parametrize(
    "columns",
    [
        [varlen("history", torch.int64)],
        [varlen("history", torch.int64), fixedlen("x", [0.0]), fixedlen("y", [0.0])],
        [varlen("history", torch.int64), fixedlen("x", [0.0, 1.0])],
        [varlen("history", torch.float32), fixedlen("x", [0.0])],
        [varlen("history", torch.int64, weighted=True), fixedlen("x", [0.0])],
    ],
)
def test_a_layout_of_other_columns(columns):
    layout = pack_rows([varlen("history", torch.int64), fixedlen("x", [0.0])], [{"history": 1, "x": 0}]).layout
    with pytest.raises(
        ValueError, match=r"layout: got one that differs in \[.*\], expected that of a batch with the col"
    ):
        pack_rows(columns, [], layout=layout)


def test_what_is_not_rows():
    with pytest.raises(TypeError, match=r"rows: got a dict of \['a'\], expected .*Sequence. Give a list of dicts"):
        pack_rows(PRICES, {"a": 1})
    with pytest.raises(TypeError, match="rows: got 5 in row 1, expected a dict of values by column name"):
        pack_rows(PRICES, [{}, 5])
    with pytest.raises(ValueError, match=r"columns: got \[\], expected distinct names"):
        pack_rows([], [{}])


def test_functions_that_cannot_be_hashed():
    class AboveZero:
        __hash__ = None

        def __eq__(self, other):
            return self is other

        def __call__(self, values):
            return values > 0

    columns = [fixedlen(name, [1.0], valid=AboveZero()) for name in "ab"]
    assert pack_rows(columns, [{"a": 1, "b": 2}])["b"].tolist() == [[2.0]]
    with pytest.raises(ValueError, match=r"column 'b' of the rows, row 0: got -2.0"):
        pack_rows(columns, [{"a": 1, "b": -2}])
