import gc
import itertools
import json
import os
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import orc

from recfx.data import Between, OneOf, Split, fixedlen, reader, varlen
from recfx.types import NUM_SAMPLES, Ragged

FLAT = [fixedlen("label", [0.5])]
COLUMNS = [fixedlen("label", [0.5]), varlen("x", torch.float32), varlen("c", torch.int64)]
TYPES = {"label": pa.list_(pa.float64()), "x": pa.list_(pa.float64()), "c": pa.list_(pa.int64())}
BIG = 2**53 + 1


def row_of(i: int) -> dict:
    return {"label": [float(i)] if i % 5 else [], "x": [i + 0.25] * (i % 3), "c": [BIG + i, -i][: (i + 1) % 3]}


def write(path: Path, rows: list[dict], types: dict = TYPES, stripe_rows: int | None = None) -> str:
    table = pa.table({name: pa.array([r[name] for r in rows], type=t) for name, t in types.items()})
    with orc.ORCWriter(str(path), stripe_size=1 if stripe_rows else 64 << 20, batch_size=stripe_rows or 1024) as writer:
        for start in range(0, max(len(rows), 1), stripe_rows or max(len(rows), 1)):
            writer.write(table.slice(start, stripe_rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """53 rows in 4 files, one of them empty, one of several stripes."""
    for name, (first, last) in {"a": (0, 7), "b": (7, 7), "c": (7, 40), "d": (40, 53)}.items():
        write(tmp_path / f"{name}.orc", [row_of(i) for i in range(first, last)], stripe_rows=8 if name == "c" else None)
    (tmp_path / "_SUCCESS").touch()
    return tmp_path


def lists_of(column: Ragged) -> list[list]:
    ends = column.offsets.tolist()
    return [column.values[a:b].tolist() for a, b in itertools.pairwise(ends)]


def rows_of(batch) -> list[tuple]:
    n = batch[NUM_SAMPLES].item()
    return list(zip(batch["label"].tolist(), lists_of(batch["x"]), lists_of(batch["c"]), strict=True))[:n]


def all_rows(batches) -> list[tuple]:
    return [row for batch in batches for row in rows_of(batch)]


def expected_rows(indices) -> list[tuple]:
    return [(r["label"] or [0.5], r["x"], r["c"]) for r in map(row_of, indices)]


def num_threads() -> int:
    return sum(t.name.startswith("recfx-read") for t in threading.enumerate())


def test_stripes_of_the_fixture(folder):
    assert orc.ORCFile(folder / "c.orc").nstripes > 1
    assert orc.ORCFile(folder / "b.orc").nrows == 0


def test_the_first_batch(folder):
    batches = reader(folder, COLUMNS, 6, epochs=None)
    assert torch.equal(batches.first().buffer, next(iter(batches)).buffer)
    assert not num_threads()


@pytest.mark.parametrize("epochs", [1, 2, None])
def test_no_first_batch_is_an_error_that_counts_rows(folder, epochs):
    named = r"'.*a.orc', '.*b.orc', '.*c.orc' and 1 more"
    with pytest.raises(
        ValueError, match=rf"reader: got 53 rows in {named} \(batch_size=54, drop_remainder=True\), exp"
    ):
        reader(folder, COLUMNS, 54, epochs=epochs, drop_remainder=True).first()
    columns = [varlen("x", torch.float32, valid=Between(-1, 0))]
    with pytest.raises(ValueError, match=r"got 3 rows in '.*a.orc' \(.*, drop_remainder=True, 4 bad ones skipped\)"):
        reader(folder / "a.orc", columns, 54, epochs=epochs, on_bad="skip", drop_remainder=True).first()
    with pytest.raises(ValueError, match=r"got 0 rows in '.*b.orc' \(batch_size=5, drop_remainder=False\)"):
        reader(folder / "b.orc", COLUMNS, 5, epochs=epochs, drop_remainder=False).first()


@pytest.mark.parametrize("batch_size", [1, 6, 53, 100])
def test_rows_are_one_stream_over_files(folder, batch_size):
    batches = list(reader(folder, COLUMNS, batch_size, drop_remainder=False))
    assert all_rows(batches) == expected_rows(range(53))
    assert [b[NUM_SAMPLES].item() for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for batch in batches:
        assert batch["label"].shape == (batch_size, 1)
        assert batch["label"].dtype == torch.float32
        assert batch["x"].values.dtype == torch.float32
        assert batch["c"].values.dtype == torch.int64
        assert batch["c"].offsets.shape == (batch_size + 1,)
        assert batch["c"].offsets.dtype == torch.int32
        assert batch[NUM_SAMPLES].shape == ()
        assert batch[NUM_SAMPLES].dtype == torch.int32


def test_drop_remainder_leaves_out_the_short_batch(folder):
    assert all_rows(reader(folder, COLUMNS, 10, drop_remainder=True)) == expected_rows(range(50))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 54, "drop_remainder": True},
         r"but 53 rows in '.*a.orc', .* and 1 more \(batch_size=54, drop_remainder=True\)\. Give more rows, a smaller"),
        ({"filter": [("label", ">", 99)], "columns": FLAT},
         r"but 0 rows in .*flat.orc' \(.*, filter=\(label > 99\)\)\. Look at the filter\."),
        ({"split": Split(part="validation", fraction=1e-9, key="label"), "columns": FLAT},
         r"but 0 rows in .*, split=Split\(.*\)\. Look at the split\."),
        ({"on_bad": "skip", "columns": [fixedlen("label", [0.0], valid=OneOf(9))]},
         r"but 0 rows in .*drop_remainder=False, [24] bad ones skipped\)\. Look at a bad row\."),
    ],
)  # fmt: skip
def test_a_pass_without_a_batch_warns(folder, arguments, said):
    path = folder
    if "columns" in arguments:
        path = folder / "flat.orc"
        orc.write_table(pa.table({"label": [1, 2]}), path)
    batches = reader(path, **{"columns": COLUMNS, "epochs": 2, **arguments})
    with pytest.warns(UserWarning, match="recfx: got no batch in a pass over the data, " + said) as told:
        assert list(batches) == []
    assert len(told) == 2  # once for each pass
    assert {warning.filename for warning in told} == {__file__}
    with pytest.raises(ValueError, match="expected at least one batch"):  # no warning as well
        batches.first()


