"""Where files are and what they are: paths, filesystems, CSV in its ways, damage that is easy to see."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import torch
from pyarrow import fs

from recfx.data import Csv, decode, fixedlen, hashed, reader, varlen
from recfx.data.files import match_files
from recfx.data.text.csv import OpenCsv
from recfx.kernels.lists.string_hash import farm_hashes
from tests.data.rows import FORMATS, all_rows, write

COLUMNS = [fixedlen("label", [0.5]), varlen("x", torch.float32), varlen("c", torch.int64), varlen("word", torch.uint8)]
ROWS = [
    {
        "label": [float(i % 2)],
        "x": [] if i % 4 == 1 else [i + 0.5],
        "c": [] if i % 3 == 1 else [2**53 + i],
        "word": [] if i % 5 == 1 else [f"wörd,{i}".encode()],
    }
    for i in range(40)
]


def flat_table() -> pa.Table:
    columns = {name: [row[name][0] if row[name] else None for row in ROWS] for name in ROWS[0]}
    return pa.table({**columns, "word": [word and word.decode() for word in columns["word"]]})


@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
@pytest.mark.parametrize("threads", [1, 2])
def test_flat_columns_with_missing_values(tmp_path, extension, threads):
    write(tmp_path / f"a.{extension}", flat_table(), 7)
    columns = [varlen(c.name, c.dtype, null="empty") if c.name != "label" else c for c in COLUMNS]
    assert all_rows(reader(tmp_path, columns, 9, drop_remainder=False, threads=threads)) == ROWS


@pytest.mark.parametrize("block_bytes", [1, 2, 13, 64, 1000, 10_000])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_csv_in_blocks_of_any_size(tmp_path, block_bytes, ending, last):
    """Each row is in one block, whatever falls on the border."""
    rows = ROWS[:20]  # two batches and a short one
    text = write(tmp_path / "a.csv", flat_table().slice(0, len(rows)))
    lines = Path(text).read_bytes().decode().splitlines()
    Path(text).write_bytes((ending.join(lines) + ending * last).encode())
    batches = reader(tmp_path, COLUMNS, 9, drop_remainder=False, format=Csv(block_bytes=block_bytes))
    assert all_rows(batches) == rows
    it = batches.start_at(_position_after(batches, 2))
    assert all_rows(it) == rows[18:]


def _position_after(batches, num: int) -> dict:
    it = iter(batches)
    for _ in range(num):
        next(it)
    return it.position


def test_csv_without_a_header_with_tabs_and_lists_compressed(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"1\t3|4|\t\n0\t\tb|a\n"))
    how = Csv(delimiter="\t", column_names=("label", "ids", "words"), list_separator="|")
    columns = [fixedlen("label", [0.5]), hashed("words", farm_hashes)]
    with pytest.raises(ValueError, match=r"column 'ids' of '.*a.tsv.gz', row 0: got '', expected list<.*int64>"):
        list(reader(tmp_path, [varlen("ids", torch.int64)], 2, format=how))
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"1\t3|4\t\n0\t\tabc|\n"))
    (batch,) = reader(tmp_path, [*columns, varlen("ids", torch.int64)], 2, format=how)
    assert batch["label"].tolist() == [[1], [0]]
    assert batch["ids"].offsets.tolist() == [0, 2, 2]
    assert batch["ids"].values[:2].tolist() == [3, 4]
    assert batch["words"].values[:2].tolist() == [2640714258260161385, -7286425919675154353]


CSV_FAULTS = {
    "3,x,5": "column 'x' of '.*a.csv', row 3: got 'x', expected double",
    "3,1.5,5.5": "column 'c' of '.*a.csv', row 3: got '5.5', expected int64",
    "3,1.5": "file '.*a.csv', row 3: got 2 cells, expected 3",
    "3,1.5,5,6": "file '.*a.csv', row 3: got 4 cells, expected 3",
    "3,nan,5": "column 'x' of '.*a.csv', row 3: got nan, expected a finite number",
    "3,1.5,99999999999999999999": "column 'c' of '.*a.csv', row 3: got '99999999999999999999', expected int64",
}


@pytest.mark.parametrize("line", CSV_FAULTS)
@pytest.mark.parametrize("block_bytes", [1, 20, 1000])
def test_a_bad_line_of_csv_is_named_or_skipped(tmp_path, line, block_bytes):
    lines = ["label,x,c", *(f"{i},{i}.5,{i}" for i in range(6))]
    lines[4] = line
    (tmp_path / "a.csv").write_text("\n".join(lines))
    columns, how = COLUMNS[:3], Csv(block_bytes=block_bytes)
    with pytest.raises(ValueError, match=CSV_FAULTS[line]):
        list(reader(tmp_path, columns, 2, format=how))
    it = iter(reader(tmp_path, columns, 10, format=how, on_bad="skip", drop_remainder=False))
    assert [row["label"] for row in all_rows(it)] == [[i] for i in (0, 1, 2, 4, 5)]
    assert it.num_bad == 1


def test_csv_that_lacks_a_column(tmp_path):
    (tmp_path / "a.csv").write_text("label,c\n1,2\n")
    with pytest.raises(
        ValueError, match=r"column 'x' of '.*a.csv': got no such column, expected one of \['label', 'c'\]"
    ):
        list(reader(tmp_path, COLUMNS[:2]))


def test_csv_of_a_header_alone(tmp_path):
    (tmp_path / "a.csv").write_text("label,x,c\n")
    with pytest.warns(UserWarning, match=r"got no batch in a pass over the data, but 0 rows in .*\. Give more rows\."):
        assert list(reader(tmp_path, COLUMNS[:3])) == []


def test_types_of_other_csv_columns_are_guessed(tmp_path):
    (tmp_path / "a.csv").write_text("label,day,city\n1,3,x\n0,4,y\n")
    batches = reader(tmp_path, COLUMNS[:1], 1, filter=[("day", ">", 3), ("city", "==", "y")])
    assert all_rows(batches) == [{"label": [0.0]}]
    (file,) = match_files(tmp_path)
    assert OpenCsv(file, Csv(), {}).schema.types == [pa.int64(), pa.int64(), pa.string()]


def test_a_format_found_by_its_first_bytes(tmp_path):
    for extension in FORMATS:
        Path(write(tmp_path / f"a.{extension}", flat_table())).rename(tmp_path / f"part_{extension}")
    columns = [varlen("c", torch.int64, null="empty")]
    assert len(all_rows(reader(tmp_path, columns, 10))) == 120
    (tmp_path / "part").write_text("hello\n1")
    with pytest.raises(
        ValueError, match=r"file '.*part': got an unknown format, expected ORC, Parquet, Arrow, CSV, JSON lines or"
    ):
        list(reader(tmp_path / "part", columns))
    assert len(all_rows(reader(tmp_path / "part", [varlen("hello", torch.int64)], 1, format=Csv()))) == 1


@pytest.fixture
def lake() -> Iterator[fs.FileSystem]:
    """A filesystem that is not local."""
    memory = fsspec.filesystem("memory")
    yield fs.PyFileSystem(fs.FSSpecHandler(memory))
    memory.rm("/lake", recursive=True)


@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
def test_files_of_another_filesystem(tmp_path, lake, extension):
    for name in (f"day=1/a.{extension}", f"day=2/b.{extension}"):
        content = Path(write(tmp_path / name, flat_table(), 7)).read_bytes()
        lake.create_dir(f"/lake/{Path(name).parent}")
        with lake.open_output_stream(f"/lake/{name}") as stream:
            stream.write(content)
    columns = [varlen("c", torch.int64, null="empty")]
    expected = [{"c": row["c"]} for row in ROWS] * 2
    for paths in (f"/lake/*/*.{extension}", [f"/lake/day=1/a.{extension}", "/lake/day=2"], f"/lake/**/*.{extension}"):
        assert all_rows(reader(paths, columns, 10, filesystem=lake)) == expected
    with pytest.raises(ValueError, match="paths: got '/lake/day=3', which matches no file"):
        reader("/lake/day=3", columns, filesystem=lake)


def test_paths_that_are_uris(tmp_path):
    write(tmp_path / "a b.orc", flat_table())
    columns = [varlen("c", torch.int64, null="empty")]
    assert len(all_rows(reader(f"file://{tmp_path}", columns, 10))) == 40
    with pytest.raises(ValueError, match="paths: got 'nowhere://x', expected a URI that pyarrow knows"):
        reader("nowhere://x", columns)


def test_globs(tmp_path):
    for name in ("a.orc", "b.orc", "c/d.orc", "c/e/f.orc", ".hidden.orc", "_tmp.orc", "c.orc/inside.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [str(Path(file.path).relative_to(tmp_path)) for file in match_files(f"{tmp_path}/{pattern}")]

    assert names("*.orc") == ["_tmp.orc", "a.orc", "b.orc"]
    assert names("[ab].orc") == names("?.orc") == ["a.orc", "b.orc"]
    assert names("**/*.orc") == ["_tmp.orc", "a.orc", "b.orc", "c/d.orc", "c/e/f.orc"]
    assert names("c/*/f.orc") == names("*/e/*") == ["c/e/f.orc"]
    assert names("") == ["a.orc", "b.orc"]


def test_a_relative_path(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.orc", flat_table())
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in match_files("data")] == [file.path for file in match_files("data/*.orc")]
    assert len(list(reader("data/*", [varlen("c", torch.int64, null="empty")], 10))) == 4


@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
def test_a_file_of_no_bytes_and_a_file_that_went(tmp_path, extension):
    path = Path(write(tmp_path / f"a.{extension}", flat_table(), 7))
    columns = [varlen("c", torch.int64, null="empty")]
    it = iter(reader(path, columns, 2, prefetch=0, format=Csv(block_bytes=60) if extension == "csv" else None))
    next(it)
    path.unlink()
    with pytest.raises(ValueError, match=f"file '{path}': got .*, expected"):
        list(it)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"file '{path}': got 0 bytes"):
        list(reader(path, columns))


@pytest.mark.parametrize("extension", [*FORMATS, "csv"])
@pytest.mark.parametrize("change", ["rows", "time"])
def test_a_file_that_changed_while_it_was_read(tmp_path, extension, change):
    path = Path(write(tmp_path / f"a.{extension}", flat_table(), 7))
    columns = [varlen("c", torch.int64, null="empty")]
    how = Csv(block_bytes=60) if extension == "csv" else None
    it = iter(reader(path, columns, 2, prefetch=0, format=how))
    next(it)
    if change == "rows":
        write(path, flat_table().slice(0, 12), 7)
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(
        ValueError, match=f"file '{path}': got .* bytes, written at .*, expected .*It was changed while"
    ):
        list(it)
    assert len(all_rows(reader(path, columns, 2, format=how))) == (12 if change == "rows" else 40)


@pytest.mark.parametrize("extension", FORMATS)
def test_footers_of_many_files_are_not_kept(tmp_path, extension):
    for i in range(decode.MAX_OPENED + 2):
        write(tmp_path / f"{i}.{extension}", flat_table(), 7)
    batches = reader(tmp_path, [varlen("c", torch.int64, null="empty")], 10)
    assert len(all_rows(batches)) == 40 * (decode.MAX_OPENED + 2)
    assert len(batches.plan.decoder._opened) <= decode.MAX_OPENED
    assert len(all_rows(pickle.loads(pickle.dumps(batches)))) == 40 * (decode.MAX_OPENED + 2)


def test_names_of_columns_that_are_not_utf8(tmp_path):
    """Of fields too. They are in errors and batches."""
    for table in (flat_table(), pa.table({"c": [1], "user": pa.array([[{"wordy": 2}]])})):
        path = Path(write(tmp_path / "a.arrow", table))
        path.write_bytes(path.read_bytes().replace(b"word", b"w\xff\xfed"))
        with pytest.raises(
            ValueError, match=r"file '.*a.arrow': got .*codec can't decode.*, expected a readable Arrow file"
        ):
            list(reader(path, [varlen("c", torch.int64)], 1))
