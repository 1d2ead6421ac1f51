"""Arrays and frames, read as files of the same rows are."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from torch.utils.data import DataLoader

from recfx.data import OneOf, Split, fixedlen, from_arrays, hashed, reader, varlen
from recfx.kernels.lists.string_hash import farm_hashes
from recfx.types import NUM_SAMPLES, Ragged
from tests.data.rows import all_rows, rows_of

NUM_ROWS = 3000
IDS = [2**53 + i for i in range(NUM_ROWS)]
LISTS = [list(range(i % 4)) for i in range(NUM_ROWS)]
WORDS = [f"w{i % 7}" for i in range(NUM_ROWS)]
PAIRS = [[(i, 0.5)] * (i % 3) for i in range(NUM_ROWS)]
COLUMNS = [
    fixedlen("label", [0.0], valid=OneOf(0, 1)),
    fixedlen("xy", [0.5, 0.5]),
    varlen("id", torch.int64),
    varlen("items", torch.int64),
    hashed("word", farm_hashes, buckets=100),
    varlen("pairs", torch.int64, weighted=True),
]
STRUCTS = [[{"k": k, "v": v} for k, v in pairs] for pairs in PAIRS]
TYPES = {"pairs": pa.list_(pa.struct([("k", pa.int64()), ("v", pa.float64())]))}


C = [varlen("c", torch.int64)]


def as_lists() -> dict:
    labels = [float(i % 2) for i in range(NUM_ROWS)]
    xy = [[i / 8, 1.0] for i in range(NUM_ROWS)]
    return {"label": labels, "xy": xy, "id": IDS, "items": LISTS, "word": WORDS, "pairs": PAIRS}


def as_numpy() -> dict:
    of_lists = np.empty(NUM_ROWS, object)
    of_lists[:] = [np.array(row, np.int64) for row in LISTS]
    lists = as_lists()
    arrays = {name: np.array(lists[name]) for name in ("label", "xy", "id", "word")}
    return {**arrays, "items": of_lists, "pairs": lists["pairs"]}


def as_table() -> pa.Table:
    return pa.table({n: pa.array(v, TYPES.get(n)) for n, v in {**as_lists(), "pairs": STRUCTS}.items()})


def as_tensors() -> dict:
    lists = as_lists()
    tensors = {name: torch.tensor(lists[name]) for name in ("label", "xy", "id")}
    weights = [[weight for _, weight in pairs] for pairs in PAIRS]
    ids = [[key for key, _ in pairs] for pairs in PAIRS]
    return {
        **tensors,
        "items": Ragged.from_lists(LISTS, capacity=9000),
        "word": Ragged.from_lists([[word] for word in WORDS]),
        "pairs": Ragged.from_lists(ids, weights=weights),
    }


def as_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(
        {**as_numpy(), "xy": list(np.array(as_lists()["xy"])), "day": pandas.Timestamp("2026-11-30")}
    )
    frame["word"] = frame["word"].astype("category")
    return frame


def as_polars():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    return polars.from_arrow(as_table()).with_columns(polars.col("word").cast(polars.Categorical))


KINDS: list[Callable] = [as_lists, as_numpy, as_table, as_tensors, as_pandas, as_polars]
KINDS += [
    lambda: as_table().combine_chunks().to_batches()[0],
    lambda: pa.RecordBatchReader.from_batches(as_table().schema, as_table().to_batches(max_chunksize=700)),
    lambda: pa.concat_tables([as_table().slice(0, 1100), as_table().slice(1100)]),
    lambda: {name: as_table()[name] for name in as_table().column_names},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "a.parquet"
    pq.write_table(as_table(), path)
    return path


@pytest.fixture(scope="module")
def expected(file):
    return [batch.buffer for batch in reader(file, COLUMNS, 700)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_very_bytes_of_a_file_with_the_same_rows(expected, kind):
    batches = list(from_arrays(kind(), COLUMNS, 700))
    assert len(batches) == len(expected) == 5
    assert all(torch.equal(batch.buffer, buffer) for batch, buffer in zip(batches, expected, strict=True))
    assert int(batches[-1][NUM_SAMPLES]) == 200


@pytest.mark.parametrize(
    "options",
    [
        {"filter": [("id", ">", IDS[2000])]},
        {"split": Split(part="validation", fraction=0.3, key="id")},
        {"drop_remainder": True, "epochs": 2},
        {"transform": lambda columns: {"twice": columns["label"] * 2}},
        {"threads": 2, "prefetch": 2},
    ],
)
def test_options_do_as_for_files(file, options):
    from_file, from_memory = (list(of(data, COLUMNS, 64, **options)) for of, data in (
        (reader, file), (from_arrays, as_table())))  # fmt: skip
    assert len(from_file) == len(from_memory) > 0
    assert all(torch.equal(a.buffer, b.buffer) for a, b in zip(from_file, from_memory, strict=True))


def test_a_filter_over_columns_that_no_batch_has():
    data = {**as_numpy(), "day": np.arange(NUM_ROWS) % 5, "odd": [object()] * NUM_ROWS}
    rows = all_rows(from_arrays(data, COLUMNS[2:3], 100, filter=[("day", "==", 2)]))
    assert [row["id"][0] for row in rows] == IDS[2::5]


def test_shuffled_rows_are_others_in_each_epoch_and_resume_exactly():
    def batches(**kwargs):
        return from_arrays(as_table(), COLUMNS, 128, **{"shuffle": True, "seed": 3, "epochs": 2, **kwargs})

    ids = [row["id"][0] for row in all_rows(batches())]
    assert sorted(ids[:NUM_ROWS]) == sorted(ids[NUM_ROWS:]) == IDS
    assert len({tuple(ids[:NUM_ROWS]), tuple(ids[NUM_ROWS:]), tuple(IDS)}) == 3
    assert max(abs(np.diff(np.array(ids[:300], np.float64)))) > NUM_ROWS / 2  # not within a part of the rows
    assert [row["id"][0] for row in all_rows(batches().epoch(1))] == ids[NUM_ROWS:]
    assert [row["id"][0] for row in all_rows(batches(seed=4))] != ids
    whole = [rows_of(batch) for batch in batches()]
    for stop in (0, 5, 23, 24, 30):
        it = iter(batches())
        before = [rows_of(batch) for _, batch in zip(range(stop), it, strict=False)]
        position = json.loads(json.dumps(it.position))
        assert before + [rows_of(batch) for batch in batches(threads=2).start_at(position)] == whole


def test_a_position_is_of_these_arrays():
    position = iter(from_arrays(as_table(), COLUMNS)).position
    from_arrays(as_numpy() | as_lists(), COLUMNS)
    from_arrays(pa.concat_tables([as_table().slice(0, 5), as_table().slice(5)]), COLUMNS).start_at(position)
    others = as_lists()
    others["id"] = [*IDS[:-1], 5]
    for table in (as_table().slice(1), as_table().set_column(2, "id", [others["id"]]), as_table().cast(
            as_table().schema.set(0, pa.field("label", pa.float32())))):  # fmt: skip
        with pytest.raises(ValueError, match=r"position: got one of .*, expected one of"):
            from_arrays(table, COLUMNS).start_at(position)
    with pytest.raises(ValueError, match="position: got one of"):
        from_arrays(as_table(), COLUMNS, shuffle=True).start_at(position)


def test_what_it_says_of_itself():
    batches = from_arrays(as_table(), COLUMNS, 10)
    it = iter(batches)
    next(it)
    assert batches.described == "the arrays"
    assert it.described == "10 rows after the start of unit 0 of the arrays"
    assert torch.equal(batches.first().buffer, next(iter(batches)).buffer)


@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_share_the_rows(shuffle):
    shards = [from_arrays(as_table(), COLUMNS, 64, rank=r, world_size=3, shuffle=shuffle) for r in range(3)]
    ids = [[row["id"][0] for row in all_rows(shard)] for shard in shards]
    assert sorted(sum(ids, [])) == IDS  # noqa: RUF017
    assert all(map(len, ids))
    few = {"id": [1, 2, 3]}
    assert [all_rows(from_arrays(few, COLUMNS[2:3], rank=r, world_size=3)) for r in range(3)] == [
        [{"id": [1]}], [{"id": [2]}], [{"id": [3]}]]  # fmt: skip
    many = {"id": np.arange(5000)}
    sizes = [len(all_rows(from_arrays(many, COLUMNS[2:3], 64, rank=r, world_size=3))) for r in range(3)]
    assert max(sizes) - min(sizes) < 5  # no worker waits for another


def test_in_a_data_loader():
    batches = from_arrays(as_table(), COLUMNS, 50)
    numbers = from_arrays(as_table(), COLUMNS[:4], 50, shuffle=True)
    assert all_rows(pickle.loads(pickle.dumps(numbers))) == all_rows(numbers)
    loader = DataLoader(batches, batch_size=None, num_workers=2, collate_fn=_as_it_is)
    assert sorted(row["id"][0] for row in all_rows(loader)) == IDS


def _as_it_is(batch):
    return batch


def test_a_batch_is_read_without_its_padding():
    (batch,) = from_arrays({"id": IDS[:3]}, COLUMNS[2:3], 5)
    assert all_rows(from_arrays(batch, COLUMNS[2:3], 2)) == [{"id": [i]} for i in IDS[:3]]


def test_numbers_are_not_copied():
    values = np.arange(8, dtype=np.int64)
    batches = from_arrays({"id": values}, COLUMNS[2:3], 8)
    values[0] = 77
    assert next(iter(batches))["id"].values[0] == 77


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([1, 2], ">i4"), [[1], [2]]),
        (np.array([1, 2, 3, 4])[::2], [[1], [3]]),
        (np.array([2**64 - 1, 1], np.uint64), [[-1], [1]]),
        (np.arange(6).reshape(2, 3)[:, ::-1], [[2, 1, 0], [5, 4, 3]]),
        (np.ma.masked_array([1, 2], [False, True]), [[1], []]),
        (np.zeros((2, 0), np.int64), [[], []]),
        ([2**64 - 1, None], [[-1], []]),
        ([[1], [], None, [2.0]], [[1], [], [], [2]]),
        ([5, [6, 7]], [[5], [6, 7]]),
        ([np.array([5]), np.array([], np.int64)], [[5], []]),
        (pa.chunked_array([[1], [None]]), [[1], []]),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        ([], []),
    ],
)
def test_arrays_of_many_kinds(values, expected):
    rows = all_rows(from_arrays({"c": values, "n": np.zeros(len(expected))},
        [varlen("c", torch.int64, null="empty"), fixedlen("n", [0.0])], 2) if expected else [])  # fmt: skip
    assert [row["c"] for row in rows] == expected


@pytest.mark.parametrize(
    ("data", "columns", "error", "match"),
    [
        ({"c": [1, None, 3]}, C, ValueError, "column 'c' of the arrays, row 1: got null, expec"),
        ({"c": [1, 2, "a"]}, C, ValueError,
         r"column 'c' of the arrays, row 2: got 'a', expected an integer of 64 bits"),
        ({"c": [[1], [2, 2.5]]}, C, ValueError,
         r"column 'c' of the arrays, row 1: got 2.5, expected an integer"),
        ({"c": [1, 2**64]}, C, ValueError,
         r"column 'c' of the arrays, row 1: got 18446744073709551616, expected an integer of 64 bits"),
        ({"c": [-1, 2**64 - 1]}, C, ValueError,
         r"column 'c' of the arrays, row 0: got -1, expected no number below 0, since the column also holds 18446"),
        ({"c": [True]}, C, ValueError, "column 'c' of the arrays, row 0: got True, expected an"),
        ({"c": np.array([1.5, 2.5])}, C, ValueError,
         r"column 'c' of the arrays, row 0: got 1.5, expected a whole number"),
        ({"c": np.array(["a"])}, C, ValueError,
         r"column 'c' of the arrays: got string, expected list<int64> .* Strings are read by `hashed`"),
        ({"x": np.array([0.5, np.nan])}, [fixedlen("x", [0.0])], ValueError,
         "column 'x' of the arrays, row 1: got nan, expected a finite number"),
        ({"x": np.array([2**24 + 1])}, [fixedlen("x", [0.0])], ValueError,
         "column 'x' of the arrays, row 0: got 16777217, which float32 would round"),
        ({"x": np.zeros((2, 3))}, [fixedlen("x", [0.0])], ValueError,
         "column 'x' of the arrays, row 0: got 3 values, expected 1"),
        ({"c": [1], "d": [1, 2]}, [varlen("c", torch.int64), varlen("d", torch.int64)], ValueError,
         "column 'd' of the arrays: got 2 rows, expected 1, as 'c' has"),
        ({"d": [1], "e": [2]}, C, ValueError,
         r"column 'c' of the arrays: got no such column, expected one of \['d', 'e'\]"),
        ({"t": np.array(["2026-11-30"], "datetime64[s]")}, [fixedlen("t", [0.0])], ValueError,
         r"column 't' of the arrays: got timestamp\[s\], expected numbers or strings. Convert it first, to numbers"),
        ({"c": 5}, C, ValueError, "column 'c' of the arrays: got 5, expected an array, a tensor"),
        ({"c": "abc"}, C, ValueError, "column 'c' of the arrays: got 'abc', expected an array"),
        ({"c": np.array(5)}, C, ValueError, "column 'c' of the arrays: got one value, expected"),
        ({"c": np.array([1j])}, C, ValueError, "column 'c' of the arrays: got ndarray complex12"),
        ({"c": torch.tensor([1j]).conj().imag}, C, ValueError, "column 'c' of the arrays: got Tensor torch.float32"),
        ([{"c": 1}], C, TypeError, "data: got a list of dict, expected .* recfx.data.pack_rows"),
        (np.zeros(3), C, TypeError, r"data: got ndarray float64 \[3\], expected a dict of arr"),
        (pa.table([[1], [2]], ["c", "c"]), C, ValueError,
         "column 'c' of the arrays: got 2 columns of this name, expected one"),
    ],
)  # fmt: skip
def test_errors_name_column_and_row(data, columns, error, match):
    with pytest.raises(error, match=match):
        list(from_arrays(data, columns, 10))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": Split(part="train", fraction=0.5)}, "split: got no key, expected one: arrays are split by row"),
        ({"split": Split(part="train", fraction=0.5, key="k")}, r"column 'k' of the arrays: got no such column"),
        ({"filter": [("k", ">", 1)]}, "filter: got .*, which does not fit the arrays"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"rank": 5, "world_size": 5}, "rank: got 5 of world_size 5"),
        ({"on_bad": "stop"}, "on_bad: got 'stop'"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        list(from_arrays({"id": [1, 2]}, **{"columns": COLUMNS[2:3], **options}))
    with pytest.raises(TypeError, match="shuffle: got 100, expected bool"):
        from_arrays({"id": [1]}, COLUMNS[2:3], shuffle=100)
    with pytest.raises(TypeError, match="transform: got 3, expected a function"):
        from_arrays({"id": [1]}, COLUMNS[2:3], transform=3)
    with pytest.raises(TypeError, match="drop_remainder: got 'no', expected bool"):
        from_arrays({"id": [1]}, COLUMNS[2:3], drop_remainder="no")
    with pytest.raises(ValueError, match="rank: got 0 of 9 workers"):
        list(from_arrays({"id": []}, COLUMNS[2:3], world_size=9))


def test_half_precision_of_torch():
    """numpy has no bfloat16; float32 holds all of it."""
    batches = from_arrays({"x": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)}, [fixedlen("x", [0.0])], 2)
    assert [row["x"] for row in all_rows(batches)] == [[1.5], [2.0]]


def test_other_columns_may_have_one_name():
    """As in a file."""
    table = pa.table([[1, 2], [3, 4], [5, 6]], ["id", "d", "d"])
    for options, ids in (({}, [1, 2]), ({"filter": [("id", ">", 1)]}, [2])):
        assert [row["id"] for row in all_rows(from_arrays(table, COLUMNS[2:3], 10, **options))] == [[i] for i in ids]


def test_bad_rows_are_skipped_and_counted():
    it = iter(from_arrays({"x": np.array([0.5, np.nan, 2.0])}, [fixedlen("x", [0.0])], 2, on_bad="skip"))
    assert [row["x"] for row in all_rows(it)] == [[0.5], [2.0]]
    assert it.num_bad == 1


def test_columns_that_may_be_missing():
    columns = [fixedlen("x", [0.25], missing="empty"), varlen("c", torch.int64)]
    with pytest.warns(UserWarning, match=r"got no columns \['x'\] in any of the arrays"):
        assert all_rows(from_arrays({"c": [1, 2]}, columns, 2)) == [{"x": [0.25], "c": [1]}, {"x": [0.25], "c": [2]}]
    with pytest.warns(UserWarning, match="got no columns"):
        assert all_rows(from_arrays({"d": [1, 2]}, columns[:1], 2)) == [{"x": [0.25]}] * 2


def test_nothing_to_read_warns():
    with pytest.warns(UserWarning, match="got no batch in a pass over the data, but 0 rows in the arrays .* more rows"):
        assert list(from_arrays({"id": []}, COLUMNS[2:3])) == []


def test_fields_of_structs():
    data = {"user": [{"age": 3, "tags": ["a"]}, None]}
    columns = [fixedlen("user.age", [0.0], null="empty"), varlen("user.tags", torch.uint8, null="empty")]
    assert all_rows(from_arrays(data, columns, 2)) == [
        {"user.age": [3.0], "user.tags": [b"a"]}, {"user.age": [0.0], "user.tags": []}]  # fmt: skip


# Pandas and polars.


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas", reason="pandas is not installed")


def test_missing_ids_of_a_frame_are_null(pandas):
    frame = pandas.DataFrame({"c": [1.0, np.nan, 3.0], "d": pandas.array([2**60 + 1, None, 3], "Int64")})
    columns = [varlen(name, torch.int64, null="empty") for name in ("c", "d")]
    assert all_rows(from_arrays(frame, columns, 3)) == [
        {"c": [1], "d": [2**60 + 1]}, {"c": [], "d": []}, {"c": [3], "d": [3]}]  # fmt: skip
    with pytest.raises(ValueError, match="column 'c' of the arrays, row 1: got null, expected a value"):
        list(from_arrays(frame, [varlen("c", torch.int64)], 3))
    with pytest.raises(ValueError, match=r"row 0: got 1.152921504606847e.18, which may have been rounded"):
        list(from_arrays(pandas.DataFrame({"c": [2.0**60, np.nan]}), columns[:1], 3))


def test_series_of_many_kinds(pandas):
    frame = pandas.DataFrame({
        "text": pandas.array(["a", None], "string"), "object": ["b", None], "flag": [True, False],
        "category": pandas.Categorical(["x", "y"]), "lists": [[1, 2], None], "nan": ["c", np.nan],
    }, index=[7, 3])  # fmt: skip
    words = [varlen(name, torch.uint8, null="empty") for name in ("text", "object", "category", "nan")]
    columns = [*words, fixedlen("flag", [0.0]), varlen("lists", torch.int64, null="empty")]
    assert all_rows(from_arrays(frame, columns, 2)) == [
        {"text": [b"a"], "object": [b"b"], "category": [b"x"], "nan": [b"c"], "flag": [1.0], "lists": [1, 2]},
        {"text": [], "object": [], "category": [b"y"], "nan": [], "flag": [0.0], "lists": []}]  # fmt: skip


def test_errors_over_a_frame(pandas):
    times = pandas.DataFrame({"t": pandas.to_datetime(["2026-11-30"])})
    with pytest.raises(ValueError, match=r"column 't' of the arrays: got timestamp\[.*\], expected numbers or strings"):
        from_arrays(times, [fixedlen("t", [0.0])])
    mixed = pandas.DataFrame({"c": pandas.Series([1, "a"], dtype=object)})
    with pytest.raises(ValueError, match="column 'c' of the arrays, row 1: got 'a', expected an integer"):
        from_arrays(mixed, [varlen("c", torch.int64)])
    twice = pandas.DataFrame([[1, 2]], columns=["c", "c"])
    with pytest.raises(ValueError, match="column 'c' of the arrays: got 2 columns of this name, expected one"):
        from_arrays(twice, [varlen("c", torch.int64)])


def test_a_lazy_frame_is_collected_first():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    with pytest.raises(TypeError, match=r"data: got .*LazyFrame, expected .* Collect it first"):
        from_arrays(polars.LazyFrame({"c": [1]}), [varlen("c", torch.int64)])
    frame = polars.DataFrame({"c": [[1, 2], None], "t": [1.0, None]})
    columns = [varlen("c", torch.int64, null="empty"), fixedlen("t", [0.5], null="empty")]
    assert all_rows(from_arrays(frame, columns, 2)) == [{"c": [1, 2], "t": [1.0]}, {"c": [], "t": [0.5]}]


def test_train_and_evaluate_raise_without_a_warning_too(tmp_path):
    from recfx import optim
    from recfx.embeddings import Embedding
    from recfx.step import train_step
    from recfx.train import TrainConfig, evaluate, train

    step = train_step(
        features=dict,
        embeddings={"emb": [Embedding("item", dim=2)]},
        forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None],
        sparse_optimizer=optim.sparse_sgd(0.1),
        dense_optimizer=optim.sgd(0.1),
    )
    data = {"label": [1.0] * 5, "item": [1] * 5}
    columns = [fixedlen("label", [0.0]), varlen("item", torch.int64)]
    batches = from_arrays(data, columns, 6, drop_remainder=True)
    state = step.init({"b": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"reader: got no batch from 5 rows in the arrays \(batch_size=6, drop_remainder"
    ):
        train(step, step.update_, state, batches, TrainConfig(output_dir=tmp_path))
    with pytest.raises(ValueError, match=r"batches: got none from 5 rows in the arrays"):
        evaluate(step.evaluate_, state, batches)
    _, progress = train(step, step.update_, state, from_arrays(data, columns, 2), TrainConfig(output_dir=tmp_path))
    assert progress.step == 3  # the last batch holds one sample
    assert evaluate(step.evaluate_, state, from_arrays(data, columns, 2))["num_samples"] == 5
