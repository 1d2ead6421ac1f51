"""Partial checkpoints: saved, made full, compared; and saves in the background while training continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from torch.utils._pytree import tree_leaves

from recfx import cli
from recfx.checkpoint import Saver, compact, diff, latest, load, save
from recfx.checkpoint.background import Job
from recfx.checkpoint.folders import MANIFEST, FolderLock
from recfx.step import Step, TrainState
from tests.checkpoint.test_checkpoint import SHARD, digests, flip, fresh, some_state, steps, trained
from tests.checkpoint.test_checkpoint_load import free_
from tests.conftest import deepfm_batches, deepfm_groups, deepfm_step
from tests.reference import on_threads

LOOP = {"epoch": 0, "position": None}


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step()


def train_on(step: Step, state: TrainState, seed: int, ids: tuple[int, ...], num: int = 2) -> TrainState:
    return on_threads(1, trained, step, state, deepfm_batches(num, seed=seed, ids=ids))


def chain(step: Step, folder: Path, full_every: int = 10, num: int = 5) -> tuple[list[Path], list[Path]]:
    """Checkpoints of a run by a Saver, and full ones of the same steps. Rows are made, changed, freed, used again."""
    state, paths, full = some_state(step), [], []
    with Saver(folder / "partial", step, full_every=full_every, max_to_keep=9) as saver:
        for k in range(num):
            number = int(state.dense.step)
            paths.append(saver.save(state, number=number, loop=LOOP))
            full.append(save(folder / "full", step, state, number=number, loop=LOOP, max_to_keep=9))
            if k == 1:
                free_(state.tables[0], [2, 5, *range(70, 100)])  # more than will be used again
            state = train_on(step, state, 90 + k, tuple(range(1290, 1310 + 4 * k)))
    return paths, full


def rows_in(path: Path) -> list[int]:
    """By shard."""
    return [len(load_file(shard)["row"]) for shard in sorted(path.glob("table-*"))]


def test_a_partial_checkpoint_loads_as_a_full_one(step, tmp_path):
    paths, full = chain(step, tmp_path)
    for part, whole in zip(paths, full, strict=True):
        assert diff(part, whole) == []
        loaded, loop = load(part, step, fresh(step))
        again = save(tmp_path / "again", step, loaded, number=loop.pop("step"), loop=loop)
        assert digests(again) == digests(whole)
    counts = rows_in(paths[-1])
    assert len(counts) == 5
    assert all(0 < c < counts[0] / 2 for c in counts[1:])


def test_every_so_many_saves_one_is_full(step, tmp_path):
    paths, full = chain(step, tmp_path, full_every=3, num=5)
    assert [len(rows_in(path)) for path in paths] == [1, 2, 3, 1, 2]
    assert digests(paths[3]) == digests(full[3])


def test_each_folder_is_complete(step, tmp_path):
    """The checkpoints that one was laid over may go; their files are shared, not copied."""
    paths, full = chain(step, tmp_path)
    inodes = [(path / SHARD).stat().st_ino for path in paths]
    assert len(set(inodes)) == 1
    moved = tmp_path / "moved"
    shutil.copytree(paths[-1], moved)
    for path in (*paths[:-1],):
        shutil.rmtree(path)
    assert diff(paths[-1], full[-1]) == diff(moved, full[-1]) == []


def test_where_files_cannot_be_linked_they_are_copied(step, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("recfx.checkpoint.contents.os.link", refuse)
    paths, full = chain(step, tmp_path, num=3)
    assert diff(paths[-1], full[-1]) == []
    assert len({(path / SHARD).stat().st_ino for path in paths}) == 3


def test_max_to_keep_of_partial_checkpoints(step, tmp_path):
    state = some_state(step)
    with Saver(tmp_path, step, full_every=10, max_to_keep=2) as saver:
        for k in range(4):
            path = saver.save(state, number=int(state.dense.step), loop=LOOP)
            state = train_on(step, state, 90 + k, tuple(range(1290, 1310)))
    assert len(steps(tmp_path)) == 2
    assert len(rows_in(path)) == 4
    load(path, step, fresh(step))


def test_saving_twice_at_one_number(step, tmp_path):
    """As at the end of a run that has just saved: laid over itself, nothing is lost."""
    state = some_state(step)
    with Saver(tmp_path / "partial", step, full_every=10) as saver:
        for loop in (LOOP, {"epoch": 1, "position": None}):
            path = saver.save(state, number=8, loop=loop)
    assert steps(path.parent) == [path]
    assert diff(path, save(tmp_path / "full", step, state, number=8, loop=loop)) == []


def test_saving_again_what_nothing_was_added_to(step, tmp_path):
    """All its files are links to those that it replaces."""
    state = some_state(step)
    state.tables[0].step.add_(1)  # a step that touched no row
    full = save(tmp_path / "full", step, state, number=8, loop=LOOP)
    with Saver(tmp_path / "partial", step, full_every=5) as saver:
        for write in (saver.save, saver.save, saver.save_in_background):
            path = write(state, number=8, loop=LOOP)
            saver.finish()
            assert [folder for folder in path.parent.iterdir() if folder.is_dir()] == [path]
            assert digests(path) | {MANIFEST: ""} == digests(full) | {MANIFEST: ""}
            assert diff(path, full) == []


def test_a_base_that_is_gone_makes_the_next_save_full(step, tmp_path):
    state = some_state(step)
    with Saver(tmp_path, step, full_every=10) as saver:
        shutil.rmtree(saver.save(state, number=8, loop=LOOP))
        state = train_on(step, state, 90, (7, 8))
        path = saver.save(state, number=10, loop=LOOP)
    assert len(rows_in(path)) == 1
    load(path, step, fresh(step))


def test_compacted_is_saved_in_full(step, tmp_path, capsys):
    paths, full = chain(step, tmp_path)
    assert compact(paths[2]) == paths[2]
    assert cli.main(["compact", str(paths[4]), str(paths[0])]) == 0
    assert capsys.readouterr().out.split() == [str(paths[4]), str(paths[0])]
    for k in (0, 2, 4):
        assert digests(paths[k]) == digests(full[k])
    assert diff(paths[3], full[3]) == []
    assert steps(paths[0].parent) == paths


@pytest.mark.parametrize("saved", [0, 4])
def test_a_kill_between_the_renames_of_a_compaction_loses_nothing(step, tmp_path, monkeypatch, saved):
    """The one moment when a checkpoint that is replaced is not in its place."""
    paths, full = chain(step, tmp_path)
    real, calls = os.replace, []

    def die(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("recfx.checkpoint.contents.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        compact(paths[4])
    monkeypatch.undo()
    assert not paths[4].exists()
    with Saver(paths[0].parent, step, max_to_keep=9):
        assert digests(latest(paths[0].parent)) == digests(full[4])
    assert steps(paths[0].parent) == paths


# What differs.


def test_diff_names_what_differs(step, tmp_path, capsys):
    state = some_state(step)
    a = save(tmp_path / "a", step, state, number=8, loop=LOOP)
    assert cli.main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == "the same\n"
    table = state.tables[0]
    state.params["dnn.0.bias"][1] += 0.25
    (row, *_) = (table.vocabularies == 0).nonzero()[:, 0].tolist()
    table.rows[row, 0, 4] += 2  # a bias
    table.rows[row, 2, 1] = float("nan")
    table.seen[row] += 5 << 32
    free_(table, [row + 1])
    number = int(table.num_rows)
    for column, value in (("ids", 77), ("vocabularies", 1), ("born", 9), ("seen", 9 << 32)):
        getattr(table, column)[number] = value
    table.num_rows.add_(1)
    table.tally[1] += 1
    b = save(tmp_path / "b", step, state, number=9, loop=LOOP)
    assert cli.main(["diff", str(a), str(b)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loop: {'epoch': 0, 'position': None, 'step': 8} | {'epoch': 0, 'position': None, 'step': 9}"
    for expected in (
        "params.dnn.0.bias: 1 of 8 differ, by at most 0.25",
        f"table.0.num_rows: {number} | {number + 1}",
        "table.0.free_rows: int32 [0] | int32 [1]",
        "table.0.tally: 1 of 4 differ, by at most 1",
        "emb/a + bias/a: last_seen",
        "bias/a: weight: 1 of ",
        "emb/a: optimiser slot 2: 1 of ",
        "rows only in A, first id ",
        "emb/b + bias/b: 1 rows only in B, first id 77",
    ):
        assert [line for line in lines if expected in line], (expected, lines)
    assert len(lines) == 10
    assert [x for x in diff(b, a) if "rows only in B, first id" in x]


def test_diff_tells_moved_rows_from_missing_ones(step, tmp_path):
    state = some_state(step)
    a = save(tmp_path / "a", step, state, number=8, loop=LOOP)
    one, other = state.tables[0].ids[:2].clone(), None
    for tensor in (state.tables[0].ids, state.tables[0].vocabularies, state.tables[0].rows, state.tables[0].seen,
                   state.tables[0].born, state.tables[0].counts):  # fmt: skip
        other = tensor[:2].flip(0).clone()
        tensor[:2] = other
    assert one.tolist() == state.tables[0].ids[:2].flip(0).tolist()
    lines = diff(a, save(tmp_path / "b", step, state, number=8, loop=LOOP))
    assert lines
    assert all(": row: " in line and "by at most 1" in line for line in lines)


def test_diff_of_other_models(step, tmp_path):
    a = save(tmp_path / "a", step, some_state(step), number=8, loop=LOOP)
    groups = {g: es[:2] for g, es in deepfm_groups().items()}
    other = deepfm_step(embeddings=groups, seed=4, forward=lambda params, emb, feats: emb["bias"].sum((1, 2))[:, None])
    b = save(tmp_path / "b", other, other.init({"x": torch.zeros(2)}), number=8, loop=LOOP)
    lines = diff(a, b)
    assert "seed: 3 | 4" in lines
    assert "emb/c + bias/c: only in A" in lines
    assert "params.x: only in B" in lines
    dense = [line for line in lines if line.startswith(("dense.", "params."))]
    assert dense == sorted(dense)  # not in the order of a hash table


def test_diff_of_what_is_no_checkpoint(tmp_path, capsys):
    assert cli.main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "manifest.json: got FileNotFoundError" in capsys.readouterr().err


# In the background.


def test_a_background_save_holds_the_state_of_its_call(step, tmp_path):
    """Everything is overwritten while the child has not begun to write."""
    state = some_state(step)
    whole = save(tmp_path / "whole", step, state, number=8, loop=LOOP)
    with Saver(tmp_path / "background", step) as saver:
        path = saver.save_in_background(state, number=8, loop=LOOP)
        for t in tree_leaves(state):
            t.fill_(3)
        saver.finish()
        assert not saver.busy
    assert digests(path) == digests(whole)


def test_training_goes_on_beside_background_saves(step, tmp_path):
    """Also partial ones, each with the state of its step."""
    state, full = some_state(step), []
    with Saver(tmp_path / "background", step, full_every=3, max_to_keep=9) as saver:
        for k in range(6):
            number = int(state.dense.step)
            saver.save_in_background(state, number=number, loop=LOOP)
            full.append(save(tmp_path / "full", step, state, number=number, loop=LOOP, max_to_keep=9))
            state = train_on(step, state, 90 + k, tuple(range(1290, 1330)))
    paths = steps(tmp_path / "background")
    assert [len(rows_in(path)) for path in paths] == [1, 2, 3, 1, 2, 3]
    assert [diff(a, b) for a, b in zip(paths, full, strict=True)] == [[]] * 6


def test_a_save_after_one_whose_base_is_damaged_is_full(step, tmp_path):
    state = some_state(step)
    with Saver(tmp_path, step, full_every=5) as saver:
        first = saver.save(state, number=8, loop=LOOP)
        flip(first / MANIFEST, 40)
        with pytest.raises(ValueError, match=MANIFEST):
            saver.save(state, number=9, loop=LOOP)
        path = saver.save(state, number=10, loop=LOOP)
    assert len(rows_in(path)) == 1
    load(path, step, fresh(step))


@pytest.mark.parametrize("number", [8, 9])
def test_an_error_of_a_background_save_is_told(step, tmp_path, monkeypatch, number):
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    state = some_state(step)
    saver = Saver(tmp_path, step, full_every=5)
    first = saver.save(state, number=8, loop=LOOP)
    monkeypatch.setattr("recfx.checkpoint.contents.write_tensors", full)
    state = train_on(step, state, 90, (7, 8))
    saver.save_in_background(state, number=number, loop=LOOP)
    with pytest.raises(OSError, match=r"No space left on device. The checkpoints before this one are whole") as error:
        saver.finish()
    assert error.value.errno == 28
    assert steps(tmp_path) == [first]
    monkeypatch.undo()
    path = saver.save(state, number=10, loop=LOOP)
    saver.close()
    assert len(rows_in(path)) == 1  # full: what the lost one was to hold is in it
    load(path, step, fresh(step))


def test_a_background_save_that_is_killed_is_told(step, tmp_path, monkeypatch):
    monkeypatch.setattr("recfx.checkpoint.contents.write_tensors", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    saver = Saver(tmp_path, step)
    saver.save_in_background(some_state(step), number=8, loop=LOOP)
    with pytest.raises(RuntimeError, match=r"background save: ended by signal 9. The checkpoint is not there"):
        saver.close()
    assert latest(tmp_path) is None


def test_a_system_without_memory_for_a_child_is_told(step, tmp_path, monkeypatch):
    """And ctrl-C, which waits while the child is made, comes through again."""

    def fork() -> int:
        raise OSError(12, "Cannot allocate memory")

    state, open_files = some_state(step), "/proc/self/fd"
    with Saver(tmp_path, step) as saver:
        before = len(os.listdir(open_files))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", fork)
            with pytest.raises(OSError, match="background save: no child process: Cannot allocate memory"):
                saver.save_in_background(state, number=8, loop=LOOP)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert len(os.listdir(open_files)) == before
        saver.save_in_background(state, number=8, loop=LOOP)
    load(latest(tmp_path), step, fresh(step))


def test_an_unforeseen_error_in_the_background_is_told():
    def fail() -> None:
        raise KeyError("surprise")

    with pytest.raises(RuntimeError, match=r"background save: KeyError\('surprise'\)"):
        Job(fail).finish()


def test_ctrl_c_does_not_reach_the_background_save():
    def wait() -> None:
        time.sleep(0.2)

    job = Job(wait)
    time.sleep(0.05)
    os.kill(job._pid, signal.SIGINT)
    assert not job.done
    job.finish()
    assert job.done


ORPHAN = """
import os, signal, sys, time
from tests.checkpoint.test_checkpoint_partial import *
from recfx.checkpoint import contents

