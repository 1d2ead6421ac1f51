"""Columns that are null in all of a file, or that a file does not have."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch

from recfx.data import Csv, JsonLines, Split, fixedlen, hashed, reader, varlen
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import FORMATS, all_rows, write

pytestmark = pytest.mark.filterwarnings("ignore:recfx. got no columns")  # in most tests there is one file


def columns(**options) -> list:
    """One of every kind."""
    return [
        fixedlen("dense", [0.5, 7.0], **options),
        varlen("x", torch.float32, **options),
        varlen("c", torch.int64, **options),
        varlen("deep", torch.int64, depth=3, **options),
        varlen("words", torch.uint8, **options),
        varlen("sentences", torch.uint8, depth=2, **options),
        hashed("tags", farm_hashes, **options),
        varlen("weighted", torch.int64, weighted=True, **options),
        hashed("weighted_tags", farm_hashes, weighted=True, **options),
    ]


NAMES = [column.name for column in columns()]
EMPTY = {name: [0.5, 7.0] if name == "dense" else [] for name in NAMES}
FULL = {
    "dense": [[1.0, 2.0]], "x": [[1.5]], "c": [[1, 2]], "deep": [[[[3]]]], "words": [["a"]], "sentences": [[["b"]]],
    "tags": [["t"]], "weighted": pa.array([[{"k": 1, "v": 0.5}]]), "weighted_tags": pa.array([[{"k": "t", "v": 0.5}]]),
}  # fmt: skip
NULL_LISTS = (pa.null(), pa.list_(pa.null()), pa.large_list(pa.null()), pa.list_(pa.null(), 2))


@pytest.mark.filterwarnings("ignore:recfx. got no batch")
@pytest.mark.parametrize(
    ("extension", "kind"), [*itertools.product(["parquet", "arrow"], NULL_LISTS), ("arrow", pa.list_view(pa.null()))]
)
def test_null_all_day(tmp_path, extension, kind):
    """What pandas and others write of a column in which nothing is: Arrow's null type, or lists of it."""
    table = pa.table({name: pa.nulls(3, kind) for name in NAMES})
    path = write(tmp_path / f"a.{extension}", table)
    assert all_rows(reader(path, columns(null="empty"), 2, drop_remainder=False)) == [EMPTY] * 3
    for column in columns():
        message = f"column '{column.name}' of '{path}', row 0: got null, expected a (value|list.*), or null='empty' for"
        with pytest.raises(ValueError, match=message):
            list(reader(path, [column], 1))
    it = iter(reader(path, columns(), 1, on_bad="skip"))
    assert (list(it), it.num_bad) == ([], 3)


@pytest.mark.parametrize("column", columns(null="empty"), ids=NAMES)
def test_empty_lists_of_nulls_and_null_items(tmp_path, column):
    if column.name == "dense":
        column = fixedlen("dense", [0.5, 7.0], null="empty")
    path = write(tmp_path / "a.parquet", pa.table({column.name: pa.array([[], None, [None]], pa.list_(pa.null()))}))
    it = iter(reader(path, [column], 1, on_bad="skip"))
    assert (all_rows(it), it.num_bad) == ([{column.name: EMPTY[column.name]}] * 2, 1)
    with pytest.raises(ValueError, match=f"column '{column.name}' of '{path}', row 2: got (a null element|1 values)"):
        list(reader(path, [column], 1))


def test_pairs_of_nulls(tmp_path):
    kind = pa.list_(pa.struct([("k", pa.null()), ("v", pa.null())]))
    path = write(tmp_path / "a.arrow", pa.table({"x": pa.array([[], None, [{"k": None, "v": None}]], kind)}))
    it = iter(reader(path, [varlen("x", torch.int64, weighted=True, null="empty")], 1, on_bad="skip"))
    assert (all_rows(it), it.num_bad) == ([{"x": []}] * 2, 1)


def test_lists_deeper_than_the_column_are_of_another_type(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.nulls(1, pa.list_(pa.list_(pa.null())))}))
    with pytest.raises(ValueError, match=r"column 'x' of .*: got list<.*null.*, expected list<int64>"):
        list(reader(path, [varlen("x", torch.int64, null="empty")], 1))
    assert all_rows(reader(path, [varlen("x", torch.int64, depth=2, null="empty")], 1)) == [{"x": []}]


