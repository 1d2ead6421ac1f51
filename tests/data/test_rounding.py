"""Whole numbers as float32: as they are, or an error that names the rounded number."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfx.data import Csv, fixedlen, hashed, reader, varlen
from recfx.data.exact_numbers import rounded, to_float
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import all_rows, write

KINDS = {
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "int32": pa.int32(),
    "double": pa.float64(),
    "decimal": pa.decimal128(20, 0),
    "cents": pa.decimal128(20, 2),
    "wide": pa.decimal256(60, 3),
}
COLUMNS = {
    "fixedlen": lambda **options: fixedlen("x", [0.0], **options),
    "varlen": lambda **options: varlen("x", torch.float32, **options),
}


def file_of(folder: Path, kind: str, values: list[int], extension: str) -> str:
    name = f"{kind}.{extension}"
    if kind == "csv":
        (folder / name).write_text("x\n" + "".join(f"{value}\n" for value in values))
        return str(folder / name)
    items = [Decimal(value) for value in values] if pa.types.is_decimal(KINDS[kind]) else values
    return write(folder / name, pa.table({"x": pa.array(items, KINDS[kind])}))


FILES = [
    *((kind, "parquet") for kind in KINDS),
    *((kind, "arrow") for kind in KINDS),
    *((kind, "orc") for kind in KINDS if kind not in ("uint64", "wide")),
    ("csv", "csv"),
]


@pytest.mark.parametrize("make", COLUMNS)
@pytest.mark.parametrize(("kind", "extension"), FILES)
def test_one_rule_for_every_type_and_format(tmp_path, make, kind, extension):
    """2**25 is a float32, so it is read; 978300760 is not, wherever it is kept."""
    exact, other = [2**24, 2**25, 3 << 28], 978300760
    path = file_of(tmp_path, kind, [*exact, other], extension)
    with pytest.raises(
        ValueError,
        match=rf"column 'x' of '{path}', row 3: got 978300760[.0]*, which float32 would round to 978300736, expected a "
        "whole number that float32 holds, or rounding='allow' for the column.",
    ):
        list(reader(path, [COLUMNS[make]()], 1))
    it = iter(reader(path, [COLUMNS[make]()], 1, on_bad="skip"))
    assert ([row["x"][0] for row in all_rows(it)], it.num_bad) == (exact, 1)
    rows = all_rows(reader(path, [COLUMNS[make](rounding="allow")], 1))
    assert [row["x"][0] for row in rows] == [*exact, 978300736]


@pytest.mark.parametrize("limit", ["9223372036854775807", "18446744073709551615", "9007199254740993"])
def test_text_that_a_double_has_rounded_already(tmp_path, limit):
    """The double nearest to it is a float32; the text's number is not."""
    (tmp_path / "a.csv").write_text(f"x,y\n1,1\n{limit},2\n")
    columns = [fixedlen("x", [0.0]), fixedlen("y", [0.0])]
    with pytest.raises(
        ValueError, match=rf"column 'x' of '.*a.csv', row 1: got '{limit}', expected double that holds this"
    ):
        list(reader(tmp_path / "a.csv", columns, 1))
    rows = all_rows(reader(tmp_path / "a.csv", [fixedlen("x", [0.0], rounding="allow")], 1))
    assert rows[1]["x"] == [float(np.float32(float(limit)))]


def test_lists_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1|2.5\n3|16777217\n")
    how = Csv(list_separator="|")
    with pytest.raises(ValueError, match=r"column 'x' of '.*a.csv', row 1: got 16777217.0, which float32 would"):
        list(reader(tmp_path / "a.csv", [varlen("x", torch.float32)], 1, format=how))


def test_fractions_round_as_ever(tmp_path):
    values = [0.1, 16777216.5, 1e10 + 0.5, -123456789.25]
    path = write(tmp_path / "a.parquet", pa.table({"x": values, "d": [Decimal(repr(value)) for value in values]}))
    rows = all_rows(reader(path, [fixedlen("x", [0.0]), varlen("d", torch.float32)], 4))
    expected = [float(np.float32(value)) for value in values]
    assert [row["x"][0] for row in rows] == expected
    assert [row["d"][0] for row in rows] == expected


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.decimal128(12, 1)])
@pytest.mark.parametrize("key", [pa.int64(), pa.string()])
def test_weights(tmp_path, kind, key):
    pairs = pa.list_(pa.struct([("k", key), ("v", kind)]))
    number = Decimal if pa.types.is_decimal(kind) else int
    rows = [[{"k": 7 if key == pa.int64() else "a", "v": number(v)}] for v in (2**25, 2**24 + 1)]
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array(rows, pairs)}))

    def column(**options):
        if key == pa.int64():
            return varlen("x", torch.int64, weighted=True, **options)
        return hashed("x", farm_hashes, weighted=True, **options)

    with pytest.raises(
        ValueError, match=r"column 'x' of .*, row 1: got 16777217[.0]*, which float32 would round to 167"
    ):
        list(reader(path, [column()], 1))
    rows = all_rows(reader(path, [column(rounding="allow")], 1))
    assert [weight for row in rows for _, weight in row["x"]] == [2**25, 2**24]