write = contents.write_tensors
def slowly(path, tensors):
    Path(sys.argv[2]).touch()
    time.sleep(1)
    return write(path, tensors)
contents.write_tensors = slowly
step = deepfm_step()
saver = Saver(sys.argv[1], step)
contents.SHARD_BYTES = 1000
saver.save_in_background(some_state(step), number=8, loop=LOOP)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_background_save_gives_up_when_its_process_is_killed(step, tmp_path):
    folder = tmp_path / "ckpt"
    command = [sys.executable, "-W", "ignore", "-c", ORPHAN, str(folder), str(tmp_path / "begun")]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    with Saver(folder, step):  # waits for the lock a little, then clears away
        assert steps(folder) == []


# One writer.


@pytest.mark.parametrize("how", ["thread", "process"])
def test_two_writers(step, tmp_path, monkeypatch, how):
    monkeypatch.setattr("recfx.checkpoint.folders.LOCK_WAIT_S", 0.1)
    saver = Saver(tmp_path, step)
    if how == "process":
        job = Job(lambda: time.sleep(1))  # holds the lock as its parent does
        saver.close()
    match = rf"{tmp_path}: process {os.getpid()} writes checkpoints there, expected no other writer. Choose another"
    with pytest.raises(BlockingIOError, match=match):
        save(tmp_path, step, some_state(step), number=8, loop=LOOP)
    if how == "process":
        job.finish()
    else:
        saver.close()
    save(tmp_path, step, some_state(step), number=8, loop=LOOP)