def test_a_struct_that_is_null_all_day(tmp_path):
    for extension in ("parquet", "arrow"):
        path = write(tmp_path / f"a.{extension}", pa.table({"user": pa.nulls(2), "y": [1, 2]}))
        asked = [fixedlen("user.home.zip", [7.0], null="empty"), varlen("y", torch.int64)]
        for split in (None, Split(part="validation", fraction=0.5, key="user.id")):
            rows = all_rows(reader(path, asked, 1, split=split))
            assert rows == [{"user.home.zip": [7.0], "y": [1]}, {"user.home.zip": [7.0], "y": [2]}]
        with pytest.raises(ValueError, match=r"column 'user.age' of .*, row 0: got null, expected a value"):
            list(reader(path, [varlen("user.age", torch.int64)], 1))


def write_days(folder: Path, extension: str) -> Path:
    """A day with all columns, and an older one without them, of two units."""
    label = pa.array([1.0, 2.0, 3.0])
    if extension == "csv":
        (folder / "days").mkdir()
        (folder / "days" / "1.csv").write_text("label\n1\n2\n3\n")
        (folder / "days" / "2.csv").write_text("label,x,c,words,tags\n4,1.5,1,a,t\n")
    else:
        write(folder / "days" / f"1.{extension}", pa.table({"label": label}), 2)
        write(folder / "days" / f"2.{extension}", pa.table({"label": [4.0], **FULL}))
    return folder / "days"


@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 10}, {"cache": True}, {"prefetch": 0}])
def test_a_column_that_older_files_lack(tmp_path, extension, options):
    days = write_days(tmp_path, extension)
    asked = [c for c in columns(missing="empty") if extension != "csv" or c.name in ("x", "c", "words", "tags")]
    options = {name: tmp_path / "cache" if name == "cache" else value for name, value in options.items()}
    batches = reader(days, [fixedlen("label", [0.0]), *asked], 2, drop_remainder=False, **options)
    for _ in range(2):
        rows = sorted(all_rows(batches), key=lambda row: row["label"])
        empty = {column.name: EMPTY[column.name] for column in asked}
        assert rows[:3] == [{"label": [i], **empty} for i in (1, 2, 3)]
        assert rows[3]["x"] == [1.5]
        assert rows[3]["words"] == [b"a"]
    for column in (column for column in columns() if column.name in empty):
        message = rf"column '{column.name}' of '.*1.{extension}': got no such column, expected one of \['label'\]"
        with pytest.raises(ValueError, match=message + ". With missing='empty' for the column its rows are empty in a"):
            list(reader(days, [column], 1))


@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
def test_a_file_that_has_none_of_the_columns(tmp_path, extension):
    days = write_days(tmp_path, extension)
    rows = all_rows(reader(days, [varlen("c", torch.int64, missing="empty")], 1))
    assert [row["c"] for row in rows] == [[], [], [], [1] if extension == "csv" else [1, 2]]


@pytest.mark.parametrize("block_bytes", [5, 1000])
def test_a_column_that_no_row_of_json_lines_has(tmp_path, block_bytes):
    """Where some of the first rows have it, a row without it is null, as in other formats."""
    (tmp_path / "1.jsonl").write_text('{"y": 1, "u": {"a": 1}}\n{"y": 2}\n')
    (tmp_path / "2.jsonl").write_text('{"y": 3, "c": [7], "u": {"a": 1, "b": 5}}\n{"y": 4}\n')
    asked = [varlen("c", torch.int64, missing="empty"), varlen("u.b", torch.int64, missing="empty")]
    how = JsonLines(block_bytes=block_bytes)
    it = iter(reader(tmp_path, [fixedlen("y", [0.0]), *asked], 1, on_bad="skip", format=how))
    empty = [{"y": [y], "c": [], "u.b": []} for y in (1, 2)]
    assert (all_rows(it), it.num_bad) == ([*empty, {"y": [3], "c": [7], "u.b": [5]}], 1)
    with pytest.raises(ValueError, match=r"column 'c' of '.*1.jsonl', row 0: got null, expected a list"):
        list(reader(tmp_path, [varlen("c", torch.int64)], 1))


