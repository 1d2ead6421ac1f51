"""The values that `convert` writes: of the given type, in every format, and never another number."""

from __future__ import annotations

import math
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.cli import main
from recfx.data import Csv, reader, varlen
from recfx.data.convert import TYPES, convert
from tests.data.rows import FORMATS, all_rows, write

INT, UINT, FLOAT, DOUBLE, STRING, BINARY = (
    pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.string(), pa.binary()
)  # fmt: skip
BIG = 2**24 + 1
KEPT = {
    # asked, source -> kept
    "double as int": (INT, pa.array([123456789.0, 123456790.0, None]), [123456789, 123456790, None]),
    "decimal as int": (INT, pa.array([Decimal("7.00"), Decimal(-1)], pa.decimal128(12, 2)), [7, -1]),
    "text as int": (INT, pa.array(["007", " -3 ", "+5", "2.0", None]), [7, -3, 5, 2, None]),
    "bool as int": (INT, pa.array([True, None, False]), [1, None, 0]),
    "double as double": (DOUBLE, pa.array([0.1, 978300760.0]), [0.1, 978300760.0]),
    "int as double": (DOUBLE, pa.array([2**53, -5]), [2.0**53, -5.0]),
    "text as double": (DOUBLE, pa.array(["0.1", " 1e3", "-inf"]), [0.1, 1000.0, -math.inf]),
    "int as float": (FLOAT, pa.array([2**25, 7]), [2.0**25, 7.0]),
    "text as float": (FLOAT, pa.array(["0.5", "33554432"]), [0.5, 2.0**25]),
    "int as string": (STRING, pa.array([2**63 - 1, None]), ["9223372036854775807", None]),
    "double as string": (STRING, pa.array([123456789012.0, 0.5, -0.0]), ["123456789012", "0.5", "0"]),
    "decimal as string": (STRING, pa.array([Decimal("1.50")]), ["1.50"]),
    "text as binary": (BINARY, pa.array(["a", None]), [b"a", None]),
    "int as binary": (BINARY, pa.array([12]), [b"12"]),
    "lists of doubles": (pa.list_(INT), pa.array([[1.0, 2.0], None, []]), [[1, 2], None, []]),
    "items of lists": (INT, pa.array([[1.0, None], None, []]), [[1, None], None, []]),
    "lists of lists": (STRING, pa.array([[[1.0], []], None]), [[["1"], []], None]),
    "nulls": (INT, pa.array([None, None], pa.float64()), [None, None]),
}


def write_source(folder: Path, extension: str, array: pa.Array) -> str:
    return write(folder / f"a.{extension}", pa.table({"x": array}), 2)


def kept_in(path: Path) -> pa.Table:
    return orc.read_table(path) if path.suffix == ".orc" else pq.read_table(path)


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("to", ["orc", "parquet"])
def test_types_hold_in_every_format(tmp_path, case, extension, to):
    asked, array, expected = KEPT[case]
    (path,) = convert(write_source(tmp_path, extension, array), tmp_path / "out", to=to, types={"x": asked})
    table = kept_in(path)
    kind = table.schema.field("x").type
    while pa.types.is_list(kind):
        kind = kind.value_type
    assert kind == (asked.value_type if pa.types.is_list(asked) else asked)
    assert table["x"].to_pylist() == expected


@pytest.mark.parametrize("extension", ["parquet", "arrow", "csv"])
def test_unsigned_integers_as_they_are(tmp_path, extension):
    ids = [0, 2**63, 2**64 - 1]
    path = write(tmp_path / f"a.{extension}", pa.table({"x": pa.array(ids, UINT)}))
    (whole,) = convert(path, tmp_path / "out", types={"x": UINT})
    assert pq.read_table(whole)["x"].to_pylist() == ids
    (bits,) = convert(path, tmp_path / "orc", types={"x": UINT}, to="orc")
    assert orc.read_table(bits)["x"].to_pylist() == [0, -(2**63), -1]
    for each in (whole, bits):
        assert [row["x"] for row in all_rows(reader(each, [varlen("x", torch.int64)], 1))] == [[0], [-(2**63)], [-1]]


