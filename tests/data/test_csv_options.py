"""CSV in the ways it is published: other quotes, long delimiters, lists by column, weights, spellings of nothing. Each
of them with each other, in blocks of any size."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from recfx.data import Csv, fixedlen, hashed, reader, varlen
from recfx.data.convert import convert
from recfx.data.describe import describe
from recfx.data.files import match_files
from recfx.data.identity import identity_of
from recfx.data.text.csv import OpenCsv
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import all_rows

COLUMNS_XY = [varlen(name, torch.int64, null="empty") for name in "xy"]
WAYS = [
    {"delimiter": ","},
    {"delimiter": "::"},
    {"delimiter": "¦", "quote": "'"},
    {"delimiter": "\0"},
    {"delimiter": "\t", "quote": None},
    {"delimiter": "||", "quote": None},
]
OPTIONS = {
    "list_separator": {"tags": "|", "likes": ", "},
    "weight_separator": {"likes": ":"},
    "nulls": ("\\N", "NULL"),
}
COLUMNS = [
    varlen("id", torch.int64, null="empty"),
    varlen("title", torch.uint8, null="empty"),
    varlen("tags", torch.int64, null="empty"),
    varlen("likes", torch.int64, weighted=True, null="empty"),
]


def cell(text: str | None, how: Csv) -> str:
    if text is None or how.quote is None:
        return "\\N" if text is None else text
    is_plain = how.delimiter not in text and how.quote not in text
    return text if is_plain else f"{how.quote}{text.replace(how.quote, how.quote * 2)}{how.quote}"


def titles(how: Csv) -> list[str | None]:
    """Texts that are hard to read in this way."""
    if how.quote is None:
        return ['"Joker" breaks', '"open', 'mid"dle', "plain", None]
    d, q = how.delimiter, how.quote
    return [f"a{d}b", f"{q}", f"{d}{q}{d}", f"5{q} nail", None, d * 3, "plain"]


def lines_of(how: Csv) -> tuple[list[str], list[dict]]:
    """The lines of a file, and what its rows are."""
    lines, rows = [], []
    for i, title in enumerate(titles(how)):
        likes = [(10 * i + j, 0.5 * j) for j in range(i % 3)]
        cells = [str(i) if i % 4 else "NULL", title, "|".join(map(str, range(i % 3))) or "", None]
        cells[3] = ", ".join(f"{k}:{v}" for k, v in likes) or None
        lines.append(
            how.delimiter.join("" if text == "" else text if text == "NULL" else cell(text, how) for text in cells)
        )
        rows.append({
            "id": [i] if i % 4 else [],
            "title": [] if title is None else [title.encode()],
            "tags": list(range(i % 3)),
            "likes": likes,
        })  # fmt: skip
    return lines, rows


def written(path: Path, how: Csv, lines: list[str], ending: str = "\n") -> Path:
    text = ending.join([how.delimiter.join(c.name for c in COLUMNS), *lines]).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("block_bytes", [7, 1000])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_every_way_to_write_the_same_rows(tmp_path, way, block_bytes, ending, name):
    how = Csv(**way, **OPTIONS, block_bytes=block_bytes)
    lines, rows = lines_of(how)
    path = written(tmp_path / name, how, [*lines[:2], "", *lines[2:], ""], ending)
    batches = reader(path, COLUMNS, 2, drop_remainder=False, format=how)
    assert all_rows(batches) == rows
    it = iter(batches)
    next(it)
    assert all_rows(batches.start_at(it.position)) == rows[2:]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("block_bytes", [25, 1000])
def test_bad_rows_of_every_way(tmp_path, way, block_bytes):
    """Too few cells, an unclosed quote, no number, no weight: each by its row."""
    how = Csv(**way, **OPTIONS, block_bytes=block_bytes)
    d, (lines, rows) = how.delimiter, lines_of(how)
    wrong = {
        f"1{d}2": "row 2: got 2 cells, expected 4",
        d.join(["1", "a", "x", ""]): "column 'tags' .* row 2: got 'x', expected list<",
        d.join(["1", "a", "1|NULL|2", ""]): "column 'tags' .* row 2: got a null element",
        d.join(["1", "a", "", "7:much"]): "column 'likes' .* row 2: got '7:much', expected list<",
        d.join(["1", "a", "", "7:"]): "column 'likes' .* row 2: got '7:', expected list<",
    }
    if how.quote is not None:
        wrong[d.join(["1", f"{how.quote}a", "1", ""])] = f"row 2: got a quote that is not closed, .*a{d}1{d}"
    for line, match in wrong.items():
        path = written(tmp_path / "a.csv", how, [*lines[:2], line, *lines[2:], line])
        it = iter(reader(path, COLUMNS, 3, drop_remainder=False, format=how, on_bad="skip"))
        assert (all_rows(it), it.num_bad) == (rows, 2)
        match = match.replace("|", r"\|").replace("\0", r"\\x00")
        with pytest.raises(ValueError, match=match):
            list(reader(path, COLUMNS, 3, format=how))


def test_a_delimiter_whose_stand_ins_are_all_in_the_text(tmp_path):
    ascii_letters = bytes(code for code in range(1, 128) if code not in b'\r\n"')
    (tmp_path / "a.csv").write_bytes(b"x::y\n" + ascii_letters[:40] + b"::1\n" + ascii_letters + b"::2\n")
    columns, how = [varlen("x", torch.uint8)], Csv(delimiter="::", block_bytes=1)
    it = iter(reader(tmp_path / "a.csv", columns, 1, format=how))
    assert all_rows([next(it)]) == [{"x": [ascii_letters[:40]]}]
    with pytest.raises(ValueError, match=r"file '.*a.csv': got .*every ASCII character in one block"):
        next(it)


def test_a_list_separator_that_is_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text('id,tag\n1,"12,65"\n2,7\n3,\n')
    columns = [varlen("id", torch.int64), varlen("tag", torch.int64, null="empty")]
    for separator in (",", {"tag": ","}):
        rows = all_rows(reader(tmp_path / "a.csv", columns, 3, format=Csv(list_separator=separator)))
        assert [row["tag"] for row in rows] == [[12, 65], [7], []]
    with pytest.raises(
        ValueError, match="list_separator: got ',', expected characters; the delimiter only when cells are quoted"
    ):
        Csv(list_separator={"tag": ","}, quote=None)


def test_one_separator_for_all_splits_text_also_where_types_are_guessed(tmp_path):
    (tmp_path / "a.csv").write_text("id,name,tags,codes\n1,red shoe,7|8,01|2\n2,a|b,9,x\n")
    table = pq.read_table(convert(tmp_path / "a.csv", tmp_path / "all", format=Csv(list_separator="|"))[0])
    assert table.to_pylist() == [
        {"id": 1, "name": ["red shoe"], "tags": [7, 8], "codes": ["01", "2"]},
        {"id": 2, "name": ["a", "b"], "tags": [9], "codes": ["x"]},
    ]
    table = pq.read_table(convert(tmp_path / "a.csv", tmp_path / "one", format=Csv(list_separator={"id": "|"}))[0])
    assert table.to_pylist()[1] == {"id": [2], "name": "a|b", "tags": "9", "codes": "x"}


def test_weights_of_hashed_strings_and_in_convert(tmp_path):
    (tmp_path / "a.csv").write_text("tags,n\na:b:0.5|c,1\n,2\nd:2,3\n")
    how = Csv(list_separator="|", weight_separator=":")
    column = hashed("tags", farm_hashes, weighted=True, null="empty")
    (batch,) = reader(tmp_path / "a.csv", [column, varlen("n", torch.int64)], 3, format=how)
    words = [torch.tensor([*b"a:bcd"], dtype=torch.uint8)], [torch.tensor([0, 3, 4, 5], dtype=torch.int32)]
    assert batch["tags"].values[:3].tolist() == farm_hashes(*words)[0].tolist()
    assert batch["tags"].weights[:3].tolist() == [0.5, 1.0, 2.0]
    assert batch["tags"].offsets.tolist() == [0, 2, 2, 3]
    named = Csv(list_separator="|", weight_separator={"tags": ":"})
    table = pq.read_table(convert(tmp_path / "a.csv", tmp_path / "out", format=named)[0])
    assert table["tags"].to_pylist()[0] == [{"k": "a:b", "v": 0.5}, {"k": "c", "v": 1.0}]


def test_a_weighted_column_without_a_separator(tmp_path):
    (tmp_path / "a.csv").write_text("tags\n1:2\n")
    columns = [varlen("tags", torch.int64, weighted=True)]
    with pytest.raises(ValueError, match=r"column 'tags' without a separator of weights. Give Csv\(weight_separator="):
        list(reader(tmp_path / "a.csv", columns, 1))
    assert all_rows(reader(tmp_path / "a.csv", columns, 1, format=Csv(weight_separator=":"))) == [{"tags": [(1, 2.0)]}]


def test_nulls_in_every_column_but_not_within_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('x,s,l\nNULL,NULL,\\N\n2,"NULL",a|NULL\n,"",\n')
    how = Csv(nulls=("\\N", "NULL"), list_separator={"l": "|"})
    (path,) = convert(tmp_path / "a.csv", tmp_path / "out", format=how)
    assert pq.read_table(path).to_pylist() == [
        {"x": None, "s": None, "l": []}, {"x": 2, "s": "NULL", "l": ["a", None]}, {"x": None, "s": "", "l": []},
    ]  # fmt: skip
    assert all_rows(reader(tmp_path / "a.csv", [fixedlen("x", [0.5])], 3, format=how))[0] == {"x": [0.5]}


@pytest.mark.parametrize("argument", ["list_separator", "weight_separator"])
def test_separators_of_columns_that_are_in_no_file(tmp_path, argument):
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("x,tags\n1,2|3\n")
    columns = [varlen("x", torch.int64)]
    some = Csv(**{argument: {"tags": "|"}})  # as only one of them has it
    assert len(all_rows(reader(tmp_path, columns, 2, format=some))) == 2
    assert len(convert(tmp_path, tmp_path / "out", format=some)) == 2
    wrong = Csv(**{argument: {"tags": "|", "tgas": "|"}})
    match = rf"{argument}: got column 'tgas', which is not in '.*b.csv' or the 1 other files, expected some of \['x'"
    with pytest.raises(ValueError, match=match):
        reader(tmp_path, columns, 2, format=wrong)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path, tmp_path / "out2", format=wrong)
    with pytest.raises(ValueError, match=match):
        describe(match_files(tmp_path), format=wrong)


def test_lines_before_the_names(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"# made by hand\r\n\r\nx,y\r\n1,2\r\n")
    columns = [varlen("y", torch.int64)]
    assert all_rows(reader(tmp_path, columns, 1, format=Csv(skip_lines=2))) == [{"y": [2]}]
    named = Csv(skip_lines=3, column_names=("a", "y"))
    assert all_rows(reader(tmp_path, columns, 1, format=named)) == [{"y": [2]}]


def test_a_byte_order_mark_where_names_are_given(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"a,1\n2,3\n')
    it = iter(reader(tmp_path, [varlen("y", torch.int64)], 1, format=Csv(column_names=("x", "y")), on_bad="skip"))
    assert (all_rows(it), it.num_bad) == ([{"y": [3]}], 1)


def test_equal_options_are_equal_everywhere():
    one, two = (
        Csv(list_separator=dict(pairs), nulls=["a"]) for pairs in itertools.permutations([("b", "|"), ("a", ";")])
    )
    assert one == two == pickle.loads(pickle.dumps(one)) == dataclasses.replace(one, block_bytes=one.block_bytes)
    assert hash(one) == hash(two)
    assert repr(one) == repr(two)
    assert identity_of(one, "format") == identity_of(two, "format")
    others = [
        Csv(),
        Csv(quote=None),
        Csv(nulls=("a",)),
        Csv(skip_lines=1),
        Csv(weight_separator=":"),
        Csv(delimiter="::"),
    ]
    assert len({identity_of(how, "format") for how in [one, *others]}) == 7


def test_positions_of_the_first_version_are_still_of_the_same_text():
    old = "Csv(delimiter=',', column_names=('x',), list_separator='|', block_bytes=9)"
    assert repr(Csv(column_names=("x",), list_separator="|", block_bytes=9)) == old
    assert repr(Csv(column_names=("x",), list_separator="|", block_bytes=9, quote=None)) == old[:-1] + ", quote=None)"
    assert "delimiter='::'" in repr(Csv(delimiter="::"))


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"delimiter": 'a"'}, ValueError, "delimiter: got .*, expected characters without quotes and line ends"),
        ({"quote": ""}, ValueError, "quote: got '', expected one ASCII character, or None"),
        ({"quote": "«"}, ValueError, "quote: got '«', expected one ASCII character"),
        ({"list_separator": {"a": ""}}, ValueError, "list_separator: got '', expected characters"),
        ({"list_separator": {"a": 1}}, TypeError, "list_separator: got 1, expected str"),
        (
            {"list_separator": ["|"]},
            TypeError,
            "list_separator: got a list of str, expected .*Give a string, or a dict",
        ),
        ({"list_separator": "|", "weight_separator": {"a": "|"}}, ValueError, r"weight_separator: got '\|'"),
        ({"nulls": "NULL"}, TypeError, "nulls: got 'NULL', expected a tuple of strings"),
        ({"column_names": "a,b"}, TypeError, "column_names: got 'a,b', expected a tuple of strings"),
        ({"skip_lines": -1}, ValueError, "skip_lines: got -1"),
    ],
)
def test_options_that_cannot_be(wrong, error, match):
    with pytest.raises(error, match=match):
        Csv(**wrong)


def test_the_slow_way_is_found_once(tmp_path, monkeypatch):
    """Ids above 2**63 - 1 are in every block: from the second on they are not tried in the fast way."""
    (tmp_path / "a.csv").write_text("x\n" + "18446744073709551615\n" * 20)
    (file,) = match_files(tmp_path)
    source = OpenCsv(file, Csv(block_bytes=42), {"x": pa.int64()})
    parsed = []
    parse = source._parse
    monkeypatch.setattr(source, "_parse", lambda unit, types: parsed.append(unit) or parse(unit, types))
    assert [value for unit in range(source.num_units) for value in source.read(unit, ["x"]).batch["x"].to_pylist()] == [
        -1
    ] * 20
    assert len(parsed) == source.num_units + 1


@pytest.mark.parametrize("delimiter", ["\t", " ", "\t\t"])
@pytest.mark.parametrize("block_bytes", [1, 1000])
def test_rows_of_missing_values_alone_are_rows(tmp_path, delimiter, block_bytes):
    """Also where the delimiter is blank; a blank line is none."""
    (tmp_path / "a.csv").write_text(f"x{delimiter}y\n{delimiter}\n\n{delimiter}\r\n")
    how = Csv(delimiter=delimiter, block_bytes=block_bytes)
    assert all_rows(reader(tmp_path / "a.csv", COLUMNS_XY, 1, format=how)) == [{"x": [], "y": []}] * 2


@pytest.mark.filterwarnings("ignore:recfx. got no batch in a pass")  # every row is bad, or in the other part
@given(
    st.sampled_from(WAYS).map(lambda way: Csv(**way)),
    st.lists(
        st.tuples(st.text("a:|¦\",'é \t\0", min_size=1, max_size=5), st.text("7 'é|:", min_size=1, max_size=4)),
        min_size=1,
    ),
    st.sampled_from([1, 9, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(tmp_path_factory, how, rows, block_bytes):
    d, q = how.delimiter, how.quote
    if q is None:
        rows = [tuple(text.replace(d[0], "a") for text in row) for row in rows]
        lines = [d.join(row) for row in rows]
    else:
        lines = [d.join(f"{q}{text.replace(q, q * 2)}{q}" for text in row) for row in rows]
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes("\n".join([f"x{d}y", *lines]).encode())
    columns = [varlen(name, torch.uint8) for name in "xy"]
    batches = reader(path, columns, 4, drop_remainder=False, format=dataclasses.replace(how, block_bytes=block_bytes))
    assert [(row["x"][0], row["y"][0]) for row in all_rows(batches)] == [(x.encode(), y.encode()) for x, y in rows]


@pytest.mark.parametrize("block_bytes", [1, 16 << 20])
@pytest.mark.parametrize("delimiter", [",", "::", "\u00a7"])
def test_rows_of_too_many_cells_where_text_is_not_utf8(tmp_path, delimiter, block_bytes, capfd):
    rows = [
        [b"ab", b"1"],
        [b"\xff\xe9d", b"2", b"3"],
        [b"\xc3\xa9", b"4"],
        [b"-\xff-", b"5"],
        [b"\xe9", b""],
        [b"", b"7"],
    ]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join(delimiter.encode().join(row) for row in [[b"t", b"x"], *rows]))
    how = Csv(delimiter=delimiter, nulls=("\u00e9",), block_bytes=block_bytes)
    columns = [varlen("t", torch.uint8), varlen("x", torch.int64)]
    it = iter(reader(path, columns, 10, on_bad="skip", format=how))
    (batch,) = it
    t, x = batch["t"], batch["x"]
    strings = [bytes(t.values[a:b].tolist()) for a, b in itertools.pairwise(t.offsets.tolist())]
    assert strings[:4] == [
        b"ab",
        b"-\xff-",
        b"\xe9",
        b"",
    ]  # and of the null, none
    assert t.outer[0].tolist()[:6] == [0, 1, 1, 2, 3, 3]
    assert x.values.tolist()[:4] == [1, 4, 5, 7]
    assert it.num_bad == 1
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=r"file '.*a.csv', row 1: got 3 cells, expected 2, one for each column"):
        list(reader(path, columns, 10, format=how))
