"""What people do with a reader that nobody planned: odd types, odd arguments, loops that end early."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv as pa_csv
from pyarrow import fs
from pyarrow import parquet as pq
from torch.utils.data import DataLoader

from recfx.data import Csv, Reader, reader, varlen
from recfx.data.convert import convert
from recfx.data.describe import describe
from recfx.data.files import match_files
from recfx.data.text.csv_lines import without_unclosed
from recfx.types import Batch
from tests.data.rows import all_rows, write

X = [varlen("x", torch.int64, null="empty")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """30 rows in 3 files of 3 units each."""
    for i in range(3):
        write(tmp_path / "data" / f"{i}.parquet", pa.table({"x": [[10 * i + j] for j in range(10)]}), 4)
    return tmp_path / "data"


def ids_of(batches) -> list[int]:
    return [row["x"][0] for row in all_rows(batches)]


def read(folder: Path, **kwargs) -> Reader:
    return reader(folder, X, 3, **{"drop_remainder": False, **kwargs})


def num_threads() -> int:
    return sum(thread.name.startswith("recfx-read") for thread in threading.enumerate())


VIEWS = [pa.list_view(pa.int64()), pa.large_list_view(pa.int64()), pa.large_list(pa.int64())]


@pytest.mark.parametrize("kind", [*VIEWS, pa.list_(pa.int32()), pa.list_(pa.uint8())])
def test_lists_in_every_way_of_arrow(tmp_path, kind):
    path = write(tmp_path / "a.arrow", pa.table({"x": pa.array([[1], [2, 3], None, [], [4]], kind)}))
    assert [row["x"] for row in all_rows(read(path))] == [[1], [2, 3], [], [], [4]]
    (facts,) = describe(match_files(path)).columns
    assert (facts.mean_length, facts.max_length, facts.num_distinct) == (0.8, 2, 4)


@pytest.mark.parametrize("kind", VIEWS)
def test_lists_of_lists_in_every_way_of_arrow(tmp_path, kind):
    lists = pa.array([[[1], [2, 3]], [], [[], [4]]], pa.list_(kind))
    path = write(tmp_path / "a.arrow", pa.table({"x": lists}))
    assert [row["x"] for row in all_rows(reader(path, [varlen("x", torch.int64, depth=2)], 3))] == lists.to_pylist()


def test_a_null_in_a_dictionary_is_a_null(tmp_path):
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["a", None]))
    path = write(tmp_path / "a.arrow", pa.table({"x": words}))
    with pytest.raises(ValueError, match=r"column 'x' of '.*a.arrow', row 1: got null, expected a value"):
        list(reader(path, [varlen("x", torch.uint8)], 1))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39])
def test_weights_are_finite(tmp_path, weight):
    kind = pa.list_(pa.struct([("k", pa.int64()), ("v", pa.float64())]))
    rows = [[{"k": 1, "v": 0.5}], [{"k": 2, "v": weight}]]
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array(rows, kind)}))
    columns = [varlen("x", torch.int64, weighted=True)]
    with pytest.raises(
        ValueError, match=r"column 'x' of '.*a.parquet', row 1: got (nan|inf|1e\+39, which is inf in float32), expected"
    ):
        list(reader(path, columns, 1))
    assert all_rows(reader(path, columns, 1, on_bad="skip")) == [{"x": [(1, 0.5)]}]


@pytest.mark.parametrize("extension", ["orc", "parquet", "arrow"])
def test_two_columns_of_one_name(tmp_path, extension):
    table = pa.table([pa.array([[1]]), pa.array([[2]]), pa.array([[3]])], names=["x", "x", "y"])
    path = write(tmp_path / f"a.{extension}", table)
    with pytest.raises(ValueError, match=f"column 'x' of '{path}': got 2 columns of this name, expected one"):
        list(read(path))
    with pytest.raises(ValueError, match=f"column 'x' of '{path}': got 2 columns of this name, expected one"):
        convert(path, tmp_path / "out")
    (kept,) = convert(path, tmp_path / "out", columns=["y", "y"])
    assert pq.read_table(kept).to_pydict() == {"y": [[3]]}


def test_what_arrow_cannot_convert_names_the_file(tmp_path):
    path = tmp_path / "a.arrow"
    words = pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int8()), pa.array(["a"]), safe=False)
    with pa.ipc.new_file(str(path), pa.schema([("x", words.type)])) as writer:
        writer.write_table(pa.table({"x": words}))
    with pytest.raises(ValueError, match=f"file '{path}': got .* in record batch 0, expected"):
        list(reader(path, [varlen("x", torch.uint8)], 1))


UNCLOSED = ['4,"a', '4,5" "b,"c', '4,x",y,"c', '"4,a', '4,"a""', '4,"', '"4"x,"a']


@pytest.mark.parametrize("line", UNCLOSED)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("block_bytes", [1, 7, 1000])
def test_a_quote_that_is_not_closed_is_a_bad_row(tmp_path, line, ending, block_bytes):
    """The lines around it are still read as rows, in whatever block they are."""
    lines = ["x,s", "0,a", "", '1,"b, ""c"""', "2,d", line, '3,5" e', "7,f,g", line]
    (tmp_path / "a.csv").write_bytes(ending.join(lines).encode())
    columns, how = [*X, varlen("s", torch.uint8)], Csv(block_bytes=block_bytes)
    with pytest.raises(
        ValueError, match=r"file '.*a.csv', row 3: got a quote that is not closed, '.*', expected a whole"
    ):
        list(reader(tmp_path, columns, 1, format=how))
    it = iter(reader(tmp_path, columns, 1, format=how, on_bad="skip"))
    assert [(*row["x"], *row["s"]) for row in all_rows(it)] == [(0, b"a"), (1, b'b, "c"'), (2, b"d"), (3, b'5" e')]
    assert it.num_bad == 3


