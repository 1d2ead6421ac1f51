"""Fields of struct columns, read by their dotted names."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.data import Split, fixedlen, hashed, reader, varlen
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import FORMATS, all_rows, write

USERS = [
    {"age": 30.0, "ids": [1, 2], "home": {"city": "rome", "zip": 7}},
    None,
    {"age": None, "ids": None, "home": None},
    {"age": 50.0, "ids": [], "home": {"city": None, "zip": 8}},
]
HOME = pa.struct({"city": pa.string(), "zip": pa.int64()})
USER = pa.struct({"age": pa.float64(), "ids": pa.list_(pa.int64()), "home": HOME})
COLUMNS = [
    fixedlen("user.age", [-1.0], null="empty"),
    varlen("user.ids", torch.int64, null="empty"),
    varlen("user.home.city", torch.uint8, null="empty"),
    varlen("user.home.zip", torch.int64, null="empty"),
]


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path) -> str:
    table = pa.table({"label": [0.0, 1.0, 0.0, 1.0], "user": pa.array(USERS, USER)})
    return write(tmp_path / f"a.{request.param}", table, 3)


def test_fields_are_columns(path):
    rows = all_rows(reader(path, COLUMNS, 2))
    assert [tuple(row[column.name] for column in COLUMNS) for row in rows] == [
        ([30.0], [1, 2], [b"rome"], [7]),
        ([-1.0], [], [], []),
        ([-1.0], [], [], []),
        ([50.0], [], [], [8]),
    ]


def test_a_null_field_is_a_bad_row(path):
    """Of a null struct too."""
    column = fixedlen("user.age", [-1.0])
    with pytest.raises(ValueError, match=rf"column 'user.age' of '{path}', row 1: got null, expected a value"):
        list(reader(path, [column], 1))
    it = iter(reader(path, [column], 1, on_bad="skip"))
    assert ([row["user.age"] for row in all_rows(it)], it.num_bad) == ([[30.0], [50.0]], 2)


@pytest.mark.parametrize(
    ("column", "match"),
    [
        (
            varlen("user.name", torch.int64),
            r"'user.name' of '.*': got no such column, expected one of .*'user.home.zip'",
        ),
        (varlen("label.x", torch.int64), "column 'label.x' of '.*': got no such column"),
        (varlen("user", torch.int64), r"got struct<.*, expected .* A field of it can be read as a column: 'user.age'"),
        (varlen("user.home", torch.int64), r"column 'user.home' of .* can be read as a column: 'user.home.city'"),
        (varlen("user.age", torch.uint8), "column 'user.age' of '.*': got double, expected list<string>"),
        (varlen("user.home.city", torch.int64), "Strings are read by `hashed`"),
    ],
)
def test_what_is_no_field_is_named(path, column, match):
    with pytest.raises(ValueError, match=match):
        list(reader(path, [column], 1))


def test_a_column_of_that_very_name_goes_before(tmp_path):
    table = pa.table({"a": pa.array([{"b": 1}]), "a.b": [2], "a.c": pa.array([{"d": 3}])})
    for extension in FORMATS:
        path = write(tmp_path / f"a.{extension}", table)
        columns = [varlen("a.c.d", torch.int64), varlen("a.b", torch.int64)]
        assert all_rows(reader(path, columns, 1)) == [{"a.c.d": [3], "a.b": [2]}], extension


def test_split_filter_and_cache(path, tmp_path):
    """The key of a split may be a field; a filter names one as pyarrow does."""
    import pyarrow.dataset as ds

    columns = [varlen("user.home.zip", torch.int64, null="empty"), hashed("user.home.city", farm_hashes, null="empty")]
    parts = [
        all_rows(
            reader(
                path, columns, 1, split=Split(part=part, fraction=0.5, key="user.home.zip"), cache=tmp_path / "cache",
                filter=ds.field("user", "age") > 10,
            )
        )
        for part in ("train", "validation")
    ]  # fmt: skip
    assert sorted(row["user.home.zip"][0] for rows in parts for row in rows) == [7, 8]


def test_other_fields_are_not_read(tmp_path, monkeypatch):
    table = pa.table({"user": pa.array(USERS, USER), "other": range(4)})
    read = []

    def spy(cls: type, method: str) -> None:
        whole = getattr(cls, method)

        def spied(*args, **kwargs):
            read.append(whole(*args, **kwargs).schema)
            return whole(*args, **kwargs)

        monkeypatch.setattr(cls, method, spied)

    spy(orc.ORCFile, "read_stripe")
    spy(pq.ParquetFile, "read_row_group")
    for extension in ("orc", "parquet"):
        list(reader(write(tmp_path / f"a.{extension}", table), [COLUMNS[3]], 4))
    expected = pa.schema({"user": pa.struct({"home": pa.struct({"zip": pa.int64()})})})
    assert [schema.remove_metadata() for schema in read] == [expected, expected]
