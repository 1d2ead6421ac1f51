"""Types that the caller gives to columns of CSV: what is kept exactly, and what is a bad row."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from recfx.data import Csv, fixedlen, hashed, reader, varlen
from recfx.data.convert import convert
from recfx.data.describe import describe
from recfx.data.files import match_files
from recfx.data.text.csv import OpenCsv
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import all_rows

IDS = [varlen("x", torch.int64, null="empty")]
BLOCKS = pytest.mark.parametrize("block_bytes", [20, 1000])


def file_of(folder: Path, cells: list[str] | list[bytes], name: str = "x") -> Path:
    lines = [cell if isinstance(cell, bytes) else cell.encode() for cell in cells]
    path = folder / "a.csv"
    path.write_bytes(b"\n".join([f"{name},y".encode(), *(line + b",0" for line in lines)]))
    return path


def column(path: Path, kind: pa.DataType, **how) -> tuple[list, list[tuple[int, str]]]:
    """Values of the column, and the bad rows with their cells, as the source has them."""
    (file,) = match_files(path)
    source = OpenCsv(file, Csv(**how), {"x": kind})
    units = [source.read(unit, ["x"]) for unit in range(source.num_units)]
    values = [value for rows in units for value in rows.batch.column("x").to_pylist()]
    return values, [(row.number, row.got) for rows in units for row in rows.bad]


@BLOCKS
def test_ids_of_64_bits_keep_them(tmp_path, block_bytes):
    cells = ["1000009418151094273", "10000169349117863715", "18446744073709551615", "-9223372036854775808", ""]
    batches = reader(file_of(tmp_path, cells), IDS, 5, format=Csv(block_bytes=block_bytes))
    values = [int(cell) - 2**64 * (int(cell) >= 2**63) for cell in cells[:-1]]
    assert all_rows(batches) == [*({"x": [value]} for value in values), {"x": []}]


@pytest.mark.parametrize("wrong", ["18446744073709551616", "-9223372036854775809", "1e3", "1.5", "x", "12.0.0", "+5"])
@BLOCKS
def test_what_is_not_an_id_is_a_bad_row(tmp_path, wrong, block_bytes):
    path = file_of(tmp_path, ["18446744073709551615", "007", wrong, "-12.00", " 8"])
    how = Csv(block_bytes=block_bytes)
    with pytest.raises(ValueError, match=rf"column 'x' of '{path}', row 2: got '{re.escape(wrong)}', expected int64"):
        list(reader(path, IDS, 1, format=how))
    it = iter(reader(path, IDS, 1, format=how, on_bad="skip"))
    assert [row["x"] for row in all_rows(it)] == [[-1], [7], [-12], [8]]
    assert it.num_bad == 1


def test_no_two_ids_of_a_block_become_one(tmp_path):
    path = file_of(tmp_path, ["-1", "18446744073709551614", "18446744073709551615", "-9223372036854775808", "3"])
    with pytest.raises(ValueError, match="row 2: got '18446744073709551615', expected int64, in which a number below"):
        list(reader(path, IDS, 1))
    it = iter(reader(path, IDS, 1, on_bad="skip"))
    assert [row["x"] for row in all_rows(it)] == [[-1], [-2], [-(2**63)], [3]]
    assert it.num_bad == 1


def test_ids_that_pandas_wrote_as_floats_are_exact(tmp_path):
    cells = ["123456789.0", "", "9007199254740993.0", "18446744073709551615.0", "-3.000"]
    assert all_rows(reader(file_of(tmp_path, cells), IDS, 5)) == [
        {"x": [123456789]}, {"x": []}, {"x": [9007199254740993]}, {"x": [-1]}, {"x": [-3]},
    ]  # fmt: skip


@pytest.mark.parametrize("slow", ["18446744073709551615", "5.0"])
def test_a_cell_is_the_same_number_whatever_is_in_its_block(tmp_path, slow):
    """Blocks that pyarrow's parser takes are read by it, others by casts."""
    cells = ["7", "-0", "007", " 8", "8 ", "0x1F", "\t9"]
    alone, _ = column(file_of(tmp_path, cells), pa.int64())
    with_slow, _ = column(file_of(tmp_path, [*cells, slow]), pa.int64())
    assert alone == with_slow[:-1] == [7, 0, 7, 8, 8, 31, 9]