WRONG = {
    "fraction": (INT, pa.array([1.0, 2.0, 0.5]), "row 2: got 0.5, expected a whole number, or the type double or str"),
    "NaN": (INT, pa.array([1.0, 2.0, math.nan]), "row 2: got nan, expected a whole number, or null where there"),
    "large double": (INT, pa.array([1.0, None, 2.0**53]), "row 2: got 9007199254740992.0, which may have been rounded"),
    "text": (INT, pa.array(["1", "2", "0x1F"]), "row 2: got '0x1F', expected a whole number from -9223372036854775808"),
    "long text": (INT, pa.array(["1", "2", f"{2**63}"]), "row 2: got '9223372036854775808', expected a whole number"),
    "negative": (UINT, pa.array([1, None, -1]), "row 2: got -1, expected a whole number from 0 on, or the type int"),
    "negative double": (UINT, pa.array([1, None, -1.0]), "row 2: got -1.0, expected a whole number from 0 on"),
    "negative text": (UINT, pa.array(["0", "1", "-1"]), "row 2: got '-1', expected a whole number from 0 to 18446744"),
    "longer text": (UINT, pa.array(["0", "1", f"{2**64}"]), "row 2: got '18446744073709551616', expected a whole"),
    "rounded": (FLOAT, pa.array([1, 2**25, BIG]), r"row 2: got 16777217, which float32 would round to 16777216"),
    "rounded double": (DOUBLE, pa.array([1, 2, 2**53 + 1]), r"row 2: got 9007199254740993, which float64 would round"),
    "rounded text": (DOUBLE, pa.array(["1", "2", f"{2**64 - 1}"]), r"row 2: got 1.8.*e\+19, a double that may"),
    "words": (FLOAT, pa.array(["1", "2", "a"]), "row 2: got 'a', expected a number"),
    "bytes": (STRING, pa.array([b"a", b"b", b"\xff"]), r"row 2: got b'\\xff', expected a string of UTF-8"),
    "in lists": (INT, pa.array([[1.0], None, [2.0, 0.5]]), "row 2: got 0.5, expected a whole number"),
    "plain as lists": (pa.list_(INT), pa.array([1]), ": got int64, expected .* stored as list<.*int64>"),
    "struct": (INT, pa.array([{"a": 1}]), ": got struct<a: int64>, expected values that can be stored as int64"),
    "time": (FLOAT, pa.array([datetime(2020, 1, 1)]), r": got timestamp\[..\], expected .* stored as float"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("extension", FORMATS)
def test_what_does_not_fit_is_an_error(tmp_path, case, extension):
    """It names column, file and row, and nothing is written."""
    asked, array, message = WRONG[case]
    path = write_source(tmp_path, extension, array)
    with pytest.raises(ValueError, match=f"column 'x' of '{path}',? ?{message}"):
        convert(path, tmp_path / "out", types={"x": asked})
    assert list((tmp_path / "out").iterdir()) == []


DEFAULTS = {
    "ids with nulls": (pa.array([978300760.0, None]), "row 0: got 978300760.0, which float32 would round to 978300736"),
    "in lists": (pa.array([[1.0], [0.5, 978300760.0]]), "row 1: got 978300760.0"),
    "in structs": (pa.array([None, {"a": 978300760.0}]), "row 1: got 978300760.0"),
    "weights": (pa.array([[], [{"k": 1, "v": 978300760.0}]]), "row 1: got 978300760.0"),
    "in maps": (pa.array([[], [(1, 978300760.0)]], pa.map_(pa.int64(), pa.float64())), "row 1: got 978300760.0"),
    "decimals": (pa.array([Decimal("0.5"), Decimal(978300760)], pa.decimal128(12, 1)), "row 1: got 978300760.0"),
    "large decimals": (pa.array([Decimal(0), Decimal(2**64)], pa.decimal128(38, 0)), "row 1: got 18446744073709551616"),
}


@pytest.mark.parametrize("case", DEFAULTS)
@pytest.mark.parametrize("extension", FORMATS)
def test_whole_numbers_that_would_be_rounded(tmp_path, case, extension):
    array, message = DEFAULTS[case]
    path = write_source(tmp_path, extension, array)
    with pytest.raises(ValueError, match=f"column 'x' of '{path}', {message}.*, or"):
        convert(path, tmp_path / "out")
    if case != "large decimals":
        (allowed,) = convert(path, tmp_path / "out", rounding="allow")
        assert "978300736.0" in str(pq.read_table(allowed)["x"].to_pylist())


def test_defaults(tmp_path):
    table = pa.table(
        {
            "exact": [2.0**25, 0.1, None],
            "count": pa.array([Decimal(2**64 - 1), Decimal(5), None], pa.decimal128(20, 0)),
            "price": pa.array([Decimal("1.50"), None, Decimal("2.00")]),
            "small": pa.array([1, 2, None], pa.uint8()),
            "binary": [b"a", b"b", None],
            "latin": [b"a", b"\xe9", None],
            "nested": [[[b"\xe9"]], [], None],
            "nothing": pa.nulls(3),
            "user": [{"age": 30.0, "tags": [b"\xe9"], "id": 5}, None, {"age": None, "tags": None, "id": None}],
        }
    )
    for extension in ("parquet", "arrow"):
        (path,) = convert(write(tmp_path / extension / f"a.{extension}", table, 1), tmp_path / extension / "out")
        user = pa.struct([("age", FLOAT), ("tags", pa.list_(BINARY)), ("id", INT)])
        kinds = [FLOAT, INT, FLOAT, INT, STRING, BINARY, pa.list_(pa.list_(BINARY)), pa.null(), user]
        got = pq.read_table(path)
        assert [str(kind).replace("element", "item") for kind in got.schema.types] == [str(kind) for kind in kinds]
        rows = got.to_pylist()
        assert [row["count"] for row in rows] == [-1, 5, None]
        assert [row["latin"] for row in rows] == [b"a", b"\xe9", None]
        assert [row["binary"] for row in rows] == ["a", "b", None]
        assert [row["user"] for row in rows] == table["user"].to_pylist()
        assert [row["price"] for row in rows] == [1.5, None, 2.0]


def test_a_column_of_nulls_is_read_as_any(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.nulls(2), "lists": pa.nulls(2, pa.list_(pa.null()))}))
    (path,) = convert(path, tmp_path / "out")
    columns = [varlen("x", torch.uint8, null="empty"), varlen("lists", torch.int64, null="empty")]
    assert all_rows(reader(path, columns, 1)) == [{"x": [], "lists": []}] * 2


