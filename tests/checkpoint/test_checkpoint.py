"""Checkpoints: the same bytes for the same state, whole or not there, and clear about what is wrong with them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from recfx.checkpoint import contents, files, latest, load, save
from recfx.checkpoint.files import write_file
from recfx.checkpoint.folders import MANIFEST, STATE, digest_of
from recfx.step import Step, TrainState
from recfx.table import ROW_FIELDS
from recfx.table import functions as table_module
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
from tests.reference import on_threads

LOOP = {"epoch": 1, "position": {"file": 2, "row": 30}}
SEED = 7


def fresh(step: Step) -> TrainState:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


def trained(step: Step, state: TrainState, batches: list) -> TrainState:
    for batch in batches:
        state, _ = step.update_(state, batch)
    return state


def some_state(step: Step, number: int = 5) -> TrainState:
    """Many rows, so that the index has doubled; one thread, so that equal calls give equal bytes."""
    ids = tuple(range(1000, 1300))
    batches = deepfm_batches(3, seed=SEED) + deepfm_batches(number, seed=SEED + 1, ids=ids, short_last=True)
    return on_threads(1, trained, step, fresh(step), batches)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def steps(folder: Path) -> list[Path]:
    """Everything in the folder but the lock, and what a run writes for people to watch."""
    return sorted(path for path in folder.iterdir() if path.name not in (".lock", "metrics.jsonl"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """As another version of recfx would have written it, its own checksum included."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest.pop("manifest_xxh3_128")
    manifest["manifest_xxh3_128"] = digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


SHARD = "table-0.00000.safetensors"


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step()