def test_rows_of_csv_without_a_column(tmp_path):
    """A cell of the first column may be anything; a row of another width is bad."""
    (tmp_path / "a.csv").write_text("id,z\n1,1\nx,2\n3\n,4\n\n")
    it = iter(
        reader(tmp_path, [varlen("c", torch.int64, missing="empty")], 1, on_bad="skip", format=Csv(block_bytes=6))
    )
    assert (all_rows(it), it.num_bad) == ([{"c": []}] * 3, 1)


@pytest.mark.parametrize("extension", FORMATS)
def test_fields_of_structs(tmp_path, extension):
    write(tmp_path / f"1.{extension}", pa.table({"y": [1]}))
    write(tmp_path / f"2.{extension}", pa.table({"y": [2], "user": pa.array([{"age": 30.0}])}))
    write(tmp_path / f"3.{extension}", pa.table({"y": [3], "user": pa.array([{"age": 40.0, "zip": 8}])}))
    asked = [fixedlen("user.age", [-1.0], missing="empty"), varlen("user.zip", torch.int64, missing="empty")]
    rows = all_rows(reader(tmp_path, [*asked, varlen("y", torch.int64)], 1))
    assert [(*row["user.age"], row["user.zip"], *row["y"]) for row in rows] == [(-1, [], 1), (30, [], 2), (40, [8], 3)]


@pytest.mark.filterwarnings("ignore:recfx. got no batch")
@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
def test_with_a_filter_and_a_split(tmp_path, extension):
    days = write_days(tmp_path, extension)
    asked = [varlen("c", torch.int64, missing="empty"), fixedlen("label", [0.0])]
    kept = []
    for part in ("train", "validation"):
        split = Split(part=part, fraction=0.5, key="label")
        kept += all_rows(reader(days, asked, 1, filter=ds.field("label") > 1, split=split))
    assert sorted((row["label"][0], len(row["c"])) for row in kept)[:2] == [(2, 0), (3, 0)]
    with pytest.raises(ValueError, match=r"split: got key 'c', which '.*' lacks, expected one of \['label'\]"):
        list(reader(days, asked, 1, split=Split(part="train", fraction=0.5, key="c")))
    with pytest.raises(ValueError, match=r"filter: got .*, which does not fit"):
        list(reader(days, asked, 1, filter=ds.field("c") > 1))


def test_a_cache_tells_them_apart(tmp_path):
    """What was kept for one declaration is not read for another one."""
    path = write(tmp_path / "a.parquet", pa.table({"x": [[1.0, 2.0]], "y": [1]}))
    for column, expected in (
        (varlen("x", torch.float32), [1.0, 2.0]),
        (varlen("x", torch.float32, truncate=1), [1.0]),
        (varlen("x", torch.float32, truncate=1, side="left"), [2.0]),
    ):
        assert all_rows(reader(path, [column], 1, cache=tmp_path / "cache")) == [{"x": expected}]


def test_null_is_bad_where_only_missing_is_empty(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array([1, None])}))
    with pytest.raises(ValueError, match="row 1: got null, expected a value, or null='empty' for the column"):
        list(reader(path, [varlen("x", torch.int64, missing="empty")], 1))


def test_declarations_that_cannot_be():
    with pytest.raises(ValueError, match="column 'x', missing: got 'skip', expected one of"):
        fixedlen("x", [0.0], missing="skip")


@pytest.mark.filterwarnings("error:recfx. got no columns")
@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
def test_the_reader_warns_once_of_a_name_that_no_file_has(tmp_path, extension):
    days = write_days(tmp_path, extension)
    columns = [varlen("coupno", torch.int64, missing="empty"), varlen("c", torch.int64, missing="empty")]
    batches = reader(days, columns, 2)
    with pytest.warns(
        UserWarning, match=r"got no columns \['coupno'\] in any of '.*', expected each in at least one file"
    ):
        assert list(batches)
    assert list(batches)
