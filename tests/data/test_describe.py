"""What is said of a column against counting it in Python."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.data.describe import describe
from recfx.data.files import match_files
from tests.data.rows import FORMATS, write

LISTS = st.lists(st.none() | st.lists(st.none() | st.integers(0, 4), max_size=3), max_size=12)


@given(rows=LISTS, extension=st.sampled_from(FORMATS), unit_rows=st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_lists_are_counted_as_python_counts_them(tmp_path_factory, rows, extension, unit_rows):
    folder = tmp_path_factory.mktemp("describe")
    write(folder / f"a.{extension}", pa.table({"c": pa.array(rows, pa.list_(pa.int64()))}), unit_rows)
    facts = describe(match_files(folder))
    (c,) = facts.columns
    items = [[item for item in row or [] if item is not None] for row in rows]
    counts = Counter(item for row in items for item in row)
    total = max(sum(counts.values()), 1)
    assert (facts.num_rows, facts.num_described, facts.num_files) == (len(rows), len(rows), 1)
    assert c.missing == pytest.approx(sum(not row for row in items) / max(len(rows), 1))
    assert c.mean_length == pytest.approx(sum(map(len, items)) / max(len(rows), 1))
    assert c.max_length == max(map(len, items), default=0)
    assert c.num_distinct == len(counts)
    assert c.once == pytest.approx(sum(n == 1 for n in counts.values()) / max(len(counts), 1))
    assert c.top == pytest.approx(max(counts.values(), default=0) / total)
    assert (c.low, c.high) == (min(counts, default=None), max(counts, default=None))


def test_plain_nested_and_weighted_columns_of_several_files(tmp_path):
    kinds = {"x": pa.float64(), "deep": pa.list_(pa.list_(pa.string())), "w": pa.map_(pa.int64(), pa.float32())}
    for name, values in {"a": (1.5, [["p"], ["q", "p"]], [(1, 0.5)]), "b": (None, [], [])}.items():
        table = pa.table({key: pa.array([v], kind) for (key, kind), v in zip(kinds.items(), values, strict=True)})
        write(tmp_path / f"{name}.parquet", table)
    facts = describe(match_files(tmp_path), max_rows=5)
    assert [(c.missing, c.max_length, c.num_distinct) for c in facts.columns] == [(0.5, 1, 1), (0.5, 3, 2), (0.5, 1, 1)]
    assert describe(match_files(tmp_path), max_rows=1).num_described == 1
    write(tmp_path / "c.parquet", pa.table({"y": [1]}))
    with pytest.raises(ValueError, match=r"file '.*c.parquet': got columns \['y'\], expected"):
        describe(match_files(tmp_path))


def test_types_without_an_order_or_with_a_dictionary(tmp_path):
    table = pa.table(
        {
            "city": pa.array(["b", "a", "b", None]).dictionary_encode(),
            "pair": pa.array([[{"k": {"deep": 1}, "v": 1.0}], [], None, []]),
            "raw": pa.array([b"\xff", None, b"", b"a"]),
            "nothing": pa.nulls(4),
        }
    )
    city, pair, raw, nothing = describe(match_files(write(tmp_path / "a.arrow", table))).columns
    assert (city.low, city.high, city.num_distinct, city.missing) == ("a", "b", 2, 0.25)
    assert (pair.missing, pair.num_distinct, pair.low) == (0.75, 1, "{'deep': 1}")
    assert (raw.low, raw.high) == (b"", b"\xff")
    assert (nothing.missing, nothing.num_distinct) == (1.0, 0)
