"""Ids in doubles and decimals: read where each is whole and exact, else an error that names it."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
import torch

from recfx.data import reader, varlen
from tests.data.rows import FORMATS, all_rows, write

IDS = [0, -1, 123456789, 123456790, 2**53 - 1]


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("kind", [pa.float64(), pa.decimal128(18, 0), pa.decimal128(20, 2)])
def test_whole_numbers_with_nulls(tmp_path, extension, kind):
    """What pandas makes of a column of ids of which some are missing."""
    values = [*(Decimal(i) if pa.types.is_decimal(kind) else i for i in IDS), None]
    lists = [values[:-1], None, [], values[:1], None, []]
    table = pa.table({"x": pa.array(values, kind), "lists": pa.array(lists, pa.list_(kind))})
    path = write(tmp_path / f"a.{extension}", table)
    columns = [varlen(name, torch.int64, null="empty") for name in ("x", "lists")]
    rows = all_rows(reader(path, columns, 6))
    assert [row["x"] for row in rows] == [*([i] for i in IDS), []]
    assert [row["lists"] for row in rows] == [IDS, [], [], IDS[:1], [], []]


@pytest.mark.parametrize(
    ("values", "got", "expected"),
    [
        (pa.array([1.0, 0.5]), "0.5", "a whole number"),
        (pa.array([1.0, float("nan")]), "nan", "a whole number, or null where there is none"),
        (pa.array([1.0, -float("inf")]), "-inf", "a whole number"),
        (
            pa.array([1.0, 2.0**53]),
            "9007199254740992.0, which may have been rounded",
            "a whole number below .*53 of a d",
        ),
        (pa.array([1.0, 1e300]), "1e.300, which may have been rounded", "a whole number below"),
        (
            pa.array([1.0, 2.0**24], pa.float32()),
            "16777216.0, which may have been rounded",
            "a whole .*24 of a float32",
        ),
        (pa.array([Decimal("1.00"), Decimal("1.25")]), "1.25", "a whole number of 64 bits"),
        (pa.array([Decimal(1), Decimal(2**64)]), "18446744073709551616", "a whole number of 64 bits"),
        (pa.array([Decimal(1), Decimal(-(2**63) - 1)]), "-9223372036854775809", "a whole number of 64 bits"),
    ],
)
def test_other_numbers_are_bad_rows(tmp_path, values, got, expected):
    path = write(tmp_path / "a.parquet", pa.table({"x": values}))
    with pytest.raises(ValueError, match=f"column 'x' of '{path}', row 1: got {got}, expected {expected}"):
        list(reader(path, [varlen("x", torch.int64)], 1))
    it = iter(reader(path, [varlen("x", torch.int64)], 1, on_bad="skip"))
    assert (all_rows(it), it.num_bad) == ([{"x": [1]}], 1)


def test_decimals_of_64_bits(tmp_path):
    """As uint64 they keep their bits."""
    values = [2**63 - 1, -(2**63), 2**63, 2**64 - 1]
    kinds = [pa.decimal128(20, 0), pa.decimal256(40, 5), pa.decimal128(38, 0)]
    table = pa.table({f"{i}": pa.array([Decimal(value) for value in values], kind) for i, kind in enumerate(kinds)})
    path = write(tmp_path / "a.parquet", table)
    rows = all_rows(reader(path, [varlen(name, torch.int64) for name in table.column_names], 4))
    expected = np.array([value % 2**64 for value in values], np.uint64).view(np.int64).tolist()
    for name in table.column_names:
        assert [row[name][0] for row in rows] == expected


def test_ids_with_weights(tmp_path):
    kind = pa.list_(pa.struct([("k", pa.float64()), ("v", pa.float32())]))
    rows = [[{"k": 2.0**40 + 1, "v": 0.5}], [{"k": 0.5, "v": 1.0}]]
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array(rows, kind)}))
    it = iter(reader(path, [varlen("x", torch.int64, weighted=True)], 1, on_bad="skip"))
    assert (all_rows(it), it.num_bad) == ([{"x": [(2**40 + 1, 0.5)]}], 1)


def test_small_decimals_and_float16(tmp_path):
    table = pa.table(
        {
            "x": pa.array([Decimal("12")], pa.decimal32(5, 0)),
            "y": pa.array([Decimal("12.00")], pa.decimal64(12, 2)),
            "z": pa.array([np.float16(2047)]),
        }
    )
    path = write(tmp_path / "a.arrow", table)
    assert all_rows(reader(path, [varlen(name, torch.int64) for name in "xyz"], 1)) == [
        {"x": [12], "y": [12], "z": [2047]}
    ]
    assert all_rows(reader(path, [varlen(name, torch.float32) for name in "xyz"], 1)) == [
        {"x": [12], "y": [12], "z": [2047]}
    ]