@pytest.mark.parametrize("name", ["max_to_keep", "full_every"])
def test_counts_out_of_range(step, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        Saver(tmp_path, step, **{name: 0})


def test_compacting_while_another_saves(step, tmp_path, monkeypatch):
    monkeypatch.setattr("recfx.checkpoint.folders.LOCK_WAIT_S", 0.1)
    with Saver(tmp_path, step) as saver:
        path = saver.save(some_state(step), number=8, loop=LOOP)
        with pytest.raises(BlockingIOError, match="expected no other writer"):
            compact(path)
    assert json.loads((path / MANIFEST).read_text())["loop"]["step"] == 8


def test_a_damaged_part_is_named(step, tmp_path):
    paths, _ = chain(step, tmp_path, num=3)
    flip(paths[2] / "table-0.00001.safetensors", -1)
    for read in (lambda p: load(p, step, fresh(step)), compact, lambda p: diff(p, p)):
        with pytest.raises(ValueError, match=r"table-0.00001.safetensors: checksum differs"):
            read(paths[2])


def test_the_background_save_of_a_killed_run_is_waited_for(tmp_path, monkeypatch):
    """On busy cores it may take longer to end than a second writer is given. The lock names the killed run."""
    monkeypatch.setattr("recfx.checkpoint.folders.LOCK_WAIT_S", 0.05)
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    orphan = FolderLock(tmp_path)
    (tmp_path / ".lock").write_text(str(killed.pid))
    later = threading.Timer(0.5, orphan.release)
    later.start()
    FolderLock(tmp_path).release()
    later.join()
