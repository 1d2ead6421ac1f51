"""JSON lines: every value exact, or its row bad; a row is a line, whatever is in it and whatever block it is in."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq

from recfx.cli import main
from recfx.data import JsonLines, Split, fixedlen, hashed, reader, varlen
from recfx.data.convert import convert
from recfx.data.describe import describe
from recfx.data.files import match_files
from recfx.data.formats import open_file
from recfx.data.text.json_lines import OpenJsonLines
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import all_rows

LINES = [
    b'{"y": 1, "id": 9223372036854775807, "tags": ["a", "b"], "user": {"age": 30, "city": "rome"}, "deep": [[1], []]}',
    b'{"y": 0.0, "id": 7.0, "tags": null, "user": null, "deep": [], "other": {"x": [1, {"y": 2}]}}',
    b'  {"id": 9.007199254740993e15, "y": 1e0, "user": {"city": "\\u00e9\\ud83d\\ude00\\n"},"w": [{"v": 0.5, "k": 3}]}',
    b'{"y": 1, "id": -9223372036854775808, "tags": "c", "user": {"age": 1.5, "city": "\xff\xfe"}, "m": {"-5": 2}}',
    b'{"y": 0, "tags": [], "w": [], "m": {}, "user": {}}',
]
ROWS = [
    {"y": [1.0], "id": [2**63 - 1], "tags": [b"a", b"b"], "user.age": [30.0], "user.city": [b"rome"]},
    {"y": [0.0], "id": [7], "tags": [], "user.age": [-1.0], "user.city": []},
    {"y": [1.0], "id": [9007199254740993], "tags": [], "user.age": [-1.0], "user.city": ["é😀\n".encode()]},
    {"y": [1.0], "id": [-(2**63)], "tags": [b"c"], "user.age": [1.5], "user.city": [b"\xff\xfe"]},
    {"y": [0.0], "id": [], "tags": [], "user.age": [-1.0], "user.city": []},
]
MORE = [
    {"deep": [[1], []], "w": [], "m": []},
    {"deep": [], "w": [], "m": []},
    {"deep": [], "w": [(3, 0.5)], "m": []},
    {"deep": [], "w": [], "m": [(-5, 2.0)]},
    {"deep": [], "w": [], "m": []},
]
COLUMNS = [
    fixedlen("y", [0.5]),
    varlen("id", torch.int64, null="empty"),
    varlen("tags", torch.uint8, null="empty"),
    fixedlen("user.age", [-1.0], null="empty"),
    varlen("user.city", torch.uint8, null="empty"),
    varlen("deep", torch.int64, depth=2, null="empty"),
    varlen("w", torch.int64, weighted=True, null="empty"),
    varlen("m", torch.int64, weighted=True, null="empty"),
]


def written(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def read(path: Any, columns: list, **options: Any) -> list[dict[str, Any]]:
    return all_rows(reader(path, columns, 2, drop_remainder=False, **options))


@pytest.mark.parametrize("block_bytes", [13, 120, 10_000])
@pytest.mark.parametrize(("ending", "last"), [(b"\n", True), (b"\r\n", False), (b" \n\n \r\n", True)])
def test_all_kinds_of_values_in_blocks_of_any_size(tmp_path, block_bytes, ending, last):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ending.join(LINES) + ending * last)
    batches = reader(path, COLUMNS, 2, drop_remainder=False, threads=2, format=JsonLines(block_bytes=block_bytes))
    expected = [{**row, **more} for row, more in zip(ROWS, MORE, strict=True)]
    assert all_rows(batches) == expected
    it = iter(batches)
    next(it)
    assert all_rows(batches.start_at(it.position)) == expected[2:]


@pytest.mark.parametrize("name", ["a.json", "a.NDJSON", "part", "a.jsonl.GZ", "b.json.gzip"])
def test_names_of_files(tmp_path, name):
    text = b"\n".join(LINES[:2])
    (tmp_path / name).write_bytes(gzip.compress(text) if name.lower().endswith(("gz", "gzip")) else text)
    assert [row["y"] for row in read(tmp_path, COLUMNS[:1])] == [[1.0], [0.0]]


IDS = [0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("block_bytes", [20, 10_000])
def test_ids_keep_their_64_bits(tmp_path, block_bytes):
    path = written(tmp_path / "a.jsonl", *(b'{"id": %d, "s": "%d"}' % (i, i) for i in IDS))
    rows = read(path, [varlen("id", torch.int64), varlen("s", torch.uint8)], format=JsonLines(block_bytes=block_bytes))
    assert [row["id"][0] % 2**64 for row in rows] == IDS
    assert [int(row["s"][0]) for row in rows] == IDS


def test_ids_that_would_merge_are_bad(tmp_path):
    """-1 and 2**64 - 1 have the same bits."""
    path = written(tmp_path / "a.jsonl", b'{"id": -1}', b'{"id": 18446744073709551615}')
    columns = [varlen("id", torch.int64)]
    with pytest.raises(
        ValueError, match=r"'id' of .*, row 1: got 18446744073709551615, expected int64, since the column"
    ):
        read(path, columns)
    assert read(path, columns, on_bad="skip") == [{"id": [-1]}]
    (out,) = convert(path, tmp_path / "out")
    assert pq.read_table(out)["id"].to_pylist() == ["-1", "18446744073709551615"]


def test_numbers_are_text_where_the_column_is_text(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"zip": "01234"}', b'{"zip": 1234}', b'{"zip": 18446744073709551616}')
    assert [row["zip"] for row in read(path, [varlen("zip", torch.uint8)])] == [
        [b"01234"], [b"1234"], [b"18446744073709551616"],
    ]  # fmt: skip


FAULTS = {
    b'{"y": "1", "id": 1}': r"column 'y' of .*, row 2: got '1', expected double",
    b'{"y": 1, "id": 1.5}': r"column 'id' of .*, row 2: got 1.5, expected int64",
    b'{"y": 1, "id": true}': r"column 'id' of .*, row 2: got true, expected int64",
    b'{"y": 1, "id": "7"}': r"column 'id' of .*, row 2: got '7', expected int64",
    b'{"y": 1, "id": 18446744073709551616}': r"column 'id' of .*, row 2: got 18446744073709551616, expected int64",
    b'{"y": 1, "id": 1e9999999}': r"column 'id' of .*, row 2: got 1e9999999, expected int64",
    b'{"y": 9007199254740993, "id": 1}': r"column 'y' of .*, row 2: got 9007199254740993, expected double",
    b'{"y": 1e999, "id": 1}': r"column 'y' of .*, row 2: got 1e999, expected double",
    b'{"y": NaN, "id": 1}': r"column 'y' of .*, row 2: got nan, expected a finite number",
    b'{"y": -Inf, "id": 1}': r"column 'y' of .*, row 2: got -inf, expected a finite number",
    b'{"y": 1, "id": null}': r"column 'id' of .*, row 2: got null, expected a value, or null='empty'",
    b'{"y": 1}': r"column 'id' of .*, row 2: got null, expected a value",
    b'{"y": 1, "id": {"a": 1}}': r"column 'id' of .*, row 2: got an object, expected int64",
    b'{"y": 1, "id": 1, "y": 1}': r"column 'y' of .*, row 2: got this name twice",
    b'{"y": 1, "id": 1': r"file '.*a.jsonl', row 2: got '{.*' \(Expecting ',' delimiter at character 16\)",
    b'{"y": 1, "id": 1} {"y": 1, "id": 1}': r"file '.*', row 2: got .*Extra data .*, expected a JSON object in a line",
    b'{"y": 1, "id": 1},': r"file '.*', row 2: got .*Extra data",
    b'[{"y": 1, "id": 1}]': r"file '.*', row 2: got .*\(a list\), expected a JSON object",
    b'{"y": 1, "id": 1, "z": "\\ud800"}': r"file '.*', row 2: got .*half of a surrogate pair",
    b'{"y": 1, "id": 1, "z": "\x00"}': r"file '.*', row 2: got .*Invalid control character",
    b'{"y": 01, "id": 1}': r"file '.*', row 2: got .*Expecting ',' delimiter",
}


@pytest.mark.parametrize("line", FAULTS)
@pytest.mark.parametrize("block_bytes", [40, 10_000])
def test_a_bad_line_is_a_bad_row(tmp_path, line, block_bytes):
    lines = [b'{"y": %d, "id": %d}' % (i, i) for i in range(5)]
    path = written(tmp_path / "a.jsonl", *lines[:2], line, *lines[3:])
    columns, how = [COLUMNS[0], varlen("id", torch.int64)], JsonLines(block_bytes=block_bytes)
    with pytest.raises(ValueError, match=FAULTS[line]):
        read(path, columns, format=how)
    it = iter(reader(path, columns, 5, drop_remainder=False, format=how, on_bad="skip"))
    assert [row["id"] for row in all_rows(it)] == [[0], [1], [3], [4]]
    assert it.num_bad == 1


def test_rows_do_not_depend_on_what_is_next_to_them(tmp_path):
    """What Arrow reads and Python does not, and the other way round, is read in any company."""
    odd = [
        b'{"id": 1, "z": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"id": 2, "z": Inf}',
        b'{"id": 3, "z": ' + b"9" * 5000 + b"}",
        b'{"id": 4.0}',
        b'{"id": 5e0}',
        b'{"id": 6, "z": 1, "z": 2}',
    ]
    columns = [varlen("id", torch.int64)]
    first = b'{"id": 0}'
    alone = [read(written(tmp_path / f"{i}.jsonl", first, line), columns)[1] for i, line in enumerate(odd)]
    path = written(tmp_path / "all.jsonl", first, *odd)
    assert read(path, columns)[1:] == alone == [{"id": [i]} for i in range(1, 7)]


def test_the_standard_library_and_arrow_agree(tmp_path):
    """The same rows with and without a line in their block that Arrow cannot read."""
    rng = random.Random(3)

    def value(depth: int) -> Any:
        texts = ["", "é", "a\tb", '"', "\\", "😀", "\u0000"]
        pick = [None, rng.getrandbits(62), -rng.getrandbits(30), rng.uniform(-1, 1), 10.0 ** rng.randint(-300, 15),
                rng.choice(texts), [rng.getrandbits(8) for _ in range(rng.randrange(3))]]  # fmt: skip
        return rng.choice([*pick, {"a": value(depth - 1), "b": 2}] if depth else pick)

    rows = [
        {
            "f": rng.uniform(-1e9, 1e9), "i": rng.getrandbits(60), "s": rng.choice(["x", "é\n", ""]),
            "l": [rng.random() for _ in range(rng.randrange(4))], "o": {"p": {"q": rng.random()}}, "any": value(2),
        }
        for _ in range(300)
    ]  # fmt: skip
    columns = [
        fixedlen("f", [0.0]), varlen("i", torch.int64), varlen("s", torch.uint8), varlen("l", torch.float32),
        fixedlen("o.p.q", [0.0]),
    ]  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5).encode() for row in rows]
    plain = written(tmp_path / "plain.jsonl", *lines)
    (file,) = match_files(plain)
    source = OpenJsonLines(file, JsonLines(), {}, columns)
    with_odd = written(tmp_path / "odd.jsonl", *lines, b"{")
    expected = read(plain, columns)
    assert read(with_odd, columns, on_bad="skip") == expected
    assert source.read(0, ["f", "i"]).batch.to_pylist() == [{"f": row["f"], "i": row["i"]} for row in rows]


def test_columns_that_the_first_rows_lack(tmp_path):
    """Their type is that of the column; a name that is absent everywhere is null in every row."""
    early = [b'{"y": 1, "pad": "%s"}' % (b"x" * 1000)] * 1200
    late = b'{"y": 1, "c": [5], "u": {"v": {"w": 0.5}}, "k": [{"id": 3, "weight": 2}], "n": 4}'
    path = written(tmp_path / "a.jsonl", *early, late)
    columns = [
        varlen("c", torch.int64, null="empty"), fixedlen("u.v.w", [0.0], null="empty"),
        varlen("k", torch.int64, weighted=True, null="empty"), varlen("n", torch.int64, null="empty"),
        hashed("never", farm_hashes, null="empty"), varlen("not.at.all", torch.float32, depth=2, null="empty"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"column 'k' of .*, row 1200: got a null element"):
        read(path, columns)
    path = written(tmp_path / "a.jsonl", *early, late.replace(b"id", b"k").replace(b"weight", b"v"))
    rows = read(path, columns)
    empty = {"c": [], "u.v.w": [0.0], "k": [], "n": [], "never": [], "not.at.all": []}
    assert rows[:1200] == [empty] * 1200
    assert rows[1200] == {**empty, "c": [5], "u.v.w": [0.5], "k": [(3, 2.0)], "n": [4]}
    with pytest.raises(ValueError, match=r"column 'never' of .*, row 0: got null, expected a list, empty if missing"):
        read(path, [hashed("never", farm_hashes)])


@pytest.mark.parametrize(
    ("value", "column", "match"),
    [
        (b'"x"', varlen("a", torch.int64), "column 'a' of .*: got string, expected list<int64>.* read by `hashed`"),
        (
            b'{"b": 1}',
            varlen("a", torch.int64),
            "column 'a' of .*: got struct<b: int64>.* can be read as a column: 'a.b'",
        ),
        (b"[[1]]", varlen("a", torch.int64), "column 'a' of .*: got list<item: list<item: int64>>, expected"),
        (b"0.5", hashed("a", farm_hashes), "column 'a' of .*: got double, expected list<string>"),
        (b"[1]", varlen("a", torch.int64, weighted=True), "column 'a' of .*: got list<item: int64>"),
    ],
)
def test_columns_of_another_type(tmp_path, value, column, match):
    path = written(tmp_path / "a.jsonl", b'{"a": ' + value + b"}")
    with pytest.raises(ValueError, match=match):
        read(path, [column])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"file '.*a.json': got 0 bytes"),
        (b'[{"a": 1},\n {"a": 2}]', r"file '.*a.json': got 'a list.*', expected a readable JSON lines file"),
        (b'{\n "a": 1\n}\n', r"file '.*a.json', row 0: got '{' .*, expected a JSON object in a line"),
        (bytes(range(256)) * 10, r"file '.*a.json', row 0: got .*, expected a JSON object in a line"),
    ],
)
def test_what_is_not_json_lines(tmp_path, content, match):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read(tmp_path, [varlen("a", torch.int64)])


def test_filter_split_and_cache(tmp_path):
    lines = [b'{"id": %d, "day": "2026-11-%02d", "n": %d}' % (i, i % 3 + 1, i) for i in range(60)]
    path = written(tmp_path / "a.jsonl", *lines)
    options = {"filter": [("day", "==", "2026-11-02"), ("n", ">", 3)], "cache": tmp_path / "cache"}
    parts = [
        read(path, [varlen("id", torch.int64)], split=Split(part=part, fraction=0.5, key="id"), **options)
        for part in ("train", "validation", "train")
    ]
    assert sorted(row["id"][0] for rows in parts[:2] for row in rows) == list(range(4, 60, 3))
    assert parts[0] == parts[2] != []


def test_convert_and_describe_see_every_row(tmp_path, capsys):
    """Types and names too: what the first rows lack is there."""
    lines = [b'{"id": %d, "w": [{"v": 0.5, "k": %d}]}' % (2**60 + i, i) for i in range(2000)]
    path = written(tmp_path / "a.jsonl", *lines, b'{"id": 18446744073709551615, "late": ["x"], "day": "2026-11-02"}')
    (file,) = match_files(path)
    source = open_file(file, {}, JsonLines(block_bytes=10_000))
    assert source.schema.names == ["id", "w", "late", "day"]
    assert source.schema.field("id").type == pa.uint64()
    assert source.schema.field("day").type == pa.string()
    facts = describe([file], format=JsonLines(block_bytes=10_000))
    assert (facts.num_rows, facts.columns[0].num_distinct, facts.columns[0].high) == (2001, 2001, 2**64 - 1)
    (out,) = convert(path, tmp_path / "out", types={"day": pa.string()})
    columns = [varlen("id", torch.int64), varlen("w", torch.int64, weighted=True, null="empty")]
    assert read(out, columns) == read(path, columns)
    (tmp_path / "b.txt").write_bytes(Path(path).read_bytes())
    assert main(["inspect", "--format", "jsonl", str(tmp_path / "b.txt")]) == 0
    assert "2,001 rows" in capsys.readouterr().out
    assert main(["convert", "--format", "jsonl", str(tmp_path / "b.txt"), str(tmp_path / "cli")]) == 0
    assert pq.read_table(tmp_path / "cli").num_rows == 2001


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="block_bytes: got 0, expected at least 1"):
        JsonLines(block_bytes=0)
    written(tmp_path / "a.jsonl", b"{}")
    with pytest.raises(ValueError, match=r"format: got 'json', expected one of .*'jsonl', 'libsvm'\), Csv\(\.\.\.\)"):
        reader(tmp_path, COLUMNS, format="json")
