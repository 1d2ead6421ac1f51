"""Lists cut when they are read, as `recfx.features.truncate` cuts those of a batch."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
import torch

from recfx.data import Csv, hashed, reader, varlen
from recfx.features import truncate
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import FORMATS, all_rows, lists_of, write

LISTS = [[1, 2, 3], [], [4], [5, 6]]
TABLE = pa.table(
    {
        "ids": pa.array(LISTS, pa.list_(pa.int64())),
        "x": pa.array(LISTS, pa.list_(pa.float64())),
        "words": [[f"{i}" * i for i in row] for row in LISTS],
        "deep": [[[1, 2, 3], [4]], [], [[], [5, 6]], [[7]]],
        "pairs": pa.array([[{"k": i, "v": i / 2} for i in row] for row in LISTS]),
        "tags": [[f"{i}" for i in row] for row in LISTS],
        "city": ["rome", "", "bern", "oslo"],
    }
)


def columns(**options) -> list:
    return [
        varlen("ids", torch.int64, **options),
        varlen("x", torch.float32, **options),
        varlen("words", torch.uint8, **options),
        varlen("deep", torch.int64, depth=2, **options),
        varlen("pairs", torch.int64, weighted=True, **options),
        hashed("tags", farm_hashes, **options),
        varlen("city", torch.uint8, **options),
    ]


def cut(value, n: int, side: str):
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [cut(item, n, side) for item in value]
    return value[:n] if side == "right" else value[max(len(value) - n, 0) :]


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_innermost_lists_are_cut(tmp_path, extension, side, n):
    path = write(tmp_path / f"a.{extension}", TABLE, 3)
    whole = all_rows(reader(path, columns(), 3, drop_remainder=False))
    for options in ({}, {"cache": tmp_path / "cache"}):
        rows = all_rows(reader(path, columns(truncate=n, side=side), 3, drop_remainder=False, **options))
        assert rows == [{name: cut(value, n, side) for name, value in row.items()} for row in whole]


@pytest.mark.parametrize("side", ["left", "right"])
def test_as_features_truncate_does(tmp_path, side):
    path = write(tmp_path / "a.parquet", TABLE)
    (whole,) = reader(path, columns(), 4)
    (short,) = reader(path, columns(truncate=2, side=side), 4)
    for name in ("ids", "x", "deep", "pairs", "tags"):
        assert lists_of(short[name], 4) == lists_of(truncate(whole[name], 2, side=side), 4)


def test_what_is_cut_off_is_not_looked_at(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": [[1.0, math.nan], [2.0, None]]}))
    rows = all_rows(reader(path, [varlen("x", torch.float32, truncate=1)], 1))
    assert [row["x"] for row in rows] == [[1.0], [2.0]]
    with pytest.raises(ValueError, match="row 1: got a null element"):
        list(reader(path, [varlen("x", torch.float32, truncate=1, side="left")], 1))


def test_rows_are_named_as_in_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": [[1.0, 2.0, 3.0], [4.0, 5.0], [6.0, math.nan]]}))
    with pytest.raises(ValueError, match="row 2: got nan"):
        list(reader(path, [varlen("x", torch.float32, truncate=2)], 1))


def test_lists_of_csv_and_of_views(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1|2|3\n\n4\n")
    rows = all_rows(
        reader(tmp_path / "a.csv", [varlen("x", torch.int64, truncate=2)], 1, format=Csv(list_separator="|"))
    )
    assert [row["x"] for row in rows] == [[1, 2], [4]]
    views = pa.list_(pa.struct([("k", pa.string_view()), ("v", pa.float32())]))
    table = pa.table({"x": pa.array([[{"k": "a", "v": 1.0}, {"k": "bc", "v": 2.0}]], views)})
    path = write(tmp_path / "a.arrow", table)
    assert all_rows(reader(path, [hashed("x", farm_hashes, weighted=True, truncate=1)], 1)) == [
        {"x": [(int(farm_hashes([torch.tensor([97], dtype=torch.uint8)], [torch.tensor([0, 1]).int()])[0]), 1.0)]}
    ]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"truncate": -1}, ValueError, "column 'x', truncate: got -1, expected at least 0"),
        ({"truncate": 2.0}, TypeError, "column 'x', truncate: got 2.0, expected an int"),
        ({"truncate": 2, "side": "front"}, ValueError, "column 'x', side: got 'front', expected one of"),
    ],
)
def test_declarations_that_cannot_be(options, error, match):
    for make in (lambda: varlen("x", torch.int64, **options), lambda: hashed("x", farm_hashes, **options)):
        with pytest.raises(error, match=match):
            make()
