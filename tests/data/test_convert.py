"""Converted files hold the same rows, in units of the given size."""

from __future__ import annotations

import gzip
import math
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.data import Csv, fixedlen, reader, varlen
from recfx.data.convert import convert
from tests.data.rows import FORMATS, all_rows, write
from tests.data.test_conform import COLUMNS, SOME_ROWS, expected, table_of

FLAT = pa.table({"label": [1, 0, 1, None], "x": [0.5, None, 2.0, 1.0], "city": ["a", "", None, "b"]})


def num_units(path: Path) -> int:
    return orc.ORCFile(path).nstripes if path.suffix == ".orc" else pq.ParquetFile(path).num_row_groups


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("to", ["orc", "parquet"])
@pytest.mark.parametrize("rows_per_unit", [5, 100])
def test_every_kind_of_column(tmp_path, extension, to, rows_per_unit):
    write(tmp_path / f"a.{extension}", table_of(SOME_ROWS), 4)
    write(tmp_path / f"b.{extension}", table_of([]))
    written = convert(tmp_path, tmp_path / "out", to=to, rows_per_unit=rows_per_unit)
    assert [path.name for path in written] == [f"a.{to}", f"b.{to}"]
    assert num_units(written[0]) == -(-len(SOME_ROWS) // rows_per_unit)
    assert all_rows(reader(tmp_path / "out", COLUMNS, 5, drop_remainder=False)) == expected(SOME_ROWS)


@pytest.mark.parametrize("to", ["orc", "parquet"])
@pytest.mark.parametrize("as_lists", [False, True])
@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
def test_plain_values_and_missing_ones(tmp_path, to, as_lists, extension):
    write(tmp_path / f"a.{extension}", FLAT)
    (path,) = convert(tmp_path, tmp_path / "out", to=to, as_lists=as_lists, compression="zstd")
    null = "error" if as_lists else "empty"
    columns = [fixedlen("label", [0.5], null=null), varlen("x", torch.float32, null=null)]
    rows = all_rows(reader(path, [*columns, varlen("city", torch.uint8, null=null)], 4))
    empty = [] if extension == "csv" and not rows[1]["city"] else [b""]  # an empty cell is a missing value
    assert [row["label"] for row in rows] == [[1], [0], [1], [0.5]]
    assert [row["x"] for row in rows] == [[0.5], [], [2.0], [1.0]]
    assert [row["city"] for row in rows] == [[b"a"], empty, [], [b"b"]]


def test_some_columns_of_csv_with_their_types(tmp_path):
    (tmp_path / "a.csv").write_text("1\t7\t3|4\n0\t\t\n")
    how = Csv(delimiter="\t", column_names=("label", "x", "ids"), list_separator="|")
    types = {"x": pa.float32(), "ids": pa.int64()}
    (path,) = convert(tmp_path, tmp_path / "out", columns=["x", "ids"], types=types, format=how)
    assert pq.read_schema(path).names == ["x", "ids"]
    assert pq.read_table(path).to_pylist() == [{"x": [7.0], "ids": [3, 4]}, {"x": [], "ids": []}]


def test_nothing_is_overwritten_and_nothing_is_half_written(tmp_path):
    write(tmp_path / "a.parquet", FLAT)
    convert(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"folder: got .*, where 'a.parquet' exists"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "b.csv").write_text("x\n1\n2,3\n")
    with pytest.raises(ValueError, match=r"file '.*b.csv', row 1: got 2 cells, expected 1"):
        convert(tmp_path / "b.csv", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rows_per_unit": 0}, "rows_per_unit: got 0"),
        ({"columns": ["y"]}, r"column 'y' of '.*': got no such column"),
        ({"types": {"z": pa.int64()}}, r"column 'z' of '.*': got no such column"),
        ({"compression": "rar"}, r"compression: got 'rar' \(.*\), expected one that parquet files can have"),
        ({"compression": "rar", "to": "orc"}, "compression: got 'rar'"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, match):
    write(tmp_path / "a.parquet", FLAT)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path, tmp_path / "out", **arguments)


def test_types_that_have_no_place_in_training(tmp_path):
    table = pa.table(
        {
            "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
            "day": pa.array([date(2020, 1, 2), None]),
            "city": pa.array(["a", None]).dictionary_encode(),
            "views": pa.array([[1], [2, 3]], pa.list_view(pa.int32())),
        }
    )
    (path,) = convert(write(tmp_path / "a.arrow", table), tmp_path / "out")
    assert pq.read_schema(path).types == [pa.float32(), pa.string(), pa.string(), pa.list_(pa.int64())]
    assert pq.read_table(path).to_pylist() == [
        {"price": 1.5, "day": "2020-01-02", "city": "a", "views": [1]},
        {"price": None, "day": None, "city": None, "views": [2, 3]},
    ]


def test_values_that_would_change_are_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": [[1.0], [-1e39]]}))
    with pytest.raises(ValueError, match=r"column 'x' of '.*', row 1: got -1e\+39, which float32 would round to -inf"):
        convert(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_infinities_stay(tmp_path):
    (path,) = convert(write(tmp_path / "a.orc", pa.table({"x": [math.inf, -math.inf]})), tmp_path / "out")
    assert pq.read_table(path)["x"].to_pylist() == [math.inf, -math.inf]


def test_names_with_dots(tmp_path):
    for name in ("2020.01.csv", "2020.02.csv", "b.v1.csv.gz", "c.parquet.d"):
        (tmp_path / name).write_bytes(gzip.compress(b"x\n1\n") if name.endswith("gz") else b"x\n1\n")
    written = convert(tmp_path, tmp_path / "out", format=Csv())
    assert [path.name for path in written] == [f"{n}.parquet" for n in ("2020.01", "2020.02", "b.v1", "c.parquet.d")]


def test_two_inputs_of_one_name(tmp_path):
    paths = [write(tmp_path / folder / "a.parquet", FLAT) for folder in ("one", "two")]
    expected = r"paths: got '.*one/a.parquet' and '.*two/a.parquet', which would both be .* a separate one"
    with pytest.raises(ValueError, match=expected):
        convert(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
