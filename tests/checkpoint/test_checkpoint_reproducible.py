"""Same seed, data, device kind and thread count: the same bytes on disk, through the captured step too."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recfx import rows
from recfx import table as table_package
from recfx.capture import capture
from recfx.checkpoint import compact, diff, latest, load, save
from recfx.checkpoint.merging import merged
from recfx.embeddings import Embedding
from recfx.step import Step
from recfx.table import num_live, policies, stats
from recfx.table.policies import Life
from recfx.train import TrainConfig, train
from tests.checkpoint.test_checkpoint import digests
from tests.conftest import deepfm_batches, deepfm_groups, deepfm_step
from tests.loop import Log, MemoryReader, fresh, interrupt

NUM_BATCHES = 9


@pytest.fixture(scope="module")
def captured() -> tuple[Step, Callable]:
    """Compiled once for all tests, as one process would."""
    step = deepfm_step()
    return step, capture(step, fresh(step), batches()[0])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batches() -> list:
    return deepfm_batches(NUM_BATCHES, seed=5, ids=tuple(range(150)))


def go(folder: Path, step: Step, run: Callable, **config: Any) -> Path:
    """Trains from a new state, or from the newest checkpoint; returns the last checkpoint."""
    listener = config.pop("listener", lambda *_: None)
    config = {"output_dir": str(folder), "train_epoch": 2, "save_steps": 4} | config
    train(step, run, fresh(step), MemoryReader(batches()), TrainConfig(**config), resume=True, on_event=listener)
    return latest(folder)


def test_run_to_run(captured, tmp_path):
    a, b = (go(tmp_path / name, *captured) for name in "ab")
    assert digests(a) == digests(b)


@pytest.mark.parametrize("how", ["train_steps", "interrupt"])
@pytest.mark.parametrize(
    "options", [{}, {"save_in_background": True}, {"save_in_background": True, "full_save_every": 3}]
)
def test_interrupted_and_resumed(captured, tmp_path, how, options):
    whole = go(tmp_path / "whole", *captured)
    for at in (3, 4, 9, 14):
        if how == "train_steps":
            go(tmp_path / "parts", *captured, train_steps=at, **options)
        else:
            go(tmp_path / "parts", *captured, listener=Log(("after_step", at), interrupt), **options)
    parts = go(tmp_path / "parts", *captured, **options)
    assert diff(parts, whole) == []
    assert digests(compact(parts)) == digests(whole)


def test_all_at_once(tmp_path, monkeypatch):
    """Windows, admission, expiry, eviction at the cap of three tables, one of them read by two features; growth, and
    partial saves in the background of which one is kept."""
    groups = deepfm_groups() | {"wide": [Embedding("b", dim=2)]}
    groups["emb"] = [dataclasses.replace(e, shared_name=None if e.feature == "b" else "a+c") for e in groups["emb"]]
    life = Life(
        admit=policies.at_least(2), candidates=300, expire=policies.unseen_for(4), score=policies.least_frequently_used,
        keep=8, every=3, at_cap="evict",
    )  # fmt: skip
    step = deepfm_step(embeddings=groups, accumulation=2, life=life, max_rows=16)
    whole = go(tmp_path / "whole", step, step.update_)
    monkeypatch.setattr(table_package.functions, "FIRST_SLOTS", 8)
    options = {"save_in_background": True, "full_save_every": 3, "save_steps": 1, "max_to_keep": 1}
    for at in (2, 5, 8):
        go(tmp_path / "parts", step, step.update_, listener=Log(("after_step", at), interrupt), **options)
    parts = go(tmp_path / "parts", step, step.update_, **options)
    assert diff(parts, whole) == []
    assert digests(compact(parts)) == digests(whole)
    seen = [stats(t) for t in load(whole, step, fresh(step))[0].tables]
    assert len(seen) == 3
    assert all(s.evicted > 0 and s.unadmitted > 0 and s.refused > 0 for s in seen), seen


def test_ids_deleted_between_two_runs(tmp_path):
    """In the checkpoint that the second run resumes: as if they had been deleted while the first continued."""

    def delete(event: str, progress: Any, state: Any) -> None:
        if (event, progress.step) == ("after_step", 3):
            rows.delete_(step, state, "emb/a", torch.arange(0, 150, 2))

    step = deepfm_step()
    whole = go(tmp_path / "whole", step, step.update_, listener=delete)
    path = go(tmp_path / "parts", step, step.update_, train_steps=3)
    state, loop = load(path, step, fresh(step))
    num_rows = num_live(state.tables[0])
    rows.delete_(step, state, "emb/a", torch.arange(0, 150, 2))
    assert num_live(state.tables[0]) < num_rows - 10
    save(path.parent, step, state, number=loop["step"], loop=loop)
    assert digests(go(path.parent, step, step.update_)) == digests(whole)


def test_grown_or_not(captured, tmp_path, monkeypatch):
    """An index of 8 slots that doubles while training, and one that was large enough from the start."""
    paths = []
    for first_slots in (8, 2**16):
        monkeypatch.setattr(table_package.functions, "FIRST_SLOTS", first_slots)
        paths.append(go(tmp_path / str(first_slots), *captured))
    assert digests(paths[0]) == digests(paths[1])


def assert_same_rows(a: Path, b: Path) -> None:
    """Keys and rows equal, values to rounding."""
    for (columns, live), (others, other_live) in zip(merged(a).tables, merged(b).tables, strict=True):
        assert live.tolist() == other_live.tolist()
        for name in columns.keys() - {"rows"}:
            assert (columns[name] == others[name]).all(), name
        np.testing.assert_allclose(columns["rows"], others["rows"], rtol=1e-3, atol=1e-5)


def test_compiled_or_eager(captured, tmp_path):
    step, run = captured
    assert_same_rows(go(tmp_path / "captured", step, run), go(tmp_path / "eager", step, step.update_))


def test_at_another_thread_count(tmp_path):
    step, paths = deepfm_step(), []
    for num in (1, 2):
        torch.set_num_threads(num)
        paths.append(go(tmp_path / str(num), step, step.update_))
    assert_same_rows(*paths)


ANOTHER_PROCESS = """
import sys, torch
from tests.checkpoint.test_checkpoint_reproducible import *
torch.set_num_threads(1)
step = deepfm_step()
print(go(Path(sys.argv[1]), step, capture(step, fresh(step), batches()[0])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_in_another_process(captured, tmp_path, hash_seed):
    here = go(tmp_path / "here", *captured)
    command = [sys.executable, "-W", "ignore", "-c", ANOTHER_PROCESS, str(tmp_path / "there")]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert digests(Path(done.stdout.strip())) == digests(here)


def test_after_save_is_told_when_it_is_on_disk(tmp_path):
    """In the background too, once for every save, and the last one before training returns."""

    def look(event: str, progress: Any, state: Any) -> None:
        if event.endswith("_save"):
            events.append(event)
            assert event == "before_save" or latest(tmp_path) is not None

    events: list[str] = []
    step = deepfm_step()
    go(tmp_path, step, step.update_, listener=look, save_in_background=True, save_steps=2)
    assert events == ["before_save", "after_save"] * (2 * NUM_BATCHES // 2)  # the last step is one of them


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    """The second one fails at its start, and the checkpoints of the first are unchanged."""
    monkeypatch.setattr("recfx.checkpoint.folders.LOCK_WAIT_S", 0.05)
    step, told = deepfm_step(), []

    def second(event: str, progress: Any, state: Any) -> None:
        if (event, progress.step) == ("after_step", 6):
            with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} writes checkpoints there, expected no"):
                go(tmp_path, step, step.update_)
            told.append(digests(latest(tmp_path)))

    go(tmp_path, step, step.update_, listener=second)
    assert len(told) == 1


def test_a_failed_background_save_stops_training(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    step = deepfm_step()
    kept = go(tmp_path, step, step.update_, train_steps=3)
    before = digests(kept)
    monkeypatch.setattr("recfx.checkpoint.contents.write_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device. The checkpoints before this one are whole"):
        go(tmp_path, step, step.update_, save_in_background=True)
    assert latest(tmp_path) == kept
    assert digests(kept) == before
