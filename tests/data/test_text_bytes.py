"""Strings of any bytes, in every type that holds strings."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from recfx.data import Split, hashed, reader, varlen
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import FORMATS, all_rows, write

WORDS = ["Zürich".encode("latin-1"), b"", b"\xff\x00\xfe", "é".encode(), b"plain"]
COLUMNS = [varlen("words", torch.uint8), hashed("lists", farm_hashes)]


def hashes(words: list[bytes]) -> list[int]:
    text = torch.frombuffer(bytearray(b"".join(words) or b"-"), dtype=torch.uint8)
    ends = torch.tensor([0, *(len(word) for word in words)]).cumsum(0).int()
    return farm_hashes([text], [ends])[0].tolist()


def dictionary(kind: pa.DataType) -> pa.Array:
    words = pa.array(WORDS).cast(kind) if kind != pa.string() else unchecked(WORDS)
    return pa.DictionaryArray.from_arrays(pa.array(range(len(WORDS)), pa.int8()), words)


def unchecked(words: list[bytes]) -> pa.Array:
    """Strings as Arrow has them of files that do not keep to UTF-8."""
    return pa.Array.from_buffers(pa.string(), len(words), pa.array(words).buffers())


ARRAYS = {
    "binary": pa.array(WORDS),
    "large binary": pa.array(WORDS, pa.large_binary()),
    "views": pa.array(WORDS).cast(pa.binary_view()),
    "dictionary": dictionary(pa.binary()),
    "dictionary of large": dictionary(pa.large_binary()),
}


def in_lists(words: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, 2, 2, 3, 5, 5], pa.int32()), words)


def expected(words: list[bytes]) -> list[dict]:
    ids = hashes(words)
    lists = [ids[:2], [], ids[2:3], ids[3:], []]
    return [{"words": [word], "lists": items} for word, items in zip(words, lists, strict=True)]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("extension", FORMATS)
def test_bytes_of_every_type(tmp_path, name, extension):
    words = ARRAYS[name]
    if extension == "orc" and name not in ("binary", "large binary"):
        words = pa.array(WORDS)
    path = write(tmp_path / f"a.{extension}", pa.table({"words": words, "lists": in_lists(words)}))
    assert all_rows(reader(path, COLUMNS, 2, drop_remainder=False)) == expected(WORDS)


@pytest.mark.parametrize("extension", ["orc", "parquet"])
def test_strings_that_are_no_utf8(tmp_path, extension):
    """Arrow's own files are checked; other ones are read as they are."""
    words = unchecked(WORDS)
    path = write(tmp_path / f"a.{extension}", pa.table({"words": words, "lists": in_lists(words)}))
    assert all_rows(reader(path, COLUMNS, 5)) == expected(WORDS)


def test_bytes_of_one_length(tmp_path):
    table = pa.table({"words": pa.array([b"\x00\xff", b"ab"], pa.binary(2))})
    path = write(tmp_path / "a.parquet", table)
    rows = all_rows(reader(path, [varlen("words", torch.uint8)], 1))
    assert rows == [{"words": [b"\x00\xff"]}, {"words": [b"ab"]}]


VIEWS = {
    "x": pa.array(["a", None, "c", "d"]).cast(pa.string_view()),
    "lists": pa.array([["a"], None, ["c", "d"], []], pa.list_(pa.string_view())),
    "dictionary": pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1, 0]), pa.array(["a", "b"]).cast(pa.string_view())
    ),
    "pairs": pa.array(
        [[{"k": "a", "v": 1.0}], None, [], [{"k": "b", "v": 2.0}]],
        pa.list_(pa.struct([("k", pa.string_view()), ("v", pa.float32())])),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_with_a_filter_a_split_and_bad_rows(tmp_path, name):
    """Arrow filters no views: they are read as strings first."""
    column = VIEWS[name]
    path = write(tmp_path / "a.arrow", pa.table({name: column, "y": range(4)}))
    is_pairs = name == "pairs"
    make = {
        True: lambda **o: hashed(name, farm_hashes, weighted=True, **o),
        False: lambda **o: varlen(name, torch.uint8, **o),
    }
    whole = all_rows(reader(path, [make[is_pairs](null="empty")], 1))
    it = iter(reader(path, [make[is_pairs]()], 1, on_bad="skip", filter=[("y", ">", 0)]))
    assert (all_rows(it), it.num_bad) == (whole[2:], 1)
    if not is_pairs:
        parts = [
            all_rows(reader(path, [make[is_pairs](null="empty")], 1, split=Split(part=part, fraction=0.5, key=name)))
            for part in ("train", "validation")
        ]
        assert sorted(str(row) for rows in parts for row in rows) == sorted(map(str, whole))


def test_a_column_that_arrow_cannot_convert_is_named(tmp_path):
    def broken(values):
        raise RuntimeError("not today")

    path = write(tmp_path / "a.parquet", pa.table({"x": [1.0], "y": [2.0]}))
    columns = [varlen("x", torch.float32), varlen("y", torch.float32, valid=broken)]
    with pytest.raises(
        ValueError, match=f"column 'y' of '{path}': got 'not today' in row group 0, expected values that"
    ):
        list(reader(path, columns, 1))