def test_what_is_left_of_a_pass_may_be_nothing(folder):
    it = iter(reader(folder, COLUMNS, 10))
    assert len(list(it)) == 6
    assert list(reader(folder, COLUMNS, 10).start_at(it.position)) == []


def test_short_batch_is_padded(folder):
    *_, last = reader(folder, COLUMNS, 10)
    assert last[NUM_SAMPLES].item() == 3
    assert last["label"][3:].eq(0).all()
    assert last["c"].offsets[3:].eq(last["c"].offsets[3]).all()
    assert last["c"].values[last["c"].offsets[-1] :].eq(0).all()


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (2, 3)])
def test_batches_do_not_depend_on_threads_and_prefetch(folder, threads, prefetch):
    plain = [b.buffer for b in reader(folder, COLUMNS, 6, prefetch=0)]
    threaded = [b.buffer for b in reader(folder, COLUMNS, 6, threads=threads, prefetch=prefetch)]
    assert len(plain) == len(threaded)
    assert all(map(torch.equal, plain, threaded))
    assert num_threads() == 0


@pytest.mark.parametrize("prefetch", [0, 1])
def test_resume_at_every_batch_equals_not_stopping(folder, prefetch):
    whole = all_rows(reader(folder, COLUMNS, 4, drop_remainder=False))
    it, seen = iter(reader(folder, COLUMNS, 4, drop_remainder=False)), []
    for batch in it:
        seen += rows_of(batch)
        position = json.loads(json.dumps(it.position))
        rest = reader(folder, COLUMNS, 4, drop_remainder=False, prefetch=prefetch).start_at(position)
        assert rest.position == position
        assert seen + all_rows(rest) == whole


def test_position_is_of_the_batch_last_returned(folder):
    def place(it):
        return tuple(it.position[key] for key in ("epoch", "file", "unit", "taken"))

    it = iter(reader(folder, COLUMNS, 5))
    assert place(it) == (0, 0, 0, 0)
    next(it)
    assert place(it) == (0, 0, 0, 5)
    next(it)
    assert place(it) == (0, 2, 0, 3)
    next(it)
    next(it)
    assert place(it) == (0, 2, 1, 5)
    assert list(it)
    assert place(it) == (0, 3, 0, 13)


@pytest.mark.parametrize("change", [{"taken": 8}, {"file": 5}, {"unit": 1}, {"row": -1}, {"of": "x"}, {"day": 1}])
def test_position_that_is_none_is_an_error(folder, change):
    position = iter(reader(folder, COLUMNS, 4)).position
    with pytest.raises(ValueError, match="position: got"):
        list(reader(folder, COLUMNS, 4).start_at({**position, **change}))