@pytest.fixture
def saved(step: Step, tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", step, some_state(step), number=8, loop=LOOP)


# What comes back.


def test_round_trip_is_bitwise(step, saved):
    a, (b, loop) = some_state(step), load(saved, step, fresh(step))
    assert loop == LOOP | {"step": 8}
    for left, right in ((a.params, b.params), (a.dense.m, b.dense.m), (a.dense.v, b.dense.v)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert int(a.dense.step) == int(b.dense.step) == 8
    for x, y in zip(a.tables, b.tables, strict=True):
        num_rows = int(x.num_rows)
        assert num_rows > 100
        assert torch.equal(x.tally, y.tally)
        assert int(x.tally[0]) > 0
        for name in ("num_rows", "num_free", "num_refused", "step", "num_unique", "salt"):
            assert int(getattr(x, name)) == int(getattr(y, name)), name
        for name in ("ids", "vocabularies", "born", "counts", "rows"):
            assert torch.equal(getattr(x, name)[:num_rows], getattr(y, name)[:num_rows]), name
        assert torch.equal(x.seen[:num_rows] >> 32, y.seen[:num_rows] >> 32)
        assert len({int(s) for s in x.seen[:num_rows] >> 32}) > 3
    assert not any(int(t.count_nonzero()) for t in (*b.metrics, *b.window[1:]))


def test_all_that_was_refused_is_remembered(tmp_path):
    step = deepfm_step(max_rows=32)
    state = some_state(step)
    assert int(state.tables[0].num_refused) > 0
    loaded, _ = load(save(tmp_path, step, state, number=8, loop={}), step, fresh(step))
    assert int(loaded.tables[0].num_refused) == int(state.tables[0].num_refused)


def test_the_same_rows_are_found(step, saved):
    """Known ids and unknown ones, by the eager evaluation: equal logits, and not those of an untrained state."""
    a, (b, _) = some_state(step), load(saved, step, fresh(step))
    for batch in deepfm_batches(3, seed=SEED) + deepfm_batches(2, seed=40, ids=tuple(range(1200, 1500))):
        logits = [on_threads(1, step.evaluate_, s, batch)[1].logit for s in (a, b, fresh(step))]
        assert torch.equal(logits[0], logits[1])
        assert not torch.equal(logits[0], logits[2])


def test_training_goes_on_as_if_it_had_not_stopped(step, saved, tmp_path):
    more = deepfm_batches(4, seed=50, ids=tuple(range(1200, 1500)))
    a, (b, _) = some_state(step), load(saved, step, fresh(step))
    paths = [
        save(tmp_path / name, step, on_threads(1, trained, step, state, more), number=12, loop=LOOP)
        for name, state in (("a", a), ("b", b))
    ]
    assert digests(paths[0]) == digests(paths[1])
    assert digests(paths[0])[SHARD] != digests(saved)[SHARD]


# What is in the file.


def test_equal_states_give_equal_bytes(step, saved, tmp_path):
    again = save(tmp_path / "again", step, some_state(step), number=8, loop=LOOP)
    assert digests(again) == digests(saved)
    loaded, loop = load(saved, step, fresh(step))
    from_loaded = save(tmp_path / "loaded", step, loaded, number=loop.pop("step"), loop=loop)
    assert digests(from_loaded) == digests(saved)
    other = save(tmp_path / "other", step, some_state(step, 6), number=8, loop=LOOP)
    assert digests(other)[SHARD] != digests(saved)[SHARD]


def test_saving_changes_no_byte_of_the_state(step, tmp_path):
    state = some_state(step)
    leaves = torch.utils._pytree.tree_leaves(state)
    before = [t.clone() for t in leaves]
    save(tmp_path, step, state, number=8, loop=LOOP)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


def test_only_rows_in_use_are_brought_to_the_host(step):
    """On a GPU a copy of all that is reserved could take gigabytes, of the device too."""
    state = some_state(step)
    for table, held in zip(
        state.tables, contents.contents_of(step, state, number=1, loop={}, since=None).tables, strict=True
    ):
        assert {len(column) for column in held.columns.values()} == {int(table.num_rows)}


def test_nothing_of_capacity_is_in_the_file(monkeypatch, tmp_path):
    """A table that grew from 8 slots and one reserved far larger: the same bytes. Nor of time or host."""
    paths, num_slots = [], []
    for first_slots, max_rows, max_unique in ((8, 512, 128), (2**16, 2**17, None)):
        monkeypatch.setattr(table_module, "FIRST_SLOTS", first_slots)
        step = deepfm_step(max_rows=max_rows, max_unique=max_unique)
        state = some_state(step)
        num_slots.append(int(state.tables[0].num_slots))
        paths.append(save(tmp_path / str(first_slots), step, state, number=8, loop=LOOP))
    assert num_slots[0] < num_slots[1]
    assert digests(paths[0]) == digests(paths[1])
    num_rows = int(state.tables[0].num_rows)
    rows, small = load_file(paths[0] / SHARD), load_file(paths[0] / STATE)
    assert {name: len(array) for name, array in rows.items()} == dict.fromkeys(rows, num_rows)
    assert rows["rows"].shape == (num_rows, *state.tables[0].rows.shape[1:])
    assert {name for name in small if name.startswith("table.")} == {
        f"table.0.{name}" for name in ("num_rows", "free_rows", "num_refused", "tally", "step")
    }
    assert small["table.0.free_rows"].size == 0
    manifest = json.loads((paths[0] / MANIFEST).read_text())
    assert manifest.keys() == {"format", "files", "loop", "manifest_xxh3_128", "parts", "seed", "slots", "tables"}
    assert manifest["loop"].keys() == {*LOOP, "step"}


def test_readable_without_recfx(step, saved):
    """JSON, the safetensors package and xxhash are enough; at most one metadata key, as more come in random order."""
    state, manifest = some_state(step), json.loads((saved / MANIFEST).read_text())
    assert sorted([*manifest["files"], MANIFEST]) == sorted(path.name for path in saved.iterdir())
    for name, checksum in manifest["files"].items():
        assert xxhash.xxh3_128_hexdigest((saved / name).read_bytes()) == checksum
        with safe_open(saved / name, "numpy") as file:
            assert len(file.metadata() or {}) <= 1
    (((name,),),) = manifest["parts"]
    shard, table = load_file(saved / name), state.tables[0]
    names = {(v, c): n for v, columns in enumerate(manifest["tables"][0]) for n, c, _ in columns}
    assert names == {(v, c): f"{g}/{f}" for v, f in enumerate("abc") for c, g in ((0, "emb"), (4, "bias"))}
    for n, row in enumerate(shard["row"].tolist()):
        assert (shard["ids"][n], shard["vocabularies"][n]) == (int(table.ids[row]), int(table.vocabularies[row]))
        assert shard["rows"][n].tolist() == table.rows[row].tolist()
        assert shard["last_seen"][n] == int(table.seen[row]) >> 32
    assert load_file(saved / STATE)["params.dnn.0.bias"].tolist() == state.params["dnn.0.bias"].tolist()


def test_many_shards(step, saved, monkeypatch, tmp_path):
    """Cut by bytes of rows, not by capacity; what is loaded is the same."""
    monkeypatch.setattr(contents, "SHARD_BYTES", 4096)
    path = save(tmp_path, step, some_state(step), number=8, loop=LOOP)
    shards = sorted(path.glob("table-0.*"))
    assert len(shards) > 3
    assert np.concatenate([load_file(s)["ids"] for s in shards]).tolist() == load_file(saved / SHARD)["ids"].tolist()
    loaded, _ = load(path, step, fresh(step))
    monkeypatch.undo()
    again = save(tmp_path / "again", step, loaded, number=8, loop=LOOP)
    assert digests(again) == digests(saved)


@pytest.mark.parametrize("piece", [1, 300, 4096])
@pytest.mark.parametrize("rank", [None, 0, 1, 2])
def test_what_is_loaded_does_not_depend_on_pieces_and_shards(step, saved, monkeypatch, tmp_path, piece, rank):
    share = {} if rank is None else {"rank": rank, "world_size": 3}
    whole, _ = load(saved, step, fresh(step), **share)
    monkeypatch.setattr(contents, "SHARD_BYTES", 4096)
    monkeypatch.setattr(files, "READ_BYTES", piece)
    path = save(tmp_path / "shards", step, some_state(step), number=8, loop=LOOP)
    loaded, _ = load(path, step, fresh(step), **share)
    (one,), (other,) = whole.tables, loaded.tables
    assert int(one.num_rows) == int(other.num_rows) > 40
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in (*ROW_FIELDS, "slots"))


# Whole or not there.


def test_numbers_sort_and_only_the_newest_are_kept(step, tmp_path):
    state = some_state(step)
    assert latest(tmp_path / "nowhere") is None
    for number in (2, 9, 10, 100):
        path = save(tmp_path, step, state, number=number, loop=LOOP, max_to_keep=2)
        assert latest(tmp_path) == path
    assert [p.name for p in steps(tmp_path)] == ["step-000000010", "step-000000100"]
    assert json.loads((path / MANIFEST).read_text())["loop"] == LOOP | {"step": 100}


def test_what_was_just_saved_is_never_deleted(step, tmp_path):
    """Not even in a folder that holds checkpoints of a longer run."""
    state = some_state(step)
    for number in (100, 200, 300):
        save(tmp_path, step, state, number=number, loop=LOOP)
    path = save(tmp_path, step, state, number=5, loop=LOOP, max_to_keep=2)
    assert path.exists()
    assert [p.name for p in steps(tmp_path)] == ["step-000000005", "step-000000300"]


@pytest.mark.parametrize("number", [9, 10])
def test_a_half_written_folder_is_ignored_and_cleared_away(step, saved, number):
    folder = saved.parent
    half = folder / ".unfinished-000000009"
    shutil.copytree(saved, half)
    flip(half / STATE, 100)
    assert latest(folder) == saved
    newer = save(folder, step, some_state(step), number=number, loop=LOOP)
    assert steps(folder) == [saved, newer]
    load(newer, step, fresh(step))


def test_files_are_on_disk_before_the_folder_has_its_name(step, tmp_path, monkeypatch):
    """Written, synced, renamed, in this order: what a loss of power needs."""
    done: list = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(str(new)) or replace(old, new))
    path = save(tmp_path, step, some_state(step), number=8, loop=LOOP)
    renamed = done.index(str(path))
    assert {f.stat().st_ino for f in (path, *path.iterdir())} <= {*done[:renamed]}
    assert tmp_path.stat().st_ino in done[renamed:]