def test_bytes_in_a_later_unit(tmp_path):
    """The file is written again, with the column as bytes from its first row on."""
    words = [[b"a"], [b"b"], [b"\xff", b"c"]]
    for to in ("orc", "parquet"):
        path = write(tmp_path / f"{to}.orc", pa.table({"x": words, "y": ["d", "e", "f"]}), 1)
        (path,) = convert(path, tmp_path / "out", to=to)
        assert kept_in(path)["x"].to_pylist() == words
        assert kept_in(path)["y"].to_pylist() == ["d", "e", "f"]


def test_csv_that_is_not_utf8_in_a_later_block(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"x,y,tags\n" + b"a,1,b|c\n" * 9 + b"caf\xe9,1,\xe9|d\n")
    how = Csv(block_bytes=20, list_separator={"tags": "|"})
    (path,) = convert(tmp_path / "a.csv", tmp_path / "out", format=how)
    rows = pq.read_table(path).to_pylist()
    assert rows == [{"x": b"a", "y": 1, "tags": [b"b", b"c"]}] * 9 + [
        {"x": b"caf\xe9", "y": 1, "tags": [b"\xe9", b"d"]}
    ]


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text("id,t,x,code\n7,978300760,0.5,007\n18446744073709551615,1,33554432,7\n")
    types = {"id": UINT, "t": DOUBLE, "x": FLOAT, "code": STRING}
    (path,) = convert(tmp_path / "a.csv", tmp_path / "out", types=types)
    assert pq.read_table(path).to_pydict() == {
        "id": [7, 2**64 - 1], "t": [978300760.0, 1.0], "x": [0.5, 2.0**25], "code": ["007", "7"]
    }  # fmt: skip
    (tmp_path / "b.csv").write_text("x,y\n0.5,0.5\n0.5,978300760\n")
    for types in ({}, {"y": FLOAT}):
        with pytest.raises(ValueError, match=r"column 'y' of '.*b.csv', row 1: got 978300760.0, which float32 would"):
            convert(tmp_path / "b.csv", tmp_path / "out", types=types)
    (tmp_path / "c.csv").write_text("x\n0.5\n18446744073709551615\n")
    for kind in (FLOAT, DOUBLE):
        with pytest.raises(
            ValueError, match=r"column 'x' of '.*c.csv', row 1: got '18446744073709551615', expected double"
        ):
            convert(tmp_path / "c.csv", tmp_path / "out", types={"x": kind})
        with pytest.raises(ValueError, match=r"column 'x' of '.*c.csv', row 0: got '0.5', expected int64"):
            convert(tmp_path / "c.csv", tmp_path / "out", types={"x": INT})


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.decimal128(5, 0), pa.struct([("a", pa.int8())]), pa.date32()])
def test_types_that_are_not_kept(tmp_path, kind):
    path = write(tmp_path / "a.parquet", pa.table({"x": [1]}))
    with pytest.raises(ValueError, match=r"types: got .* for 'x', expected int64, uint64, float32"):
        convert(path, tmp_path / "out", types={"x": kind})
    with pytest.raises(ValueError, match="rounding: got 'up', expected one of"):
        convert(path, tmp_path / "out", rounding="up")


def test_the_command(tmp_path, capsys):
    from recfx.commands.convert import KINDS

    assert tuple(TYPES) == KINDS
    path = write(tmp_path / "a.parquet", pa.table({"x": [978300760.0], "y": [BIG], "z": [7.0], "b": [5]}))
    arguments = ["convert", path, str(tmp_path / "out"), "--types", "y=double,z=int,b=binary"]
    assert main(arguments) == 2
    assert "column 'x' of" in capsys.readouterr().err
    assert main([*arguments, "--rounding", "allow"]) == 0
    table = pq.read_table(tmp_path / "out" / "a.parquet")
    assert table.schema.types == [FLOAT, DOUBLE, INT, BINARY]
    assert table.to_pylist() == [{"x": 978300736.0, "y": BIG, "z": 7, "b": b"5"}]