@pytest.mark.parametrize("slow", ["9007199254740992", "x"])
def test_a_cell_is_the_same_double_whatever_is_in_its_block(tmp_path, slow):
    cells = ["1.5", "-0", "007.25", " 8", "1e-05", "nan", "-inf", ".5", ""]
    alone, _ = column(file_of(tmp_path, cells), pa.float64())
    with_slow, _ = column(file_of(tmp_path, [*cells, slow]), pa.float64())
    assert (
        str(alone)
        == str(with_slow[: len(cells)])
        == str([1.5, -0.0, 7.25, 8.0, 1e-05, float("nan"), -float("inf"), 0.5, None])
    )


@BLOCKS
@pytest.mark.parametrize("wrong", ["9007199254740993", "9007199254740993.0", "-36893488147419103233", "1" * 5000])
def test_whole_numbers_that_float64_would_round_are_bad_rows(tmp_path, wrong, block_bytes):
    path = file_of(
        tmp_path, ["0.5", "9007199254740992", wrong, "1e300", "36893488147419103232", "12345678901234567.25"]
    )
    values, bad = column(path, pa.float64(), block_bytes=block_bytes)
    assert values == [0.5, 2.0**53, 1e300, 2.0**65, 12345678901234567.25]
    assert [cell for _, cell in bad] == [repr(wrong)]


def test_fixedlen_says_which_number_float64_would_round(tmp_path):
    path = file_of(tmp_path, ["1", "9007199254740993"])
    with pytest.raises(ValueError, match=r"column 'x' of '.*a.csv', row 1: got '9007199254740993', expected double"):
        list(reader(path, [fixedlen("x", [0.0])], 1))


LATIN = "Misérables".encode("latin-1")


@pytest.mark.parametrize("block_bytes", [1, 1000])
def test_text_that_is_not_utf8_is_read_as_its_bytes(tmp_path, block_bytes):
    path = file_of(tmp_path, [LATIN, b"", b'"a,\xff"', "é".encode()])
    columns = [varlen("x", torch.uint8, null="empty")]
    it = iter(reader(path, columns, 2, on_bad="skip", format=Csv(block_bytes=block_bytes)))
    assert [row["x"] for row in all_rows(it)] == [[LATIN], [], [b"a,\xff"], ["é".encode()]]
    assert it.num_bad == 0


def test_hashes_are_those_of_the_bytes(tmp_path):
    (batch,) = reader(file_of(tmp_path, [LATIN, "abc"]), [hashed("x", farm_hashes)], 2)
    (expected,) = farm_hashes(
        [torch.tensor([*LATIN, *b"abc"], dtype=torch.uint8)], [torch.tensor([0, 10, 13], dtype=torch.int32)]
    )
    assert batch["x"].values[:2].tolist() == expected.tolist()


def test_other_columns_need_not_be_utf8(tmp_path):
    path = file_of(tmp_path, [LATIN, b"b"], "first")
    assert [row["y"] for row in all_rows(reader(path, [varlen("y", torch.int64)], 2))] == [[0], [0]]
    assert [row["y"] for row in all_rows(reader(path, [varlen("y", torch.int64)], 2, filter=[("y", "<", 1)]))] == [
        [0],
        [0],
    ]


def test_a_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = file_of(tmp_path, ["a", LATIN])
    with pytest.raises(ValueError, match=r"column 'x' of '.*a.csv', row 1: got b'Mis\\xe9rables', expected a str"):
        convert(path, tmp_path / "out", types={"x": pa.string()})


def test_a_header_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("prénom,x\na,1\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"file '.*a.csv': got .*header that is not UTF-8.* column_names= .* skip_lines=1"
    ):
        list(reader(path, IDS, 1, on_bad="skip"))
    how = Csv(column_names=("name", "x"), skip_lines=1)
    assert all_rows(reader(path, IDS, 1, format=how)) == [{"x": [1]}]


def test_one_column_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y,x\n1,2,3\n")
    with pytest.raises(ValueError, match=r"file '.*a.csv': got \"2 columns of the name 'x'\""):
        describe(match_files(path))
    assert all_rows(reader(path, [varlen("y", torch.int64)], 1)) == [{"y": [2]}]


@pytest.mark.parametrize("filter", [[("x", "==", "é")], [("x", "in", ["é", "b"])], [("x", ">", "z")]])
def test_a_filter_on_a_column_that_is_read_as_bytes(tmp_path, filter):
    path = file_of(tmp_path, [LATIN, "é".encode(), b"a"])
    assert [row["x"] for row in all_rows(reader(path, [varlen("x", torch.uint8)], 1, filter=filter))] == [
        ["é".encode()]
    ]
