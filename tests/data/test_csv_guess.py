"""The guessed types of CSV columns: a guess never merges two cells, and holds to the end of the file."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from recfx.data import Csv, reader, varlen
from recfx.data.convert import convert
from recfx.data.text import csv
from recfx.data.text.csv_cells import guess, read_cells
from tests.data.rows import all_rows

NO_NULLS = pa.array([], pa.binary())


def guessed(cells: list[str | None], **how) -> tuple[pa.DataType, list]:
    array = pa.array([None if cell is None else cell.encode("latin-1") for cell in cells], pa.binary())
    found = guess(array, NO_NULLS, **{"separator": None, "weight_separator": None, "is_named": (False, False), **how})
    values, wrong = read_cells(array, found, NO_NULLS)
    assert wrong == {}
    return found.type, values.to_pylist()


EXACT = {
    "int64": (["0", "-7", "9223372036854775807", "-9223372036854775808", None], pa.int64()),
    "uint64": (["0", "9223372036854775808", "18446744073709551615"], pa.uint64()),
    "double": (["0.5", "-12", "1e-05", "9007199254740992", "1.5e+20", "nan", "-inf", "-0", ".5"], pa.float64()),
    "bool": (["true", "false", None], pa.bool_()),
    "Bool": (["True", "False"], pa.bool_()),
    "date": (["2026-11-30", "1999-01-02"], pa.date32()),
    "time": (["2026-11-30 10:00:00", "1999-01-02 00:00:01"], pa.timestamp("s")),
    "T": (["2026-11-30T10:00", "1999-01-02T00:00"], pa.timestamp("s")),
    "fraction": (["2026-11-30 10:00:00.125", "1999-01-02 00:00:01.000"], pa.timestamp("ns")),
    "zone": (["2026-11-30T10:00:00Z", "1999-01-02T00:00:00Z"], pa.timestamp("s", "UTC")),
    "null": ([None, None], pa.null()),
    "binary": (["a", "\xe9"], pa.binary()),
}


@pytest.mark.parametrize("name", EXACT)
def test_types_that_keep_every_cell(name):
    cells, expected = EXACT[name]
    kind, values = guessed(cells)
    assert kind == expected
    assert [value is None for value in values] == [cell is None for cell in cells]


def test_values_of_guessed_types():
    assert guessed(["0.5", "-12", "1e-05", "1.5E3"])[1] == [0.5, -12.0, 1e-05, 1500.0]
    assert guessed(["True", "False"])[1] == [True, False]
    assert guessed(["2026-11-30"])[1] == [date(2026, 11, 30)]
    assert guessed(["2026-11-30T10:00:00"])[1] == [datetime(2026, 11, 30, 10)]
    assert guessed(["18446744073709551615", "3"])[1] == [18446744073709551615, 3]


TEXT = [
    ["05012345", "5012345"],
    ["1234e001", "12340"],
    ["1e5", "0.5"],
    ["0x1F", "31"],
    ["0xFFFFFFFF", "4294967295"],
    ["18446744073709551616", "1"],
    ["18446744073709551615", "-1"],
    ["9007199254740993", "0.5"],
    ["9007199254740993.0", "0.5"],
    ["01.5", "1.5"],
    ["nan", "1"],
    ["+5", "5"],
    [" 5", "5"],
    ["true", "True"],
    ["0", "true"],
    ["2026-11-30 10:00:00", "2026-11-30T10:00:00"],
    ["2026-11-30", "2026-11-30 00:00:00"],
    ["2026-11-30 10:00:00+01:00", "2026-11-30 09:00:00+00:00"],
    ["10:00", "10:00:00"],
    ["--", "5"],
    [""],
]


@pytest.mark.parametrize("cells", TEXT)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_cells_that_a_type_would_merge_are_text(cells, is_reversed):
    cells = cells[::-1] if is_reversed else cells
    assert guessed(cells) == (pa.string(), cells)


DIGITS = st.text("0123456789-+.eExX :T", min_size=1, max_size=6)
WORDS = st.one_of(DIGITS, st.integers(-(2**65), 2**65).map(str), st.sampled_from(["true", "True", "nan", "2026-11-30"]))


@given(st.lists(WORDS, min_size=1, max_size=8, unique=True))
@settings(max_examples=400, deadline=None)
def test_cells_that_differ_stay_different(cells):
    kind, values = guessed(cells)
    if kind != pa.float64():  # numbers with a point may have several spellings
        merged = {"0", "-0"} <= set(cells)
        assert len(set(values)) == len(cells) - (merged and pa.types.is_integer(kind))
    else:
        whole = [int(cell) for cell in cells if cell.lstrip("-").isdigit()]
        assert [int(value) for value, cell in zip(values, cells, strict=True) if cell.lstrip("-").isdigit()] == whole


LATER = {
    "0501": ("7", "int64"),
    "99999999999999999999": ("7", "int64"),
    "9223372036854775808": ("7", "int64"),
    "x": ("7", "int64"),
    "7.0": ("7", "int64"),
    "-1": ("18446744073709551615", "uint64"),
    "00.5": ("0.5", "double"),
    "9007199254740993": ("0.5", "double"),
    "TRUE": ("true", "bool"),
    "2026-11-30T10:00:00": ("2026-11-30 10:00:00", r"timestamp\[s\]"),
    "a": ("", "null"),
}


def file_of(folder: Path, first: str, later: str) -> Path:
    cells = [first] * 50 + [later, first]
    path = folder / "a.csv"
    path.write_bytes("\n".join(["x,y", *(f"{cell},1" for cell in cells)]).encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("block_bytes", [30, 10_000])
def test_a_later_cell_that_is_something_else_is_named(tmp_path, monkeypatch, later, block_bytes):
    monkeypatch.setattr(csv, "CHUNK_BYTES", 60)
    first, kind = LATER[later]
    path = file_of(tmp_path, first, later)
    expected = rf"column 'x' of '.*a.csv', row 50: got .*, expected {kind}, guessed from .*types= of convert, --types"
    with pytest.raises(ValueError, match=expected):
        convert(path, tmp_path / "out", format=Csv(block_bytes=block_bytes))
    assert not list((tmp_path / "out").iterdir())


def test_a_guess_in_a_reader(tmp_path, monkeypatch):
    """Of columns that only a filter looks at."""
    monkeypatch.setattr(csv, "CHUNK_BYTES", 60)
    path, columns = file_of(tmp_path, "7", "007"), [varlen("y", torch.int64)]
    with pytest.raises(ValueError, match=r"column 'x' of '.*a.csv', row 50: got '007', expected int64, guessed from"):
        list(reader(path, columns, 10, filter=[("x", "==", 7)]))
    it = iter(reader(path, columns, 3, filter=[("x", "==", 7)], on_bad="skip"))
    assert (len(all_rows(it)), it.num_bad) == (51, 1)


def test_converted_ids_of_64_bits(tmp_path):
    ids = [1000009418151094273, 10000169349117863715, 10000169349117863716, 18446744073709551615]
    (tmp_path / "a.csv").write_text("".join(f"{x}\n" for x in ["id", *ids]))
    (path,) = convert(tmp_path / "a.csv", tmp_path / "out")
    assert [x % 2**64 for x in pq.read_table(path)["id"].to_pylist()] == ids


def test_lists_and_weights_are_guessed_by_their_items():
    plain = {"separator": "|", "weight_separator": ":"}
    assert guessed(["1|2", "3"], **plain) == (pa.list_(pa.int64()), [[1, 2], [3]])
    assert guessed(["01|2", None], **plain) == (pa.list_(pa.string()), [["01", "2"], []])
    assert guessed(["1", "2"], **plain) == (pa.int64(), [1, 2])
    assert guessed(["1", "2"], **plain, is_named=(True, False)) == (pa.list_(pa.int64()), [[1], [2]])
    weighted = [[{"k": 1, "v": 0.5}, {"k": 2, "v": 3.0}]]
    assert guessed(["1:0.5|2:3"], **plain)[1] == weighted
    assert guessed(["1:0.5|2"], **plain) == (pa.list_(pa.string()), [["1:0.5", "2"]])
    assert guessed(["1:0.5|2"], **plain, is_named=(True, True))[1] == [[{"k": 1, "v": 0.5}, {"k": 2, "v": 1.0}]]
    assert guessed(["a:b|c:d"], **plain) == (pa.list_(pa.string()), [["a:b", "c:d"]])