@pytest.mark.filterwarnings("ignore:recfx. got no batch")  # one of the files is empty
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_cover_every_row_once(folder, world_size):
    shards = [
        reader(folder, COLUMNS, 4, drop_remainder=False, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert sorted(map(str, itertools.chain(*map(all_rows, shards)))) == sorted(map(str, expected_rows(range(53))))


def test_capacity_rises_and_never_falls(tmp_path):
    lengths = [0, 2, 2, 9, 1, 0, 0, 0]
    rows = [{"label": [], "x": [], "c": list(range(n))} for n in lengths]
    batches = reader(write(tmp_path / "a.orc", rows), COLUMNS, 2)
    epochs = [list(batches), list(batches)]
    assert [b["c"].values.shape[0] for b in epochs[0]] == [2, 16, 16, 16]
    assert [b["c"].values.shape[0] for b in epochs[1]] == [16] * 4
    assert all_rows(epochs[0]) == all_rows(epochs[1])
    assert epochs[0][1].layout is epochs[1][3].layout


def test_batches_may_be_kept(folder):
    batches = list(reader(folder, COLUMNS, 5))
    assert len({b.buffer.data_ptr() for b in batches}) == len(batches)


def test_transform_runs_before_packing(folder):
    def double(batch):
        assert NUM_SAMPLES in batch
        return {"label": batch["label"] * 2, "c": batch["c"]}

    batches = list(reader(folder, COLUMNS, 10, drop_remainder=False, transform=double))
    assert set(batches[0]) == {NUM_SAMPLES, "label", "c"}
    assert batches[-1][NUM_SAMPLES].item() == 3
    assert len(batches[0].sections) == 3
    assert torch.cat([b["label"] for b in batches])[:53, 0].tolist() == [2 * r[0][0] for r in expected_rows(range(53))]


def test_flat_columns_are_lists_of_one(tmp_path):
    types = {"label": pa.float64(), "x": pa.float32(), "c": pa.int32()}
    path = write(tmp_path / "a.orc", [{"label": i, "x": i + 0.5, "c": -i} for i in range(4)], types)
    (batch,) = reader(path, COLUMNS, 4)
    assert rows_of(batch) == [([i], [i + 0.5], [-i]) for i in range(4)]


def test_paths(folder):
    def names(paths):
        return [file.name for file in reader(paths, COLUMNS).files]

    assert names(str(folder)) == names(f"{folder}/*.orc") == ["a.orc", "b.orc", "c.orc", "d.orc"]
    assert names(f"{folder}/d.orc, {folder}/a.orc") == names([folder / "d.orc", folder / "a.orc"]) == ["a.orc", "d.orc"]
    assert names([folder, folder / "a.orc"]) == names(folder)


def test_folders_that_a_glob_matches(folder):
    for day in ("dt=1", "dt=2", "dt=10", "_dt=1"):
        (folder / "days" / day).mkdir(parents=True)
        shutil.copy(folder / "a.orc", folder / "days" / day / f"{day}.orc")
    (folder / "days" / "dt=1" / "_SUCCESS").touch()

    def names(paths):
        return [file.name for file in reader(paths, COLUMNS).files]

    assert names(f"{folder}/days/dt=[12]") == ["dt=1.orc", "dt=2.orc"]
    assert names(f"{folder}/days/dt=*, {folder}/days/dt=2/*.orc") == ["dt=1.orc", "dt=10.orc", "dt=2.orc"]
    with pytest.raises(
        ValueError, match=rf"'{folder}/days/', which .* It has folders: '{folder}/days/.' matches the files"
    ):
        reader(f"{folder}/days/", COLUMNS)


@pytest.mark.parametrize("paths", ["{}/nothing-*.orc", "{}/z.orc", "{}/a.orc,{}/z.orc", "{}/void"])
def test_paths_that_match_nothing(folder, paths):
    (folder / "void").mkdir()
    with pytest.raises(ValueError, match=r"paths: got .* matches no file"):
        reader(paths.format(folder, folder), COLUMNS)
    with pytest.raises(ValueError, match="paths: got '', expected at least one"):
        reader("", COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"prefetch": -1}, "prefetch: got -1"),
        ({"rank": 2, "world_size": 2}, "rank: got 2 of world_size 2"),
        ({"rank": 4, "world_size": 5}, "rank: got 4 of 5 workers for 4 files"),
        ({"on_bad": "ignore"}, "on_bad: got 'ignore'"),
        ({"shard_by": "column"}, "shard_by: got 'column'"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"shuffle_rows": -1}, "shuffle_rows: got -1"),
        ({"columns": []}, "columns: got"),
        ({"columns": [COLUMNS[0], COLUMNS[0]]}, "columns: got .* distinct"),
        ({"columns": [varlen(NUM_SAMPLES, torch.int64)]}, "columns: got .*num_samples"),
    ],
)
def test_arguments_out_of_range(folder, arguments, match):
    with pytest.raises(ValueError, match=match):
        reader(folder, **{"columns": COLUMNS, **arguments})


def test_column_declarations():
    with pytest.raises(ValueError, match=r"column 'x': got dtype torch.float64"):
        varlen("x", torch.float64)
    with pytest.raises(ValueError, match="column 'x': got an empty default"):
        fixedlen("x", [])


