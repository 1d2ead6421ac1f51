"""Rows of one user fall in one part, whatever type, file, format or run holds the user's key."""

from __future__ import annotations

import itertools
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recfx.data import Csv, Split, fixedlen, hashed, reader, varlen
from recfx.data.exact_numbers import spelled
from recfx.data.files import match_files
from recfx.data.text.csv import OpenCsv
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import FORMATS, all_rows, write

USERS = range(100, 200)
SPELLINGS = {
    "int64": lambda u: pa.array(u, pa.int64()),
    "uint16": lambda u: pa.array(u, pa.uint16()),
    "uint64": lambda u: pa.array(u, pa.uint64()),
    "double": lambda u: pa.array(u, pa.float64()),
    "float32": lambda u: pa.array(u, pa.float32()),
    "decimal": lambda u: pa.array([Decimal(i) for i in u], pa.decimal128(20, 0)),
    "cents": lambda u: pa.array([Decimal(i) for i in u], pa.decimal128(20, 2)),
    "string": lambda u: pa.array([f"{i}" for i in u]),
    "large_string": lambda u: pa.array([f"{i}" for i in u], pa.large_string()),
    "binary": lambda u: pa.array([b"%d" % i for i in u]),
    "fixed binary": lambda u: pa.array([b"%06d" % i for i in u], pa.binary(6)),
    "zeros": lambda u: pa.array([f"{i:08}" for i in u]),
    "sign": lambda u: pa.array([f"+{i}" for i in u]),
    "blanks": lambda u: pa.array([f"  {i}\t" for i in u]),
    "point": lambda u: pa.array([f"{i}.0" for i in u]),
    "dictionary": lambda u: pa.array([f"{i}" for i in u]).dictionary_encode(),
    "dictionary of numbers": lambda u: pa.array(u, pa.int32()).dictionary_encode(),
    "lists": lambda u: pa.array([[i, 7] for i in u]),
    "lists of strings": lambda u: pa.array([[f"{i}", "a"] for i in u]),
}  # fmt: skip


def validation(keys: pa.Array, seed: int = 0) -> np.ndarray:
    return Split(part="validation", fraction=0.3, key="user", seed=seed).rows(keys)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("seed", [0, 5])
def test_any_two_types_agree(spelling, seed):
    expected = validation(SPELLINGS["int64"](USERS), seed)
    assert 10 < expected.sum() < 50
    assert validation(SPELLINGS[spelling](USERS), seed).tolist() == expected.tolist()


def users_of(path: Path | str, part: str, *more) -> set[int]:
    columns = [fixedlen("idx", [0.0]), *more]
    split = Split(part=part, fraction=0.3, key="user")
    return {int(row["idx"][0]) for row in all_rows(reader(path, columns, 7, drop_remainder=False, split=split))}


@pytest.mark.parametrize(
    "spelling", ["int64", "uint64", "double", "decimal", "zeros", "dictionary", "lists of strings"]
)
@pytest.mark.parametrize("extension", FORMATS)
def test_any_two_formats_agree(tmp_path, spelling, extension):
    keys = SPELLINGS[spelling](USERS)
    if extension == "orc" and pa.types.is_dictionary(keys.type):
        keys = keys.dictionary_decode()
    if extension == "orc" and spelling == "uint64":
        keys = keys.cast(pa.int64())
    path = write(tmp_path / f"a.{extension}", pa.table({"user": keys, "idx": list(USERS)}), 30)
    expected = set(np.array(USERS)[validation(SPELLINGS["int64"](USERS))].tolist())
    assert users_of(path, "validation") == expected
    assert users_of(path, "train") == set(USERS) - expected


RUNS = {
    "no column": [],
    "int64": [varlen("user", torch.int64, null="empty")],
    "float32": [varlen("user", torch.float32, null="empty")],
    "bytes": [varlen("user", torch.uint8, null="empty")],
    "hashed": [hashed("user", farm_hashes, null="empty")],
}


