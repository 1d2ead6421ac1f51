"""libsvm text: labels, queries and weighted indices, every one exact or its row bad."""

from __future__ import annotations

import bz2
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq

from recfx.cli import main
from recfx.data import Libsvm, Split, fixedlen, hashed, reader, varlen
from recfx.data.convert import convert
from recfx.data.describe import describe
from recfx.data.files import match_files
from recfx.data.formats import open_file
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import all_rows

TEXT = b"""+1 1:0.5 3:+1 9223372036854775807:2.5e-1 # a comment 1:2
-1  qid:3 \t2:1

# a line without a row
0.5 qid:-4# none
1 7:1e3 8:.5\x20
"""
ROWS = [
    {"label": [1.0], "qid": [], "features": [(1, 0.5), (3, 1.0), (2**63 - 1, 0.25)]},
    {"label": [-1.0], "qid": [3], "features": [(2, 1.0)]},
    {"label": [0.5], "qid": [-4], "features": []},
    {"label": [1.0], "qid": [], "features": [(7, 1000.0), (8, 0.5)]},
]
COLUMNS = [
    fixedlen("label", [0.0]),
    varlen("qid", torch.int64, null="empty"),
    varlen("features", torch.int64, weighted=True),
]


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def read(path: Any, columns: list, **options: Any) -> list[dict[str, Any]]:
    return all_rows(reader(path, columns, 2, drop_remainder=False, **options))


@pytest.mark.parametrize("block_bytes", [7, 40, 10_000])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_rows_in_blocks_of_any_size(tmp_path, block_bytes, ending, last):
    path = written(tmp_path / "a.libsvm", b"\xef\xbb\xbf" + ending.join(TEXT.splitlines()) + ending * last)
    batches = reader(path, COLUMNS, 2, drop_remainder=False, threads=2, format=Libsvm(block_bytes=block_bytes))
    assert all_rows(batches) == ROWS
    it = iter(batches)
    next(it)
    assert all_rows(batches.start_at(it.position)) == ROWS[2:]


def test_halves_of_features_and_names_of_files(tmp_path):
    written(tmp_path / "a.SVM.bz2", bz2.compress(TEXT))
    columns = [varlen("indices", torch.int64), varlen("values", torch.float32)]
    expected = [tuple(list(half) for half in zip(*row["features"], strict=True)) or ([], []) for row in ROWS]
    assert [(row["indices"], row["values"]) for row in read(tmp_path, columns)] == expected
    written(tmp_path / "part", TEXT)
    assert read(tmp_path / "part", COLUMNS, format="libsvm") == ROWS
    with pytest.raises(ValueError, match=r"part': got an unknown format, expected .* or libsvm text. Name it: format="):
        read(tmp_path / "part", COLUMNS)


def test_indices_keep_their_64_bits(tmp_path):
    ids = [0, 2**53 + 1, 2**63, 2**64 - 1]
    path = written(tmp_path / "a.libsvm", b"".join(b"1 %d:1\n" % i for i in ids))
    for block_bytes in (5, 1000):
        rows = read(path, [varlen("indices", torch.int64)], format=Libsvm(block_bytes=block_bytes))
        assert [row["indices"][0] % 2**64 for row in rows] == ids
    path = written(tmp_path / "a.libsvm", b"1 -1:1 5:1\n1 18446744073709551615:1\n")
    with pytest.raises(ValueError, match=r"column 'features' of .*, row 1: got '18446744073709551615', expected int64"):
        read(path, COLUMNS)


def test_names_as_indices(tmp_path):
    path = written(tmp_path / "a.libsvm", "1 word:2 tf_\u00e9:0.5 007:1 7:1\n".encode() + b"0 \xff:1\n")
    columns = [varlen("indices", torch.uint8), hashed("features", farm_hashes, weighted=True)]
    first, second = read(path, columns)
    assert first["indices"] == [b"word", "tf_\u00e9".encode(), b"007", b"7"]
    assert [weight for _, weight in first["features"]] == [2.0, 0.5, 1.0, 1.0]
    assert len({key for key, _ in first["features"]}) == 4
    assert second["indices"] == [b"\xff"]


FAULTS = {
    b"1,2 1:1": "column 'label' of '.*', row 2: got '1,2', expected double",
    b"1:1 2:1": "column 'label' of '.*', row 2: got '1:1', expected double",
    b"x 1:1": "column 'label' of '.*', row 2: got 'x', expected double",
    b"1e999 1:1": "column 'label' of '.*', row 2: got '1e999', expected double",
    b"++1 1:1": "column 'label' of '.*', row 2: got",
    b"nan 1:1": "column 'label' of '.*', row 2: got nan, expected a finite number",
    b"1 1": "column 'features' of '.*', row 2: got '1', expected index:value",
    b"1 2:1:1": "column 'features' of '.*', row 2: got '2:1:1', expected index:value",
    b"1 :1": "column 'features' of '.*', row 2: got '', expected int64",
    b"1 1:": "column 'features' of '.*', row 2: got '', expected double",
    b"1 1.0:1": r"column 'features' of '.*', row 2: got '1\.0', expected int64",
    b"1 a:1": "column 'features' of '.*', row 2: got 'a', expected int64",
    b"1 0x10:1": "column 'features' of '.*', row 2: got '0x10', expected int64",
    b"1 1:one": "column 'features' of '.*', row 2: got 'one', expected double",
    b"1 1:0x1": "column 'features' of '.*', row 2: got '0x1', expected double",
    b"1 1:9007199254740993": "column 'features' of '.*', row 2: got '9007199254740993', expected double",
    b"1 18446744073709551616:1": "column 'features' of '.*', row 2: got '18446744073709551616', expected int64",
    b"1 " + b"9" * 600 + b":1": "column 'features' of '.*', row 2: got '9*', expected int64",
    b"1 qid:x 1:1": "column 'qid' of '.*', row 2: got 'x', expected int64",
    b"1 1:1 qid:3": "column 'features' of '.*', row 2: got 'qid', expected int64",
    b"1 \x00:1": "column 'features' of '.*', row 2: got '.x00', expected int64",
    b"1 \xff:1": "column 'features' of '.*', row 2: got '.*', expected int64",
}