def test_a_file_of_unclosed_quotes_alone(tmp_path):
    (tmp_path / "a.csv").write_text('x\n"1\n"2\n')
    it = iter(read(tmp_path / "a.csv", on_bad="skip"))
    with pytest.warns(UserWarning, match="got no batch .* 0 rows .* 2 bad ones skipped"):
        assert (list(it), it.num_bad) == ([], 2)
    assert describe(match_files(tmp_path / "a.csv")).num_rows == 2


@given(st.lists(st.text('a,"', min_size=1, max_size=9), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_lines_that_close_their_quotes_are_what_pyarrow_ends_there(lines):
    """Each before a line of another width, which pyarrow reads as a row unless a quote is still open."""

    def ends(line: str) -> bool:
        names = [f"{i}" for i in range(12)]
        how = {
            "read_options": pa_csv.ReadOptions(column_names=names),
            "parse_options": pa_csv.ParseOptions(invalid_row_handler=lambda row: "skip"),
        }
        try:
            return pa_csv.read_csv(pa.BufferReader(f"{line}\n{','.join(names)}\n".encode()), **how).num_rows == 1
        except pa.ArrowInvalid:
            return False

    kept, bad = without_unclosed("\n".join(lines).encode(), b",", ",", '"')
    assert [row.number for row in bad] == [i for i, line in enumerate(lines) if not ends(line)]
    assert kept.decode().splitlines() == [line for line in lines if ends(line)]


def test_quotes_within_cells(tmp_path):
    (tmp_path / "a.csv").write_text('x,s\n1,5" nail\n2,"a ""b"", c"\n3,"x,"""\n')
    rows = all_rows(reader(tmp_path / "a.csv", [varlen("s", torch.uint8)], 3))
    assert [row["s"] for row in rows] == [[b'5" nail'], [b'a "b", c'], [b'x,"']]


@pytest.mark.parametrize("wrong", [{"delimiter": ""}, {"delimiter": "\n"}, {"list_separator": ""}, {"block_bytes": 0}])
def test_csv_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        Csv(**wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batch_size": 2.0}, TypeError, "batch_size: got 2.0, expected an int"),
        ({"threads": None}, TypeError, "threads: got None, expected an int"),
        ({"columns": ["x"]}, TypeError, "columns: got 'x' among them"),
        ({"format": "xml"}, ValueError, r"format: got 'xml', expected one of .* or Libsvm"),
        ({"filter": "x > 3"}, ValueError, r"filter: got 'x > 3' \(.*\), expected an expression"),
        ({"filter": ("x", ">", 3)}, ValueError, "filter: got .*, expected an expression"),
        ({"filter": [("x", "!", 3)]}, ValueError, "filter: got .* not a valid operator"),
        ({"paths": None}, TypeError, "paths: got None, expected strings or paths"),
        ({"paths": [3]}, TypeError, "paths: got .*, expected strings or paths"),
    ],
)
def test_arguments_of_other_types(folder, arguments, error, match):
    with pytest.raises(error, match=match):
        reader(**{"paths": folder, "columns": X, **arguments})


def test_a_cache_where_no_folder_can_be(folder):
    with pytest.raises(ValueError, match=r"cache: got '.*0.parquet' .*, expected a folder to write to"):
        read(folder, cache=folder / "0.parquet")


def test_one_file_by_several_names(folder, tmp_path, monkeypatch):
    path = folder / "0.parquet"
    assert ids_of(read([path, f"{folder}//0.parquet", f"{folder}/./0.parquet", f"{folder}/0*"])) == list(range(10))
    monkeypatch.chdir(tmp_path)
    assert ids_of(read("./data/0.parquet,data/*0.parquet")) == list(range(10))


def test_equal_paths_of_two_filesystems_are_two_files(folder):
    shutil.copytree(folder, folder.parent / "other")
    subtrees = [fs.SubTreeFileSystem(str(folder.parent / name), fs.LocalFileSystem()) for name in ("data", "other")]
    one, same, other = (match_files("0.parquet", tree)[0] for tree in (subtrees[0], subtrees[0], subtrees[1]))
    assert one == same
    assert one != other
    assert ids_of(read("*.parquet", filesystem=subtrees[1])) == list(range(30))


@pytest.mark.parametrize("kwargs", [{}, {"shuffle_rows": 5}])
def test_a_loop_that_ends_early_leaves_no_thread(folder, kwargs):
    for batch in read(folder, threads=2, prefetch=2, **kwargs):
        assert batch["x"].num_samples == 3
        break
    gc.collect()
    assert num_threads() == 0


def test_nothing_comes_after_close(folder):
    it = iter(read(folder))
    next(it)
    it.close()
    assert list(it) == []
    position = it.position
    it.load_state_dict(position)
    assert ids_of(it) == list(range(3, 30))


def test_an_error_in_the_transform_ends_the_iteration(folder):
    """Its batch was not returned, so resuming after it would lose rows; the position is still before it."""
    seen = []

    def transform(columns):
        if len(seen) == 2:
            raise RuntimeError("not today")
        return columns

    it = iter(read(folder, threads=2, transform=transform))
    seen += [next(it), next(it)]
    with pytest.raises(RuntimeError, match="not today"):
        next(it)
    assert num_threads() == 0
    assert list(it) == []
    assert ids_of(read(folder).start_at(it.position)) == list(range(6, 30))


@pytest.mark.parametrize(
    ("transform", "error", "match"),
    [
        (lambda columns: None, TypeError, "transform: got NoneType, expected a dict of tensors"),
        (lambda columns: {"y": np.zeros((3, 1))}, TypeError, "column 'y': got ndarray"),
        (lambda columns: {"y": torch.zeros(2, 1)}, ValueError, "transform: got 2 samples in 'y', expected 3"),
        (
            lambda columns: {**columns, "y": torch.zeros(9, 1)},
            ValueError,
            "transform: got 9 samples in 'y', expected 3",
        ),
    ],
)
def test_transforms_that_return_something_else(folder, transform, error, match):
    with pytest.raises(error, match=match):
        next(iter(read(folder, transform=transform)))


@pytest.mark.parametrize("change", [{"taken": 1.5}, {"epoch": "0"}, {"file": None}])
def test_positions_of_other_types(folder, change):
    position = iter(read(folder)).position
    for wrong in (None, [1], {**position, **change}):
        with pytest.raises(ValueError, match=r"position: got .*, expected a .BatchIterator.position."):
            read(folder).start_at(wrong)


def test_a_position_does_not_depend_on_what_does_not_change_the_order(folder, tmp_path):
    whole = ids_of(read(folder, shuffle_rows=7))
    it = iter(read(folder, shuffle_rows=7))
    position = json.loads(json.dumps([next(it), next(it), it.position][-1]))
    shutil.copytree(folder, tmp_path / "moved")
    for other in (
        reader(folder, X, 5, drop_remainder=False, shuffle_rows=7),
        read(folder, shuffle_rows=7, threads=3, prefetch=0),
        read(folder, shuffle_rows=7, cache=tmp_path / "cache"),
        read(tmp_path / "moved", shuffle_rows=7),
    ):
        assert ids_of(other.start_at(position)) == whole[6:]
    write(folder / "3.parquet", pa.table({"x": [[30]]}))
    with pytest.raises(ValueError, match="Resuming needs the same data, seed"):
        read(folder, shuffle_rows=7).start_at(position)


def as_it_is(batch: Batch) -> Batch:
    return batch


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers_of_a_reader_that_was_used_before(folder, tmp_path, context):
    """With threads, a cache and open footers in the parent."""
    batches = read(folder, threads=2, shuffle_rows=9, cache=tmp_path / "cache")
    assert sorted(ids_of(batches)) == list(range(30))
    loader = DataLoader(batches, batch_size=None, collate_fn=as_it_is, num_workers=2, multiprocessing_context=context)
    for _ in range(2):
        assert sorted(ids_of(loader)) == list(range(30))


def test_a_data_loader_without_collate_fn_gives_dicts(folder):
    first = next(iter(DataLoader(read(folder), batch_size=None)))
    assert first["x"].values.tolist() == [0, 1, 2]
    assert first["num_samples"].item() == 3


def test_one_reader_in_many_threads(folder):
    batches, results = read(folder, shuffle_rows=5, threads=2), []
    threads = [threading.Thread(target=lambda: results.append(ids_of(batches))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ids_of(batches)] * 4


INTERRUPTED = """
import signal
import torch
from recfx.data import reader, varlen

signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have had it ignored
batches = reader({paths!r}, [varlen("x", torch.int64)], 3, epochs=None, threads=2, prefetch=2, shuffle_rows={rows})
for i, _ in enumerate(batches):
    if i == 10:
        print("reading", flush=True)
"""


@pytest.mark.parametrize("rows", [0, 7])
def test_ctrl_c_ends_a_program_at_once(folder, rows):
    code = INTERRUPTED.format(paths=str(folder), rows=rows)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"reading\n"
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == b"KeyboardInterrupt"


def test_a_footer_is_read_once_per_file(folder, monkeypatch):
    opened, parquet_file = [], pq.ParquetFile

    def counting(*args, metadata=None, **kwargs):
        opened.append(metadata is None)
        return parquet_file(*args, metadata=metadata, **kwargs)

    monkeypatch.setattr(pq, "ParquetFile", counting)
    assert ids_of(read(folder, epochs=2)) == [*range(30)] * 2
    assert sum(opened) == 3
    assert len(opened) == 3 + 2 * 9
