"""A run that was stopped and resumed: the bytes of never having stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import orc

from recfx import checkpoint, features
from recfx.data import fixedlen, reader, varlen
from recfx.step import Step
from recfx.train import Progress
from recfx.train import loop as train_module
from tests.conftest import BATCH_SIZE, FEATURES, deepfm_step
from tests.loop import Log, MemoryReader, go, interrupt, last_bytes, reader_of, saved
from tests.reference import random_samples


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def stop_and_resume(folder: Path, make_reader: Callable, how: str, at: int, **config: Any) -> tuple[Progress, Progress]:
    """Two runs, the first one stopped at a step; both as new processes would see them."""
    if how == "train_steps":
        _, first = go(folder, make_reader(), **config | {"train_steps": at})
    else:
        _, first = go(folder, make_reader(), listener=Log(("after_step", at), interrupt), **config)
    assert (first.step, first.stopped) == (at, how)
    _, second = go(folder, make_reader(), resume=True, **config)
    return first, second


def resumed_reader() -> MemoryReader:
    return reader_of(10, ids=tuple(range(150)), short_last=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Progress, Any]]:
    """Where a run that nothing stops comes to, and its bytes: trained once for each setting."""

    @functools.cache
    def run(make_reader: Callable, **config: Any) -> tuple[Progress, Any]:
        folder = tmp_path_factory.mktemp("whole")
        return go(folder, make_reader(), **config)[1], last_bytes(folder)

    return run


@pytest.mark.parametrize("how", ["train_steps", "interrupted"])
@pytest.mark.parametrize(
    ("accumulation", "epochs", "at"),
    [(1, 1, 1), (1, 1, 5), (1, 1, 10), (1, 2, 3), (1, 2, 10), (1, 2, 14), (4, 1, 1), (4, 1, 2), (4, 2, 3), (4, 2, 4)],
)
def test_resumed_is_never_having_stopped(whole_run, tmp_path, how, accumulation, epochs, at):
    """10 batches: 10 steps an epoch, or 3, the last of which is an incomplete window."""
    config = {"accumulation": accumulation, "train_epoch": epochs}
    whole, whole_bytes = whole_run(resumed_reader, **config)
    _, second = stop_and_resume(tmp_path, resumed_reader, how, at, **config)
    assert (second.step, second.epoch, second.stopped) == (whole.step, whole.epoch, "")
    assert last_bytes(tmp_path) == whole_bytes


def test_resumed_from_an_older_checkpoint(tmp_path):
    """A process that died after a save: what it did since is done again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(whole, reader_of(9), train_epoch=2, save_steps=4)

    def die() -> None:
        raise MemoryError("killed")

    with pytest.raises(MemoryError, match="killed"):
        go(parts, reader_of(9), train_epoch=2, save_steps=4, listener=Log(("after_step", 15), die))
    assert saved(parts) == [4, 8, 12]
    go(parts, reader_of(9), train_epoch=2, save_steps=4, resume=True)
    assert last_bytes(parts) == last_bytes(whole)
    assert saved(parts) == saved(whole)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_resumed_from_every_checkpoint(tmp_path, accumulation):
    """Those at an epoch's end among them, after its last full window or after an incomplete one."""
    config = {"accumulation": accumulation, "train_epoch": 2, "save_steps": 1 if accumulation > 1 else 5}
    whole = tmp_path / "whole"
    go(whole, resumed_reader(), **config, max_to_keep=9)
    for number in saved(whole):
        part = tmp_path / str(number)
        shutil.copytree(whole / f"step-{number:09d}", part / f"step-{number:09d}")
        is_over = number == saved(whole)[-1]
        with pytest.warns(match="nothing is left to train") if is_over else contextlib.nullcontext():
            go(part, resumed_reader(), **config, max_to_keep=9, resume=True)
        assert last_bytes(part) == last_bytes(whole)
        assert saved(part) == [n for n in saved(whole) if n >= number]


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    log = Log()
    go(tmp_path, reader_of(4))
    before = last_bytes(tmp_path)
    evaluate_with = lambda state: {"auc": 0.5}  # noqa: E731
    with pytest.warns(match="nothing is left to train: .*step-000000004 has come to the end"):
        state, progress = go(tmp_path, reader_of(4), resume=True, listener=log, evaluate_with=evaluate_with)
    assert last_bytes(tmp_path) == before
    assert (progress.step, progress.epoch, int(state.dense.step)) == (4, 1, 4)
    assert log.names() == ["before_evaluation", "after_evaluation", "before_save", "after_save"]
    assert progress.evaluation == {"auc": 0.5}


@pytest.mark.parametrize("train_steps", [2, 3])
def test_resuming_at_train_steps_trains_nothing(tmp_path, train_steps):
    go(tmp_path, reader_of(6), train_steps=3)
    before = last_bytes(tmp_path)
    with pytest.warns(match="nothing is left to train"):
        _, progress = go(tmp_path, reader_of(6), train_steps=train_steps, resume=True)
    assert (progress.step, progress.stopped) == (3, "train_steps")
    assert last_bytes(tmp_path) == before