def test_weights_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text("x\n7:9007199254740993|8\n9:0.5\n")
    how = Csv(list_separator="|", weight_separator=":")
    columns = (varlen("x", torch.int64, weighted=True), hashed("x", farm_hashes, weighted=True))
    for column in columns:
        with pytest.raises(ValueError, match=r"column 'x' of .*, row 0: got '7:9007199254740993', expected list"):
            list(reader(tmp_path, [column], 1, format=how))
        allowed = dataclasses.replace(column, rounding="allow")
        rows = all_rows(reader(tmp_path, [allowed], 1, format=how))
        assert [weight for row in rows for _, weight in row["x"]] == [2**53, 1, 0.5]


def test_beyond_float32(tmp_path):
    """`finite` rejects it; where anything is valid it is a whole number that becomes infinite."""
    path = write(tmp_path / "a.parquet", pa.table({"x": [1.0, 1e39]}))
    for rounding in ("error", "allow"):
        with pytest.raises(ValueError, match=r"row 1: got 1e.39, which is inf in float32, expected a finite number"):
            list(reader(path, [varlen("x", torch.float32, rounding=rounding)], 1))
    with pytest.raises(ValueError, match=r"row 1: got 1e\+39, which float32 would round to inf, expected a whole"):
        list(reader(path, [varlen("x", torch.float32, valid=None)], 1))
    rows = all_rows(reader(path, [varlen("x", torch.float32, valid=None, rounding="allow")], 1))
    assert rows == [{"x": [1.0]}, {"x": [float("inf")]}]


def test_infinities_and_nan_are_not_rounded(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": [float("inf"), float("nan"), -float("inf")]}))
    rows = all_rows(reader(path, [varlen("x", torch.float32, valid=None)], 3))
    assert str([row["x"][0] for row in rows]) == "[inf, nan, -inf]"


def test_nan_hides_nothing(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": [float("nan"), 16777217.0]}))
    with pytest.raises(ValueError, match=r"row 1: got 16777217.0, which float32 would round to 16777216"):
        list(reader(path, [varlen("x", torch.float32, valid=None)], 1))


WHOLE = st.integers(-(2**63), 2**64 - 1) | st.builds(
    lambda n, k: n << k, st.integers(-(2**26), 2**26), st.integers(0, 37)
)


def test_defaults(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array([None, 1.0])}))
    column = fixedlen("x", [2**24 + 1], null="empty", rounding="allow")
    assert all_rows(reader(path, [column], 1)) == [{"x": [2**24]}, {"x": [1.0]}]
    assert fixedlen("x", [0.1, float("nan"), -float("inf"), 2**25]).default[0] == 0.1


@given(st.lists(WHOLE, min_size=1, max_size=5))
def test_the_rule_is_float32_of_x_is_x(values):
    is_exact = [int(np.float32(value)) == value for value in values]  # float32 -> int is exact
    kind = pa.int64() if max(values) < 2**63 else pa.uint64()
    arrays = [pa.array([Decimal(value) for value in values], pa.decimal128(20, 0))]
    if min(values) >= 0 or kind == pa.int64():
        arrays.append(pa.array(values, kind))
    doubles = [float(value) for value in values]
    for array in arrays:
        wrong = rounded(array, to_float(array, pa.float32()))
        assert (wrong.places.tolist() if wrong else []) == [i for i, exact in enumerate(is_exact) if not exact]
    array = pa.array(doubles)
    wrong = rounded(array, to_float(array, pa.float32()))
    assert (wrong.places.tolist() if wrong else []) == [i for i, x in enumerate(doubles) if float(np.float32(x)) != x]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: fixedlen("x", [0.0], rounding=True), "column 'x', rounding: got True, expected one of"),
        (lambda: varlen("x", torch.int64, rounding="allow"), "column 'x': got rounding='allow', expected 'error'"),
        (
            lambda: fixedlen("x", [0, 2**24 + 1]),
            "column 'x': got default 16777217, which float32 would round to 16777216",
        ),
        (lambda: fixedlen("x", [2**53 + 1]), "column 'x': got default 9007199254740993, which float32 would round to"),
        (lambda: fixedlen("x", [1e39]), "column 'x': got default 1e.39, which float32 would round to inf, expected"),
        (lambda: varlen("x", torch.float32, rounding="up"), "column 'x', rounding: got 'up', expected one of"),
    ],
)
def test_declarations_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()