def bad_file(path: Path, fault: str) -> None:
    rows = [row_of(i) for i in range(60, 70)]
    types, stripe_rows = dict(TYPES), None
    match fault:
        case "no column":
            del types["x"]
        case "strings":
            rows, types["x"] = [{**r, "x": ["s"]} for r in rows], pa.list_(pa.string())
        case "floats as ids":
            rows, types["c"] = (
                [{**r, "c": [0.5 if i == 6 else 1.0]} for i, r in enumerate(rows)],
                pa.list_(pa.float64()),
            )
        case "large integer":
            rows, types["x"] = [{**r, "x": [2**24 + (i == 6)]} for i, r in enumerate(rows)], pa.list_(pa.int64())
        case "null list":
            rows[6]["c"], stripe_rows = None, 4
        case "null element":
            rows[6]["x"], stripe_rows = [1.0, None], 4
        case "null number":
            rows, types["c"] = [{**r, "c": None if i == 6 else 1} for i, r in enumerate(rows)], pa.int64()
        case "long label":
            rows[6]["label"] = [1.0, 2.0]
    write(path, rows, types, stripe_rows)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    if fault == "damaged":
        content = bytearray(path.read_bytes())
        content[3 : len(content) // 2] = b"\xff" * (len(content) // 2 - 3)
        path.write_bytes(content)
    if fault == "empty":
        path.write_bytes(b"")


FAULTS = {
    "no column": "column 'x' of '.*e.orc': got no such column",
    "strings": r"column 'x' of '.*e.orc': got list<.*string>, expected list<double>",
    "floats as ids": r"column 'c' of '.*e.orc', row 6: got 0.5, expected a whole number",
    "large integer": r"column 'x' of '.*e.orc', row 6: got 16777217, which float32 would round to 16777216, expected",
    "null list": "column 'c' of '.*e.orc', row 6: got null, expected a list",
    "null element": "column 'x' of '.*e.orc', row 6: got a null element",
    "null number": "column 'c' of '.*e.orc', row 6: got null, expected a value, or null='empty' for the column.",
    "long label": "column 'label' of '.*e.orc', row 6: got 2 values, expected 1",
    "truncated": "file '.*e.orc': got .*, expected a readable ORC file",
    "damaged": "file '.*e.orc': got .* in stripe 0, expected a whole file",
    "empty": "file '.*e.orc': got 0 bytes",
}


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (2, 0), (2, 2)])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_file_stops_after_the_whole_batches_before_it(folder, fault, threads, prefetch):
    bad_file(folder / "e.orc", fault)
    it, rows = iter(reader(folder, COLUMNS, 10, drop_remainder=False, threads=threads, prefetch=prefetch)), []
    with pytest.raises(ValueError, match=FAULTS[fault]):
        rows.extend(itertools.chain.from_iterable(map(rows_of, it)))
    assert rows[:50] == expected_rows(range(50))
    assert len(rows) % 10 == 0
    assert num_threads() == 0
    assert next(it, None) is None


def test_file_removed_after_the_start(folder):
    batches = reader(folder, COLUMNS, 10)
    (folder / "d.orc").unlink()
    with pytest.raises(ValueError, match=r"file '.*d.orc': got .*, expected a readable ORC file"):
        list(batches)


def test_threads_end_on_close_and_when_let_go(folder):
    for let_go in (False, True):
        it = iter(reader(folder, COLUMNS, 5, threads=2, prefetch=1))
        next(it)
        assert num_threads() > 0
        if let_go:
            del it
            gc.collect()
        else:
            it.close()
            assert next(it, None) is None
        assert num_threads() == 0


@pytest.mark.skipif("RECFX_CRITEO_SAMPLE" not in os.environ, reason="RECFX_CRITEO_SAMPLE names no folder")
def test_real_sample():
    paths = os.environ["RECFX_CRITEO_SAMPLE"]
    numeric, categorical = [f"i{k}" for k in range(1, 14)], [f"c{k}" for k in range(1, 27)]
    columns = [
        fixedlen("label", [0.0]),
        *[varlen(n, torch.float32) for n in numeric],
        *[varlen(n, torch.int64) for n in categorical],
    ]
    sample = reader(paths, columns, 1000, drop_remainder=False, threads=2)
    batches, files = list(sample), [file.path for file in sample.files]
    assert sum(b[NUM_SAMPLES].item() for b in batches) == sum(orc.ORCFile(f).nrows for f in files)
    assert len({id(b.layout) for b in batches}) == 1
    rows = orc.read_table(files[0]).slice(1000, 1000).to_pylist()
    for name in numeric + categorical:
        assert lists_of(batches[1][name]) == [row[name] for row in rows]
    assert batches[1]["label"].tolist() == [row["label"] for row in rows]