def test_train_steps_count_from_the_very_beginning(tmp_path):
    go(tmp_path, reader_of(6), train_steps=2)
    _, progress = go(tmp_path, reader_of(6), train_steps=5, resume=True)
    assert (progress.step, progress.stopped) == (5, "train_steps")
    assert progress.num_samples == 3 * BATCH_SIZE


def test_more_epochs_after_the_last(tmp_path):
    go(tmp_path / "parts", reader_of(4))
    go(tmp_path / "parts", reader_of(4), train_epoch=3, resume=True)
    go(tmp_path / "whole", reader_of(4), train_epoch=3)
    assert last_bytes(tmp_path / "parts") == last_bytes(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    _, progress = go(tmp_path, reader_of(4), resume=True)
    assert progress.step == 4


def test_the_test_sees_a_lost_batch(tmp_path, monkeypatch):
    """Broken on purpose: a resume one batch too late gives other bytes."""
    go(tmp_path / "whole", reader_of(6))
    go(tmp_path / "parts", reader_of(6), train_steps=3)
    loaded = checkpoint.load

    def late(*args: Any) -> Any:
        state, loop = loaded(*args)
        return state, loop | {"position": {"batch": loop["position"]["batch"] + 1}}

    monkeypatch.setattr(train_module.checkpoint, "load", late)
    go(tmp_path / "parts", reader_of(6), resume=True)
    assert last_bytes(tmp_path / "parts")[1] != last_bytes(tmp_path / "whole")[1]


# The same from files.


@pytest.fixture(scope="module")
def file_reader(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Reads 103 rows in 3 files of several stripes."""
    folder, rng = tmp_path_factory.mktemp("orc"), random.Random(8)
    types = {"label": pa.float64(), **dict.fromkeys(("n0", "n1"), pa.float64()), **dict.fromkeys(FEATURES, pa.int64())}
    for i, num_rows in enumerate((40, 17, 46)):
        samples = random_samples(rng, num_rows, features=FEATURES, num_numeric=2, ids=tuple(range(120)))
        columns: dict[str, list] = {"label": [[s.label] for s in samples]}
        columns |= {f"n{k}": [[s.numeric[k]][: rng.randint(0, 3)] for s in samples] for k in range(2)}
        columns |= {name: [s.ids[name] for s in samples] for name in FEATURES}
        table = pa.table({name: pa.array(columns[name], type=pa.list_(t)) for name, t in types.items()})
        with orc.ORCWriter(str(folder / f"part-{i}.orc"), stripe_size=1, batch_size=16) as writer:
            for start in range(0, num_rows, 16):
                writer.write(table.slice(start, 16))
    assert orc.ORCFile(folder / "part-0.orc").nstripes > 1
    columns = [fixedlen("label", [0.0]), *(varlen(name, torch.float32) for name in ("n0", "n1"))]
    columns += [varlen(name, torch.int64) for name in FEATURES]
    return functools.partial(reader, folder, columns, BATCH_SIZE, drop_remainder=False)


def file_step(**kwargs: Any) -> Step:
    def select(batch: dict) -> dict:
        numeric_BN = torch.cat([features.select_dense(batch[name]) for name in ("n0", "n1")], dim=1)
        return {"label": batch["label"], "numeric": numeric_BN, **{name: batch[name] for name in FEATURES}}

    return deepfm_step(features=select, **kwargs)


@pytest.mark.parametrize("how", ["train_steps", "interrupted"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("accumulation", "epochs", "at"), [(1, 1, 5), (1, 2, 13), (4, 1, 3), (4, 2, 4), (4, 2, 7)])
def test_resumed_from_files_is_never_having_stopped(
    whole_run, file_reader, tmp_path, how, threads, accumulation, epochs, at
):
    """13 batches, the last of 7 samples; batches and stripes end in different rows."""
    config = {"accumulation": accumulation, "train_epoch": epochs, "make": file_step}
    _, whole_bytes = whole_run(file_reader, **config)
    make_reader = functools.partial(file_reader, threads=threads, prefetch=threads - 1)
    first, second = stop_and_resume(tmp_path, make_reader, how, at, **config)
    assert first.step < second.step or (epochs, at) == (1, 13)
    assert second.epoch == epochs
    assert last_bytes(tmp_path) == whole_bytes
    assert not [t for t in threading.enumerate() if t.name.startswith("recfx-read")]


def test_the_position_in_the_manifest_is_that_of_the_step(file_reader, tmp_path):
    go(tmp_path, file_reader(), accumulation=4, train_steps=2, make=file_step)
    loop = json.loads((checkpoint.latest(tmp_path) / "manifest.json").read_text())["loop"]
    position = {key: loop["position"][key] for key in ("epoch", "file", "unit", "taken")}
    assert (loop["epoch"], loop["step"]) == (0, 2)
    assert position == {"epoch": 0, "file": 2, "unit": 0, "taken": 2 * 4 * BATCH_SIZE - 40 - 17}