def test_a_folder_without_a_manifest_is_no_checkpoint(step, saved):
    (saved.parent / "step-000000099").mkdir()
    assert latest(saved.parent) == saved


@pytest.mark.parametrize("same", [True, False])
def test_saving_at_the_same_number_again(step, saved, same):
    """Also where a file was damaged since: each is replaced."""
    state, before = some_state(step, 5 if same else 6), digests(saved)
    flip(saved / SHARD, -1)
    again = save(saved.parent, step, state, number=8, loop={"epoch": 2, "position": None}, max_to_keep=1)
    assert steps(saved.parent) == [again] == [saved]
    assert (digests(saved)[SHARD] == before[SHARD]) == same
    loaded, loop = load(again, step, fresh(step))
    assert loop == {"epoch": 2, "position": None, "step": 8}
    assert int(loaded.dense.step) == int(state.dense.step)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_what_is_renamed_is_on_disk(step, tmp_path, monkeypatch):
    """What no kill can tell, and a power cut would: files, their folder, the rename, its folder, and only then an older
    checkpoint goes."""
    old, said = save(tmp_path, step, some_state(step), number=7, loop=LOOP), []
    fsync, replace = os.fsync, os.replace

    def told_fsync(file: int) -> None:
        said.append(("on disk", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    def told_replace(source: Path, target: Path) -> None:
        said.append((source.name, target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", told_fsync)
    monkeypatch.setattr(os, "replace", told_replace)
    new = save(tmp_path, step, some_state(step), number=8, loop=LOOP, max_to_keep=1)
    names, scratch = {path.name for path in new.iterdir()}, ".unfinished-000000008"
    assert set(said[: len(names)]) == {("on disk", name) for name in names}
    assert said[len(names) - 1 :] == [
        ("on disk", MANIFEST),
        ("on disk", scratch),
        (scratch, new.name),
        ("on disk", tmp_path.name),
        (old.name, f".unfinished-{old.name}"),
    ]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("direct", [files.DIRECT, 0, 2**30])
@pytest.mark.parametrize("size", [1, 8191, 8192, 8193, 3 * 8192 + 5])
def test_a_file_is_what_was_written_whatever_the_file_system_can(tmp_path, monkeypatch, direct, size):
    monkeypatch.setattr(files, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(files, "DIRECT", direct)
    content = random.Random(size).randbytes(size)
    chunks = [content[first : first + 3000] for first in range(0, size, 3000)]
    assert write_file(tmp_path / "file", chunks) == xxhash.xxh3_128_hexdigest(content)
    assert (tmp_path / "file").read_bytes() == content


@st.composite
def laid_out(draw) -> np.ndarray:
    """An array with or without gaps, its axes in this order or the other, forwards or backwards."""
    shape = (draw(st.integers(0, 3000)), *draw(st.lists(st.integers(0, 4), max_size=2)))
    whole = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 2**15, [n + 1 for n in shape])
    array = whole.astype(draw(st.sampled_from(["<f8", "<f4", "<i2", "|u1"])), order=draw(st.sampled_from("CF")))
    return array[tuple(slice(n) for n in shape)][:: draw(st.sampled_from([1, 2, -1]))]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(arrays=st.lists(laid_out(), max_size=4), chunk_bytes=st.sampled_from([8192, 3 * 4096, files.CHUNK_BYTES]))
def test_arrays_are_written_without_their_gaps(tmp_path, arrays, chunk_bytes):
    content = b"".join(array.tobytes() for array in arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk_bytes)
        assert write_file(tmp_path / "file", arrays) == xxhash.xxh3_128_hexdigest(content)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("columns", [0, 1025, 5000])
def test_rows_of_no_bytes_and_wider_than_half_a_block(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(files, "CHUNK_BYTES", 8192)
    array = np.arange(7 * (columns + 1), dtype=np.float32).reshape(7, -1)[:, :columns]
    assert write_file(tmp_path / "file", [b"abc", array]) == xxhash.xxh3_128_hexdigest(b"abc" + array.tobytes())
    assert (tmp_path / "file").read_bytes() == b"abc" + array.tobytes()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_writes_at_the_same_time_has_a_separate_block(tmp_path):
    def parts() -> Iterator[bytes]:
        yield b"parent"
        child = os.fork()
        if child == 0:
            write_file(tmp_path / "child", [b"-child-"])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        yield b"parent"

    write_file(tmp_path / "parent", parts())
    assert (tmp_path / "parent").read_bytes() == b"parentparent"
    assert (tmp_path / "child").read_bytes() == b"-child-"


@pytest.mark.parametrize("limit", [8192 + 4096, 8192 + 100, 3 * 8192 + 1])
def test_a_disk_that_fills_up_within_a_block_is_told(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(files, "CHUNK_BYTES", 8192)
    with file_size_limit(limit), pytest.raises(OSError, match="File too large"):
        write_file(tmp_path / "file", [bytes(3 * 8192 + 5)])


@pytest.mark.parametrize("failing", ["contents.os.replace", "files.os.fsync", "contents.write_tensors"])
@pytest.mark.parametrize("number", [8, 9])
def test_the_previous_checkpoint_survives_a_write_that_fails(step, saved, monkeypatch, failing, number):
    before = digests(saved)
    with monkeypatch.context() as patch:
        patch.setattr(f"recfx.checkpoint.{failing}", no_space)
        with pytest.raises(OSError, match=r"No space left on device. The checkpoints before this one are whole"):
            save(saved.parent, step, some_state(step, 6), number=number, loop=LOOP, max_to_keep=1)
    assert latest(saved.parent) == saved
    assert digests(saved) == before
    load(saved, step, fresh(step))
    newer = save(saved.parent, step, some_state(step, 6), number=number, loop=LOOP, max_to_keep=1)
    assert steps(saved.parent) == [newer]


def test_what_is_to_be_replaced_is_there_when_the_new_one_cannot_take_its_place(step, saved, monkeypatch):
    real, before = os.replace, digests(saved)

    def refuse(source: Path, target: Path) -> None:
        no_space() if source.name.startswith(".unfinished-0") else real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match=r"No space left on device. The checkpoints before this one are whole"):
            save(saved.parent, step, some_state(step, 6), number=8, loop=LOOP)
    assert sorted(p.name for p in saved.parent.iterdir()) == [".lock", saved.name]
    assert digests(saved) == before


def test_a_file_the_system_does_not_write(step, saved):
    state = some_state(step, 6)
    expected = pytest.raises(OSError, match=r"File too large. The checkpoints before this one are whole")
    with file_size_limit(4096), expected as error:
        save(saved.parent, step, state, number=9, loop=LOOP, max_to_keep=1)
    assert error.value.errno == errno.EFBIG
    assert steps(saved.parent) == [saved]
    assert latest(saved.parent) == saved
    load(saved, step, fresh(step))


KILL_SAVERS = """
import itertools, os, random, signal, sys, time
from tests.checkpoint.test_checkpoint import *

def save_forever(pipe, first):  # every other time at the number of the save before
    for number in itertools.count(first):
        save(folder, step, states[number // 2 % 2], number=number // 2, loop={"epoch": number}, max_to_keep=2)
        os.write(pipe, b"%d\\n" % (number // 2))

torch.set_num_threads(1)
folder, step, rng = Path(sys.argv[1]), deepfm_step(), random.Random(0)
states, last = [some_state(step, n) for n in (5, 6)], -1
for _ in range(8):
    (ours, theirs), first = os.pipe(), 2 * (last + 1)
    child = os.fork()
    if child == 0:
        save_forever(theirs, first)
    os.close(theirs)
    with open(ours) as said:
        done = int(said.readline())
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = int(([done] + said.read().split())[-1])
    state, loop = load(latest(folder), step, fresh(step))
    last = loop["step"]
    assert done <= last <= done + 1, (done, last)
    assert int(state.dense.step) == (8, 9)[last % 2]
    assert len(steps(folder)) <= 4
print("killed")
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """The newest one that `save` had finished, or the one it was writing."""
    command = [sys.executable, "-W", "ignore", "-c", KILL_SAVERS, str(tmp_path / "ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.returncode) == ("killed\n", 0), done.stderr