@pytest.mark.parametrize("more", RUNS)
def test_csv_whatever_the_first_rows_look_like_and_a_run_asks_for(tmp_path, more):
    rows = "".join(f"{user},{user}\n" for user in USERS)
    (tmp_path / "a.csv").write_text("user,idx\n" + rows)
    (tmp_path / "b.csv").write_text("user,idx\n" + rows.replace(",1", ".0,1"))
    (tmp_path / "c.csv").write_text("user,idx\n,0\n" + "".join(f'"0{user}",{user}\n' for user in USERS))
    if more in ("no column", "bytes", "hashed"):
        (tmp_path / "d.csv").write_text("user,idx\nguest,0\n" + rows)
    if more == "int64":
        (tmp_path / "b.csv").unlink()
    train, held_out = (users_of(tmp_path, part, *RUNS[more]) - {0} for part in ("train", "validation"))
    assert held_out == set(np.array(USERS)[validation(SPELLINGS["int64"](USERS))].tolist())
    assert train == set(USERS) - held_out


@pytest.mark.parametrize("spelling", ["1e+05", "1.5e3", " 0x1F", "0xffffffffffffffff", "2000e-3"])
def test_a_key_of_csv_that_a_run_reads_as_a_number(tmp_path, spelling):
    """It falls in the part in which it is for a run that does not read it."""
    (tmp_path / "a.csv").write_text(f"user,idx\n{spelling},1\n")
    (file,) = match_files(tmp_path)
    kinds = (pa.binary(), pa.int64() if "x" in spelling else pa.float64())
    text, number = (OpenCsv(file, Csv(), {"user": kind}).read(0, ["user"]).batch.column("user") for kind in kinds)
    for seed in range(16):
        assert validation(text, seed).tolist() == validation(number, seed).tolist()


def test_files_of_all_types_at_once(tmp_path):
    for i, keys in enumerate(SPELLINGS.values()):
        write(tmp_path / f"{i}.arrow", pa.table({"user": keys(USERS), "idx": list(USERS)}))
    train, held_out = (users_of(tmp_path, part) for part in ("train", "validation"))
    assert train | held_out == set(USERS)
    assert not train & held_out


GOLDEN_NUMBERS = [0, 1, 2, 5, 10, 13, 14, 15, 16, 17, 18, 26, 27, 29, 32, 34, 36]
GOLDEN_WORDS = [0, 9, 11, 15, 19, 21, 27, 30, 33, 34, 37, 38]
NUMBERS = [0, 1, -1, 2**31, 2**53 - 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]


def bits_of(keys: pa.Array) -> list[bool]:
    """So many splits that equal rows are of equal keys."""
    return np.array([validation(keys, seed) for seed in range(64)]).T.tolist()


def test_numbers_modulo_2_to_the_64():
    bits = bits_of(pa.array([n % 2**64 for n in NUMBERS], pa.uint64()))
    assert bits_of(pa.array([(n + 2**63) % 2**64 - 2**63 for n in NUMBERS], pa.int64())) == bits
    assert bits_of(pa.array([f"{n}" for n in NUMBERS])) == bits
    assert bits_of(pa.array([f"{n + 2**70:030}" if n >= 0 else f" {n}.000 " for n in NUMBERS])) == bits
    assert bits_of(pa.array([Decimal(n) for n in NUMBERS], pa.decimal128(21, 0))) == bits
    assert (
        len({tuple(row) for row in bits}) == len(NUMBERS) - 2
    )  # 2**64 - 1 has the bits of -1, 2**63 those of -(2**63)


def test_other_text_is_told_apart_by_its_bytes():
    words = [b"a", b"A", b"", b" ", b"-", b".0", b"1e5", b"0x10", b"7a", b"1.5", b"1 2", b"\xff\xfe", b"\xff"]
    assert len({tuple(row) for row in bits_of(pa.array(words))}) == len(words)
    view = pa.array(words).cast(pa.binary_view())
    assert bits_of(view) == bits_of(pa.array(words)) == bits_of(pa.array(words, pa.large_binary()))
    assert bits_of(view.slice(3)) == bits_of(pa.array(words[3:]))


