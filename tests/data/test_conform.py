"""Every kind of column against the same rows in plain Python, over every format that can hold it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.data import Between, OneOf, fixedlen, hashed, reader, varlen
from recfx.data.conform import BadRows, block_of, conform
from recfx.data.convert import convert
from recfx.data.packing.pack_columns import Block, PackPlan, Segment, count_items, pack_columns
from recfx.data.packing.pack_records import pack_records
from recfx.data.records import as_records, records_of
from recfx.kernels.lists.string_hash import farm_hashes, murmur_hashes
from recfx.types import Batch
from tests.data.rows import FORMATS, all_rows, rows_of, write

EXTREMES = st.sampled_from([0, -1, 2**63 - 1, -(2**63), 2**53 + 1])
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=5)
COLUMNS = (
    fixedlen("label", [0.5, 7.0]),
    varlen("x", torch.float32),
    varlen("c", torch.int64),
    varlen("deep", torch.int64, depth=3),
    varlen("words", torch.uint8),
    varlen("sentences", torch.uint8, depth=2),
    varlen("weighted", torch.int64, weighted=True),
)
TYPES = {
    "label": pa.list_(pa.float64()),
    "x": pa.list_(pa.float32()),
    "c": pa.list_(pa.int64()),
    "deep": pa.list_(pa.list_(pa.list_(pa.int64()))),
    "words": pa.list_(pa.string()),
    "sentences": pa.list_(pa.list_(pa.string())),
    "weighted": pa.list_(pa.struct([("k", pa.int64()), ("v", pa.float64())])),
}
PAIRS = st.fixed_dictionaries({"k": EXTREMES, "v": NUMBERS})


def lists(item: st.SearchStrategy, depth: int = 1) -> st.SearchStrategy:
    return item if depth == 0 else st.lists(lists(item, depth - 1), max_size=3)


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "label": st.lists(NUMBERS, min_size=2, max_size=2) | st.just([]),
            "x": lists(NUMBERS),
            "c": lists(EXTREMES),
            "deep": lists(EXTREMES, 3),
            "words": lists(TEXTS),
            "sentences": lists(TEXTS, 2),
            "weighted": lists(PAIRS),
        }
    ),
    max_size=9,
)


def table_of(rows: list[dict], types: dict = TYPES) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], type=kind) for name, kind in types.items()})


def encoded(value):
    return [encoded(item) for item in value] if isinstance(value, list) else value.encode()


def expected(rows: list[dict]) -> list[dict]:
    """What a batch must hold of these rows."""
    return [
        {
            **row,
            "label": row["label"] or [0.5, 7.0],
            "words": encoded(row["words"]),
            "sentences": encoded(row["sentences"]),
            "weighted": [(pair["k"], pair["v"]) for pair in row["weighted"]],
        }
        for row in rows
    ]


def packed(block: Block) -> Batch:
    columns = [column.packed for column in COLUMNS]
    segments = [Segment(block, 0, block.num_rows)]
    plan = PackPlan.of(block.num_rows, columns, count_items(PackPlan.of(1, columns), segments))
    return Batch(pack_columns(plan, segments), plan.layout)


@given(rows=ROWS, cut=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_any_rows_come_out_as_they_went_in(rows, cut):
    """Also where the arrays are slices, whose offsets do not begin at 0."""
    batch = table_of(rows).combine_chunks().slice(min(cut, len(rows))).to_batches()
    for part in batch:
        assert rows_of(packed(block_of(conform(part, COLUMNS)))) == expected(rows[min(cut, len(rows)) :])


@given(rows=ROWS, cut=st.integers(0, 9), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_records_in_any_order(rows, cut, seed):
    """Of several batches, some of them slices."""
    columns = [column.packed for column in COLUMNS]
    batch = pa.RecordBatch.from_struct_array(table_of(rows).to_struct_array().combine_chunks())
    whole = as_records(PackPlan.of(1, columns), conform(batch, COLUMNS))
    records = records_of([whole.slice(cut), whole.slice(0, cut)])
    order = np.random.default_rng(seed).permutation(len(rows))
    mixed = records._replace(addresses=records.addresses[order])
    segments = [Segment(mixed, 0, len(rows))]
    _, counts = pack_records(PackPlan.of(max(len(rows), 1), columns), segments)
    plan = PackPlan.of(len(rows), columns, counts)
    turned = rows[cut:] + rows[:cut]
    assert rows_of(Batch(pack_records(plan, segments)[0], plan.layout)) == expected([turned[i] for i in order])


SOME_ROWS = [
    {
        "label": [1.0, 0.25] if i % 2 else [],
        "x": [i + 0.5] * (i % 3),
        "c": [2**53 + i, -i][: (i + 1) % 3],
        "deep": [[[i], []], []][: i % 3],
        "words": ["ä" * i, ""][: i % 3],
        "sentences": [["a", f"b{i}"], [], ["c"]][: i % 4],
        "weighted": [{"k": i, "v": 0.5}, {"k": -i, "v": 2.0}][: i % 3],
    }
    for i in range(23)
]


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("unit_rows", [4, 23])
def test_every_kind_of_column_from_every_format(tmp_path, extension, unit_rows):
    write(tmp_path / f"a.{extension}", table_of(SOME_ROWS), unit_rows)
    write(tmp_path / f"b.{extension}", table_of([]))
    batches = reader(tmp_path, COLUMNS, 5, drop_remainder=False)
    assert all_rows(batches) == expected(SOME_ROWS)


@pytest.mark.parametrize(
    "kind",
    [pa.large_list(pa.large_string()), pa.list_(pa.string_view()), pa.list_(pa.binary()),
     pa.list_(pa.dictionary(pa.int8(), pa.string()))],
)  # fmt: skip
def test_other_spellings_of_lists_of_strings(tmp_path, kind):
    rows = [row["words"] for row in SOME_ROWS]
    array = pa.array(rows, pa.list_(pa.string()))
    if pa.types.is_dictionary(kind.value_type):
        items = array.values.dictionary_encode().cast(kind.value_type)
        array = pa.ListArray.from_arrays(array.offsets, items)
    else:
        array = array.cast(kind)
    write(tmp_path / "a.arrow", pa.table({"words": array}))
    batches = reader(tmp_path, [varlen("words", torch.uint8)], 5, drop_remainder=False)
    assert [row["words"] for row in all_rows(batches)] == [encoded(row) for row in rows]


@pytest.mark.parametrize(
    ("kind", "values"),
    [(pa.int8(), [-5, 3]), (pa.uint32(), [2**32 - 1]), (pa.uint64(), [2**63 - 1]), (pa.int16(), [7])],
)
def test_integers_of_any_width_keep_their_values(tmp_path, kind, values):
    write(
        tmp_path / "a.parquet",
        pa.table({"c": pa.array(values, kind), "lists": pa.array([values] * len(values), pa.list_(kind))}),
    )
    columns = [varlen("c", torch.int64), varlen("lists", torch.int64)]
    (batch,) = reader(tmp_path, columns, len(values))
    assert rows_of(batch) == [{"c": [v], "lists": values} for v in values]


def test_unsigned_ids_keep_their_bits(tmp_path):
    values = [0, 2**63 - 1, 2**63, 2**64 - 1]
    kind, column = pa.uint64(), varlen("c", torch.int64)
    for i, array in enumerate([pa.array(values, kind), pa.array([values], pa.list_(kind))]):
        path = write(tmp_path / f"{i}.parquet", pa.table({"c": array}))
        (converted,) = convert(path, tmp_path / "out")
        for each in (path, converted):
            ids = [i for row in all_rows(reader(each, [column], 1)) for i in row["c"]]
            assert ids == [0, 2**63 - 1, -(2**63), -1]
    table = pa.table(
        {"c": pa.array([[{"k": 2**64 - 1, "v": 0.5}]], pa.list_(pa.struct({"k": kind, "v": pa.float32()})))}
    )
    path = write(tmp_path / "pairs.arrow", table)
    assert all_rows(reader(path, [varlen("c", torch.int64, weighted=True)], 1)) == [{"c": [(-1, 0.5)]}]


def test_fixed_size_lists_and_maps_and_booleans(tmp_path):
    table = pa.table(
        {
            "dense": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
            "map": pa.array([[(5, 0.5)], []], pa.map_(pa.int32(), pa.float32())),
            "clicked": pa.array([True, False]),
        }
    )
    write(tmp_path / "a.parquet", table)
    columns = [fixedlen("dense", [0, 0]), varlen("map", torch.int64, weighted=True), fixedlen("clicked", [0])]
    (batch,) = reader(tmp_path, columns, 2)
    assert rows_of(batch) == [
        {"dense": [1, 2], "map": [(5, 0.5)], "clicked": [1]},
        {"dense": [3, 4], "map": [], "clicked": [0]},
    ]


GOLDEN = {
    farm_hashes: {"abc": 2640714258260161385, "": -7286425919675154353, "hello": -5436999610281751320},
    murmur_hashes: {"abc": -7148968302806999301, "": 0},
}


@pytest.mark.parametrize("string_hash", GOLDEN)
@pytest.mark.parametrize("buckets", [None, 0, 1000, 2**40])
def test_strings_hashed_by_the_reader(tmp_path, string_hash, buckets):
    golden = GOLDEN[string_hash]
    hashes = {
        None: golden,
        0: {word: h & (2**63 - 1) for word, h in golden.items()},
    }.get(buckets, {word: h % 2**64 % (buckets or 1) for word, h in golden.items()})
    words = [*golden, *golden, "abc"]
    table = pa.table({"flat": words, "lists": pa.array([words[:i] for i in range(len(words))], pa.list_(pa.string()))})
    write(tmp_path / "a.orc", table)
    write(tmp_path / "b.parquet", table)
    columns = [hashed(name, string_hash, buckets=buckets) for name in ("flat", "lists")]
    for batch in reader(tmp_path, columns, len(words)):
        assert rows_of(batch) == [
            {"flat": [hashes[word]], "lists": [hashes[w] for w in words[:i]]} for i, word in enumerate(words)
        ]


def test_weights_beside_hashed_keys(tmp_path):
    kind = pa.list_(pa.struct([("k", pa.string()), ("v", pa.float32())]))
    write(tmp_path / "a.orc", pa.table({"tags": pa.array([[{"k": "abc", "v": 0.5}], []], kind)}))
    (batch,) = reader(tmp_path, [hashed("tags", farm_hashes, weighted=True)], 2)
    assert rows_of(batch) == [{"tags": [(GOLDEN[farm_hashes]["abc"], 0.5)]}, {"tags": []}]


def test_null_rows_are_empty_where_that_is_said(tmp_path):
    table = pa.table(
        {
            "label": pa.array([1.0, None]),
            "x": pa.array([None, [2.0]], pa.list_(pa.float64())),
            "words": pa.array([None, "a"]),
        }
    )
    write(tmp_path / "a.parquet", table)
    columns = [fixedlen("label", [0.5], null="empty"), varlen("x", torch.float32, null="empty")]
    (batch,) = reader(tmp_path, [*columns, varlen("words", torch.uint8, null="empty")], 2)
    assert rows_of(batch) == [
        {"label": [1.0], "x": [], "words": []},
        {"label": [0.5], "x": [2.0], "words": [b"a"]},
    ]


def test_a_null_row_may_hide_values():
    """Arrow allows what stands beneath a null to be anything."""
    array = pa.ListArray.from_arrays(pa.array([0, 2, 3]), pa.array([7, 8, 9]), mask=pa.array([True, False]))
    assert array.null_count == 1
    batch = pa.record_batch({"c": array})
    block = block_of(conform(batch, [varlen("c", torch.int64, null="empty")]))
    assert block.columns[0].offsets[0].tolist() == [0, 0, 1]
    assert block.columns[0].values.tolist() == [9]


NAN, INF = math.nan, math.inf
PAIR, UNSIGNED = [{"k": 1, "v": 1.0}], pa.array([1], pa.uint64())
BAD = {
    "NaN": (varlen("x", torch.float32), [[1.0], [2.0, NAN]], "got nan, expected a finite number"),
    "infinity": (fixedlen("x", [0]), [[1.0], [-INF]], "got -inf, expected a finite number"),
    "beyond float32": (varlen("x", torch.float32), [[1.0], [1e39]], "got 1e.39, which is inf in float32"),
    "label 2": (fixedlen("x", [0], valid=OneOf(0, 1)), [[1.0], [2.0]], "got 2.0, expected one of 0, 1"),
    "label NaN": (fixedlen("x", [0], valid=OneOf(0, 1)), [[0.0], [NAN]], "got nan, expected one of 0, 1"),
    "range": (varlen("x", torch.float32, valid=Between(0, 9)), [[9.0], [-1.0]], "got -1.0, expected a number from 0"),
    "id range": (varlen("x", torch.int64, valid=Between(0, 9)), [[9], [10]], "got 10, expected a number from 0 to 9"),
    "null": (varlen("x", torch.int64), [[9], None], "got null, expected a list"),
    "null item": (varlen("x", torch.int64), [[9], [1, None]], "got a null element"),
    "null list": (varlen("x", torch.int64, depth=2), [[[9]], [[], None]], "got a null element"),
    "null pair": (varlen("x", torch.int64, weighted=True), [PAIR, [None]], "got a null element"),
    "null weight": (varlen("x", torch.int64, weighted=True), [PAIR, [{"k": 1, "v": None}]], "got a null element"),
    "null key": (varlen("x", torch.int64, weighted=True), [PAIR, [{"k": None, "v": 1.0}]], "got a null element"),
    "length": (fixedlen("x", [0, 0]), [[1.0, 2.0], [1.0]], "got 1 values, expected 2"),
    "large integer": (varlen("x", torch.float32), [[2**24], [2**24 + 1]], "got 16777217, which float32"),
    "unsigned": (varlen("x", torch.float32), [UNSIGNED, pa.array([2**64 - 1], pa.uint64())], "got 1844674407370955161"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("extension", FORMATS)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, fault, extension):
    column, (good, bad), message = BAD[fault]
    if isinstance(good, pa.Array):
        if extension == "orc":  # which has no unsigned integers
            return
        good, bad, kind = good.to_pylist(), bad.to_pylist(), pa.list_(pa.uint64())
    else:
        kind = pa.infer_type([good, bad])
    values = [good, good, good, bad, good, good, bad]
    path = write(Path(tmp_path) / f"a.{extension}", pa.table({"x": pa.array(values, kind)}), 2)
    with pytest.raises(ValueError, match=f"column 'x' of '{path}', row 3: {message}"):
        list(reader(tmp_path, [column], 2))
    it = iter(reader(tmp_path, [column], 2, on_bad="skip", drop_remainder=False))
    kept = all_rows(it)
    assert it.num_bad == 2
    if fault not in ("null pair", "null weight", "null key"):
        assert [row["x"] for row in kept] == [good] * 5
    assert len(kept) == 5


def test_anything_is_valid_where_that_is_said(tmp_path):
    write(tmp_path / "a.orc", pa.table({"x": [[NAN, INF]]}))
    (batch,) = reader(tmp_path, [varlen("x", torch.float32, valid=None)], 1)
    assert batch["x"].values.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        (varlen("x", torch.int64), pa.list_(pa.bool_()), "list<int64> or another type of whole numbers"),
        (
            varlen("x", torch.int64),
            pa.string(),
            "list<int64> or another type of whole numbers. Ids must be exact. Strings are read by `hashed`.",
        ),
        (varlen("x", torch.int64), pa.list_(pa.timestamp("ms")), "`recfx convert` turns times into strings."),
        (varlen("x", torch.int64), pa.list_(pa.list_(pa.int64())), "list<int64>"),
        (varlen("x", torch.int64, depth=2), pa.list_(pa.int64()), "list<list<int64>>"),
        (varlen("x", torch.float32), pa.string(), "list<double> or another type of numbers"),
        (varlen("x", torch.uint8), pa.list_(pa.int64()), "list<string> or binary"),
        (hashed("x", farm_hashes), pa.int64(), "list<string> or binary"),
        (varlen("x", torch.int64, weighted=True), pa.list_(pa.int64()), "list<struct<k: int64, v: double>>"),
        (fixedlen("x", [0]), pa.timestamp("s"), "list<double>"),
    ],
)
def test_a_column_of_another_type(tmp_path, column, kind, expected):
    path = write(tmp_path / "a.arrow", pa.table({"x": pa.array([], kind)}))
    with pytest.raises(ValueError, match=f"column 'x' of '{path}': got .*, expected .*{expected}"):
        list(reader(tmp_path, [column]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: varlen("x", torch.float64), r"column 'x': got dtype torch.float64"),
        (lambda: varlen("x", torch.int64, depth=0), "column 'x': got depth 0"),
        (lambda: varlen("x", torch.int64, null="skip"), "column 'x': got null='skip'"),
        (lambda: varlen("x", torch.uint8, valid=OneOf(1)), r"column 'x': got valid=OneOf\(1,\)"),
        (lambda: varlen("x", torch.uint8, weighted=True), "column 'x': got weighted=True for strings"),
        (lambda: fixedlen("x", []), "column 'x': got an empty default"),
        (lambda: hashed("x", farm_hashes, buckets=-1), "column 'x': got buckets -1"),
    ],
)
def test_declarations_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_rows_are_all_found():
    batch = pa.record_batch({"x": pa.array([[1.0], [NAN], [2.0], [1.0, INF]])})
    with pytest.raises(BadRows) as caught:
        conform(batch, [varlen("x", torch.float32)])
    assert caught.value.rows.tolist() == [1, 3]
