"""The order of rows: shuffling, epochs, shards, splits, and that any position resumes exactly."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recfx.data import Reader, Split, fixedlen, order, reader, varlen
from tests.data.rows import all_rows, rows_of, write

NUM_ROWS = 83
COLUMNS = [varlen("id", torch.int64), varlen("user", torch.int64), fixedlen("label", [0])]


def table_of(first: int, last: int) -> pa.Table:
    ids = list(range(first, last))
    users = pa.array([i % 17 for i in ids], pa.int64())
    names = pa.array([f"u{i % 17}" for i in ids], pa.string())
    label = pa.array([[float(i % 2)] for i in ids], pa.list_(pa.float64()))
    return pa.table({"id": pa.array(ids, pa.int64()), "user": users, "name": names, "label": label})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """83 rows in 6 files of 3 formats, one of them empty, units of 4 to 8 rows."""
    folder = tmp_path_factory.mktemp("stream")
    ends, extensions = (0, 9, 9, 30, 37, 61, 83), ("orc", "parquet", "arrow", "parquet", "orc", "arrow")
    for i, extension in enumerate(extensions):
        write(folder / f"{i}.{extension}", table_of(ends[i], ends[i + 1]), 4 + i % 3 * 2)
    return folder


def read(folder: Path, batch_size: int = 5, **kwargs) -> Reader:
    return reader(folder, COLUMNS, batch_size, **{"drop_remainder": False, "prefetch": 0, **kwargs})


def ids_of(batches) -> list[int]:
    return [row["id"][0] for row in all_rows(batches)]


OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 12),
        "shuffle_rows": st.sampled_from([0, 1, 7, 20, 1000]),
        "seed": st.integers(0, 5),
        "epochs": st.integers(1, 3),
        "threads": st.integers(1, 2),
        "prefetch": st.integers(0, 1),
        "drop_remainder": st.booleans(),
        "shard": st.sampled_from([(0, 1, "file"), (1, 3, "file"), (2, 3, "unit"), (0, 4, "unit"), (1, 3, "row")]),
        "filter": st.sampled_from([None, [("id", ">", 40)], [("user", "==", 3)]]),
        "split": st.sampled_from([None, Split(part="train", fraction=0.3, key="user")]),
    }
)


def with_shard(options: dict) -> dict:
    rank, world_size, shard_by = options["shard"]
    rest = {name: value for name, value in options.items() if name != "shard"}
    return {**rest, "rank": rank, "world_size": world_size, "shard_by": shard_by}


@pytest.mark.filterwarnings("ignore:recfx. got no batch")  # the filter may leave a worker nothing
@given(options=OPTIONS, data=st.data())
@settings(deadline=None, max_examples=120)
def test_any_position_resumes_to_the_very_bytes(folder, options, data):
    options = with_shard(options)
    whole, positions = [], []
    it = iter(read(folder, **options))
    positions.append(it.position)
    for batch in it:
        whole.append(batch)
        positions.append(json.loads(json.dumps(it.position)))
    stop = data.draw(st.integers(0, len(whole)))
    rest = read(folder, **options | {"threads": 1, "prefetch": 0}).start_at(positions[stop])
    assert rest.position == positions[stop]
    resumed = list(rest)
    assert len(resumed) == len(whole) - stop
    assert all(rows_of(a) == rows_of(b) for a, b in zip(whole[stop:], resumed, strict=True))
    assert rest.position == positions[-1]


@given(options=OPTIONS)
@settings(deadline=None, max_examples=60)
def test_shards_of_every_epoch_hold_every_row_once(folder, options):
    options = with_shard(options) | {"drop_remainder": False, "filter": None, "split": None}
    world_size, epochs = options["world_size"], options["epochs"]
    counts = Counter()
    for rank in range(world_size):
        counts.update(ids_of(read(folder, **options | {"rank": rank})))
    assert counts == dict.fromkeys(range(NUM_ROWS), epochs)


@pytest.mark.parametrize("shuffle_rows", [0, 20])
def test_epochs_are_the_same_one_by_one(folder, shuffle_rows):
    three = ids_of(read(folder, epochs=3, shuffle_rows=shuffle_rows))
    one_by_one = [ids_of(read(folder, shuffle_rows=shuffle_rows).epoch(number)) for number in range(3)]
    assert three == [row for epoch in one_by_one for row in epoch]
    assert (one_by_one[0] == one_by_one[1]) == (shuffle_rows == 0)


def test_without_end(folder):
    it = iter(read(folder, 50, epochs=None))
    assert [batch["num_samples"].item() for batch, _ in zip(it, range(5), strict=False)] == [50, 33, 50, 33, 50]
    it.close()
    with pytest.warns(UserWarning, match="got no batch in a pass over the data, but 83 rows"):
        assert list(read(folder, 84, epochs=None, drop_remainder=True)) == []


def test_the_remainder_of_every_epoch_is_dropped(folder):
    assert [row["id"][0] for row in all_rows(read(folder, 50, epochs=2, drop_remainder=True))] == [*range(50)] * 2


def test_shuffled_rows_depend_on_the_seed_alone(folder):
    one, same, other = (ids_of(read(folder, 7, shuffle_rows=30, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert ids_of(read(folder, 3, shuffle_rows=30, seed=1, threads=2, prefetch=1)) == one
    assert sorted(one) == list(range(NUM_ROWS))


def test_files_and_units_are_shuffled_by_seed_and_epoch(folder):
    """In windows of one row only the order of files, and of units in them, is random."""
    one, same, other = (ids_of(read(folder, 7, shuffle_rows=1, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    epochs = ids_of(read(folder, 7, shuffle_rows=1, seed=1, epochs=2))
    assert epochs[:NUM_ROWS] == one
    assert epochs[NUM_ROWS:] != one
    assert sum(b == a + 1 for a, b in itertools.pairwise(one)) > NUM_ROWS / 2  # rows of a unit stay together


def test_a_window_of_all_rows_leaves_no_row_near_its_place(folder):
    """Of 200 seeds, how often each row comes first: no row is favoured."""
    firsts = Counter(next(iter(ids_of(read(folder, 1000, shuffle_rows=1000, seed=seed)))) for seed in range(200))
    assert max(firsts.values()) <= 12
    assert len(firsts) > 50


def test_a_position_of_other_options_is_refused(folder):
    it = iter(read(folder, shuffle_rows=10))
    next(it)
    for other in ({"seed": 3}, {"shuffle_rows": 11}, {"rank": 1, "world_size": 2}, {"filter": [("id", ">", 3)]}):
        with pytest.raises(ValueError, match=r"position: got one of .*, expected one of"):
            read(folder, **{"shuffle_rows": 10, **other}).start_at(it.position)


def test_more_workers_than_units(folder):
    expected = "rank: got 6 of 7 workers for 6 files, expected a file for each worker.*shard_by='unit'"
    with pytest.raises(ValueError, match=expected):
        read(folder, rank=6, world_size=7)
    with pytest.raises(ValueError, match="rank: got 40 of 60 workers for 6 files, expected a unit for each worker"):
        list(read(folder, rank=40, world_size=60, shard_by="unit"))


ROW_OPTIONS: dict[str, dict] = {
    "in order": {},
    "shuffled": {"shuffle_rows": 20, "seed": 3},
    "filtered": {"filter": [("id", ">", 40)]},
    "split": {"split": Split(part="train", fraction=0.3, key="user")},
}


@pytest.mark.parametrize("options", ROW_OPTIONS.values(), ids=ROW_OPTIONS)
@pytest.mark.parametrize("num", [2, 3, 7])
def test_workers_that_share_by_row_read_each_row_once(folder, tmp_path, num, options):
    expected = sorted(ids_of(read(folder, **options)))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):  # written, then read
        share = {"world_size": num, "shard_by": "row", "cache": cache, **options}
        shares = [ids_of(read(folder, rank=rank, **share)) for rank in range(num)]
        assert sorted(itertools.chain(*shares)) == expected
        assert max(map(len, shares)) - min(map(len, shares)) <= 7  # of 15 units


def test_records_of_a_share_by_row_are_followed_by_the_bytes_that_reading_them_reads(folder):
    plan = read(folder, shuffle_rows=20, rank=1, world_size=3, shard_by="row").plan
    units = [chunk for chunk in order.chunks(plan, order.ChunkStart(), 1) if chunk is not None]
    held = [batch.column(0) for chunk in units for batch in chunk.rows.memory]
    assert len(held) > 10
    for records in held:
        _, offsets, data = records.buffers()
        end = np.frombuffer(offsets, np.int64)[records.offset + len(records)]
        assert data.size >= end + 8


def test_bad_rows_are_counted_by_one_worker(tmp_path):
    labels = [None if i % 5 == 0 else [1.0] for i in range(40)]
    for k in range(3):
        table = pa.table({"id": pa.array(range(40 * k, 40 * k + 40), pa.int64()), "label": labels})
        write(tmp_path / f"{k}.parquet", table, 10)
    columns = [varlen("id", torch.int64), fixedlen("label", [0.0])]
    shares = [reader(tmp_path, columns, 4, on_bad="skip", rank=k, world_size=4, shard_by="row") for k in range(4)]
    iterators = [iter(share) for share in shares]
    assert sorted(i for it in iterators for i in ids_of(it)) == [i for i in range(120) if i % 5]
    assert sum(it.num_bad for it in iterators) == 24


FILTERS = [
    ([("id", ">", 40)], lambda i: i > 40),
    ([("id", "in", [3, 50]), ("user", "==", 3)], lambda i: i in (3, 50) and i % 17 == 3),
    ([[("id", "<", 5)], [("name", "==", "u9")]], lambda i: i < 5 or i % 17 == 9),
    ((ds.field("id") % 2 == 0) if hasattr(ds.Expression, "__mod__") else ds.field("id") < 11, None),
    (~(ds.field("user") == 4) & (ds.field("name") != "u5"), lambda i: i % 17 not in (4, 5)),
    (ds.field("id") > 1000, lambda i: False),
]


@pytest.mark.filterwarnings("ignore:recfx. got no batch")  # one of the filters is true of no row
@pytest.mark.parametrize(("given", "keep"), FILTERS)
def test_a_filter_gives_the_same_rows_from_every_format(folder, given, keep):
    keep = keep or (lambda i: i < 11)
    assert ids_of(read(folder, filter=given)) == [i for i in range(NUM_ROWS) if keep(i)]


def test_a_filter_skips_row_groups_by_their_statistics(tmp_path):
    path = write(tmp_path / "a.parquet", table_of(0, 40), 10)
    batches = read(path, filter=[("id", ">=", 30)])
    assert batches.plan.decoder.units(batches.files[0]) == [3]
    content = bytearray(Path(path).read_bytes())
    content[4:40] = b"\xff" * 36  # within the first row group
    Path(path).write_bytes(content)
    assert ids_of(read(path, filter=[("id", ">=", 30)])) == list(range(30, 40))


def test_a_filter_over_columns_that_are_not_there(folder):
    with pytest.raises(ValueError, match=r"filter: got .*price.*, which does not fit '.*0.orc'"):
        list(read(folder, filter=[("price", ">", 1)]))
    with pytest.raises(ValueError, match=r"split: got key 'session', which '.*0.orc' lacks"):
        list(read(folder, split=Split(part="train", fraction=0.5, key="session")))


@pytest.mark.parametrize("key", ["user", "name"])
def test_split_by_key_parts_users_and_loses_no_row(folder, key):
    parts = {
        part: all_rows(read(folder, split=Split(part=part, fraction=0.4, key=key))) for part in ("train", "validation")
    }
    values = {part: {row["user"][0] for row in rows} for part, rows in parts.items()}
    assert not values["train"] & values["validation"]
    assert sorted(row["id"][0] for rows in parts.values() for row in rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    "kind",
    [
        pa.int32(),
        pa.large_string(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.large_list(pa.int64()),
        pa.list_view(pa.int64()),
    ],
)
def test_a_key_is_the_same_in_any_of_arrows_ways(tmp_path, kind):
    def validation(name: str, keys: pa.Array) -> list[int]:
        with pa.ipc.new_file(str(tmp_path / name), pa.schema([("id", pa.int64()), ("key", keys.type)])) as writer:
            writer.write_table(pa.table({"id": pa.array(range(60), pa.int64()), "key": keys}))
        return ids_of(reader(tmp_path / name, COLUMNS[:1], 60, drop_remainder=False, split=SPLIT))

    keys = [i % 17 for i in range(60)]
    plain = [str(key) for key in keys] if "string" in str(kind) else keys
    wanted = [[key] for key in plain] if "list" in str(kind) else plain
    assert validation("a.arrow", pa.array(wanted, kind)) == validation("b.arrow", pa.array(plain))


SPLIT = Split(part="validation", fraction=0.4, key="key")


def test_split_by_key_keeps_to_the_fraction(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"id": pa.array(range(20_000), pa.int64())}))
    split = Split(part="validation", fraction=0.1, key="id")
    rows = list(reader(tmp_path, COLUMNS[:1], 20_000, split=split, drop_remainder=False))
    assert 1850 < rows[0]["num_samples"].item() < 2150


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_split_by_file(folder, fraction):
    parts = [
        {file.path for file in read(folder, split=Split(part=part, fraction=fraction)).files}
        for part in ("train", "validation")
    ]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 6
    with pytest.raises(ValueError, match="split: got 1 file, expected at least 2"):
        read(folder / "0.orc", split=Split(part="train", fraction=0.5))


@pytest.mark.parametrize("wrong", [{"part": "test"}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_splits_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        Split(**{"part": "train", "fraction": 0.5, **wrong})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_data_loader_gives_every_row_once(folder, num_workers, world_size):
    ids = []
    for rank in range(world_size):
        batches = read(folder, rank=rank, world_size=world_size)
        loader = DataLoader(batches, batch_size=None, collate_fn=_as_it_is, num_workers=num_workers)
        ids += ids_of(loader)
    assert sorted(ids) == list(range(NUM_ROWS))


def _as_it_is(batch):
    return batch


def test_an_iterator_keeps_its_state_in_torchdatas_words(folder):
    whole = ids_of(read(folder))
    it = iter(read(folder))
    first = all_rows([next(it), next(it)])
    other = iter(read(folder))
    other.load_state_dict(it.state_dict())
    assert [row["id"][0] for row in first] + ids_of(other) == whole


def test_resume_counts_skipped_rows_once(tmp_path):
    ids = [i if i % 5 else None for i in range(40)]
    write(tmp_path / "a.orc", pa.table({"id": pa.array(ids, pa.int64())}), 7)
    kwargs = {"on_bad": "skip", "drop_remainder": False, "epochs": 2}
    for shuffle_rows in (0, 9):
        batches = reader(tmp_path, COLUMNS[:1], 4, shuffle_rows=shuffle_rows, **kwargs)
        it, positions = iter(batches), []
        for _ in it:
            positions.append(it.position)
        assert it.num_bad == 16
        for position in positions:
            rest = batches.start_at(position)
            assert len(list(rest)) == len(positions) - positions.index(position) - 1
            assert rest.num_bad == 16 or position == positions[-1]