def test_parts_stay_what_they_were():
    """Of keys that are integers, or text that spells no number."""
    assert np.flatnonzero(validation(pa.array(range(40)))).tolist() == GOLDEN_NUMBERS
    assert np.flatnonzero(validation(pa.array([f"user{i}" for i in range(40)]))).tolist() == GOLDEN_WORDS
    assert validation(pa.array([None, None, 3], pa.int64())).tolist() == validation(pa.array([0, 0, 3])).tolist()


@pytest.mark.parametrize("kind", [pa.null(), pa.list_(pa.null()), pa.int64(), pa.float64(), pa.string()])
def test_missing_keys_are_one_key(kind):
    assert validation(pa.nulls(2, kind)).tolist() == validation(pa.array([None, None], pa.int64())).tolist()


@pytest.mark.filterwarnings("ignore:recfx. got no batch")
@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(
    ("key", "got", "expected"),
    [
        (0.5, "0.5", "a whole number, as a key"),
        (float("nan"), "nan", "a whole number, or null"),
        (2.0**53, "9007199254740992.0, which may have been rounded", "a whole number below"),
        (Decimal("0.25"), "0.25", "a whole number of 64 bits, as a key that rows are split by"),
    ],
)
def test_keys_that_are_no_whole_numbers(tmp_path, extension, key, got, expected):
    first = Decimal("1.00") if isinstance(key, Decimal) else 1.0
    path = write(tmp_path / f"a.{extension}", pa.table({"user": [first, first, key], "idx": [1, 2, 3]}), 2)
    for part in ("train", "validation"):
        with pytest.raises(ValueError, match=f"column 'user' of '{path}', row 2: got {got}, expected {expected}"):
            users_of(path, part)
    kept = []
    for part in ("train", "validation"):
        split = Split(part=part, fraction=0.3, key="user")
        it = iter(reader(path, [fixedlen("idx", [0.0])], 1, split=split, on_bad="skip"))
        kept += all_rows(it)
        assert it.num_bad == 1
    assert [row["idx"] for row in kept] == [[1], [2]]


def test_keys_of_another_type(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"user": [True], "idx": [1]}))
    with pytest.raises(
        ValueError, match=f"split: got key 'user' of bool in '{path}', expected whole numbers or strings"
    ):
        users_of(path, "train")


@pytest.mark.filterwarnings("ignore:recfx. got no batch")
def test_a_key_that_the_filter_leaves_out_is_not_looked_at(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"user": [1.0, 0.5], "idx": [1, 2]}))
    rows = []
    for part in ("train", "validation"):
        split = Split(part=part, fraction=0.3, key="user")
        rows += all_rows(reader(path, [fixedlen("idx", [0.0])], 1, split=split, filter=[("idx", "<", 2)]))
    assert rows == [{"idx": [1]}]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            (f"{sign}{zeros}{digits}{end}", int(sign + digits))
            for sign, zeros, digits, end in itertools.product(
                ["", "+", "-"], ["", "000"], ["0", "7", f"{2**64 - 1}"], ["", ".", ".00"]
            )
        ),
        *((text, None) for text in ("", " ", "+", "-", ".", ".0", "1e3", "1.5", "0x1", "1 2", "1,2", "--1", "1\n2")),
    ],
)
def test_what_spells_a_number(text, number):
    got = spelled(pa.array([text.encode(), f" {text}\t".encode()]))
    assert got.is_number.tolist() == [number is not None] * 2
    assert got.sizes.tolist() == [abs(number or 0)] * 2
    if number:
        assert got.is_negative.tolist() == [number < 0] * 2


def test_numbers_of_more_than_64_bits_are_told():
    got = spelled(pa.array([f"{2**64}".encode(), b"-" + b"9" * 40, f"{2**64 - 1}".encode()]))
    assert got.is_larger.tolist() == [True, True, False]
    assert got.digits.to_pylist() == [f"{2**64}".encode(), b"9" * 40, f"{2**64 - 1}".encode()]