@pytest.mark.parametrize("line", FAULTS)
@pytest.mark.parametrize("block_bytes", [8, 10_000])
def test_a_bad_line_is_a_bad_row(tmp_path, line, block_bytes):
    lines = [b"%d %d:1" % (i, i) for i in range(5)]
    lines[2] = line
    path, how = written(tmp_path / "a.libsvm", b"\n".join(lines)), Libsvm(block_bytes=block_bytes)
    with pytest.raises(ValueError, match=FAULTS[line]):
        read(path, COLUMNS, format=how)
    it = iter(reader(path, COLUMNS, 5, drop_remainder=False, format=how, on_bad="skip"))
    assert [row["features"] for row in all_rows(it)] == [[(i, 1.0)] for i in (0, 1, 3, 4)]
    assert it.num_bad == 1


def test_values_are_those_of_python(tmp_path):
    rng = random.Random(2)
    words = [repr(rng.uniform(-10, 10) * 10.0 ** rng.randint(-9, 9)) for _ in range(500)]
    text = "\n".join(f"0 {i}:{word}" for i, word in enumerate(words))
    (file,) = match_files(written(tmp_path / "a.libsvm", text.encode()))
    rows = open_file(file, {}).read(0, ["features"]).batch.to_pylist()
    assert [row["features"] for row in rows] == [[{"k": i, "v": float(word)}] for i, word in enumerate(words)]


def test_columns_that_it_does_not_have(tmp_path):
    path = written(tmp_path / "a.libsvm", TEXT)
    with pytest.raises(ValueError, match=r"column 'c' of '.*a.libsvm': got no such column, expected one of \['label'"):
        read(path, [varlen("c", torch.int64)])
    with pytest.raises(ValueError, match=r"column 'features' of '.*': got list<item: struct<k: int64, v: double>>"):
        read(path, [varlen("features", torch.int64)])
    with pytest.raises(ValueError, match=r"column 'qid' of '.*', row 0: got null, expected a value, or null='empty'"):
        read(path, [varlen("qid", torch.int64)])


@pytest.mark.parametrize("content", [bytes(range(256)) * 40, b"a,b\n1,2\n", b'{"a": 1}\n'])
def test_what_is_not_libsvm(tmp_path, content):
    with pytest.raises(ValueError, match=r"column 'label' of '.*a.svm', row 0: got .*, expected double"):
        read(written(tmp_path / "a.svm", content), COLUMNS)
    with pytest.raises(ValueError, match=r"file '.*a.svm': got 0 bytes"):
        read(written(tmp_path / "a.svm", b""), COLUMNS)


def test_filter_split_and_cache(tmp_path):
    path = written(tmp_path / "a.libsvm", b"".join(b"%d qid:%d 1:%d\n" % (i % 2, i // 4, i) for i in range(80)))
    options = {"filter": [("label", ">", 0)], "cache": tmp_path / "cache"}
    parts = [
        read(path, COLUMNS[1:], split=Split(part=part, fraction=0.5, key="qid"), **options)
        for part in ("train", "validation", "train")
    ]
    assert sorted(row["features"][0][1] for rows in parts[:2] for row in rows) == list(range(1, 80, 2))
    assert not {row["qid"][0] for row in parts[0]} & {row["qid"][0] for row in parts[1]}
    assert parts[0] == parts[2]


@pytest.mark.parametrize("block_bytes", [1, 1000])
def test_convert_keeps_ids_of_all_blocks_apart(tmp_path, block_bytes):
    path = written(tmp_path / "a.svm", b"1 -1:1\n1 18446744073709551615:1\n")
    (out,) = convert(path, tmp_path / "out", format=Libsvm(block_bytes=block_bytes))
    assert [row[0]["k"] for row in pq.read_table(out)["features"].to_pylist()] == ["-1", "18446744073709551615"]


@pytest.mark.parametrize(
    ("indices", "kind"),
    [
        ((b"1", b"2"), pa.int64()),
        ((b"1", b"9223372036854775808"), pa.uint64()),
        ((b"-1", b"9223372036854775808"), pa.string()),
        ((b"1", b"x"), pa.string()),
        ((b"1", b"01"), pa.string()),
        ((b"16", b"0x10"), pa.string()),
        ((b"1", b"18446744073709551616"), pa.string()),
    ],
)
def test_convert_and_describe_see_every_row(tmp_path, indices, kind, capsys):
    text = b"".join(b"1 %s:0.5\n" % index for index in (*[indices[0]] * 50, indices[1]))
    path = written(tmp_path / "a.txt", text)
    (file,) = match_files(path)
    how = Libsvm(block_bytes=100)
    assert open_file(file, {}, how).schema.field("features").type.value_type.field("k").type == kind
    assert describe([file], format=how).num_rows == 51
    if kind != pa.uint64():
        (out,) = convert(path, tmp_path / "out", format=how)
        keys = [row[0]["k"] for row in pq.read_table(out)["features"].to_pylist()]
        assert len(set(keys)) == 2
    assert main(["inspect", "--format", "libsvm", path]) == 0
    assert "51 rows" in capsys.readouterr().out
    assert main(["inspect", "--format", "orc", "--delimiter", ",", path]) == 2
    assert "--format: got 'orc', expected 'csv'" in capsys.readouterr().err
