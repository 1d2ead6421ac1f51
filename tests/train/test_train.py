"""The loop: what is counted, saved and checked before it, and accumulation."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from recfx.train import TrainConfig, train
from recfx.types import Batch
from tests.conftest import BATCH_SIZE, FEATURES, NUM_NUMERIC, deepfm_batches, deepfm_step
from tests.loop import Log, MemoryIterator, MemoryReader, fresh, go, last_bytes, reader_of, saved
from tests.reference import random_samples
from tests.step.test_step import assert_same_state, batch_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# What is counted.


@pytest.mark.parametrize(
    ("num_batches", "accumulation", "epochs", "train_steps", "steps", "stopped"),
    [
        (7, 1, 1, None, 7, ""),
        (7, 1, 3, None, 21, ""),
        (7, 3, 1, None, 3, ""),  # the last of one batch
        (6, 3, 2, None, 4, ""),
        (2, 4, 2, None, 2, ""),  # no window is ever full
        (7, 1, 1, 4, 4, "train_steps"),
        (7, 1, 1, 1, 1, "train_steps"),
        (7, 1, 1, 7, 7, "train_steps"),
        (7, 1, 1, 8, 7, ""),
        (7, 1, 3, 9, 9, "train_steps"),
        (7, 3, 1, 2, 2, "train_steps"),
        (7, 3, 1, 3, 3, "train_steps"),
        (7, 3, 2, 4, 4, "train_steps"),
    ],
)
def test_steps(tmp_path, num_batches, accumulation, epochs, train_steps, steps, stopped):
    log = Log()
    state, progress = go(
        tmp_path,
        reader_of(num_batches),
        accumulation=accumulation,
        train_epoch=epochs,
        train_steps=train_steps,
        listener=log,
    )
    assert (progress.step, progress.stopped) == (steps, stopped)
    assert int(state.dense.step) == int(state.tables[0].step) == steps
    assert log.steps("before_step") == list(range(steps))
    assert log.steps("after_step") == list(range(1, steps + 1))
    assert saved(tmp_path) == [steps]
    assert int(state.window.num_batches) == 0


def test_no_batch_is_an_error(tmp_path):
    """Not a run of no steps; of a log of days, the first must hold one."""
    with pytest.raises(ValueError, match=r"reader: got no batch from .*MemoryIterator.*, expected one at least"):
        go(tmp_path, MemoryReader([]), train_epoch=2)
    assert saved(tmp_path) == []
    days = MemoryReader([])
    days.epoch = lambda number: (reader_of(2) if number == 0 else days).start_at({"batch": 0})
    assert go(tmp_path, days, train_epoch=2)[1].step == 2


def test_samples_and_times(tmp_path):
    _, progress = go(tmp_path, reader_of(5, short_last=True), train_epoch=2)
    short = BATCH_SIZE // 2 - 1
    assert progress.num_samples == 2 * (4 * BATCH_SIZE + short)
    assert progress.timed_samples == progress.num_samples - BATCH_SIZE  # the first call waits for the compiler
    assert 0 < progress.seconds + progress.first_step_s < progress.train_s
    assert progress.samples_per_s == progress.timed_samples / progress.seconds
    assert progress.samples_per_s > 1


def test_compiling_for_a_later_layout_is_not_in_the_speed(tmp_path):
    class Run:
        """Says that all of its third call but a moment went into compiling."""

        calls, compile_s = 0, 0.0

        def __call__(self, state, batch):
            begun = time.perf_counter()
            self.calls += 1
            result = step.update_(state, batch)
            if self.calls == 3:
                time.sleep(1.0)
                self.compile_s = time.perf_counter() - begun
            return result

        def take_compile_s(self):
            seconds, self.compile_s = self.compile_s, 0.0
            return seconds

    step = deepfm_step()
    _, progress = train(step, Run(), fresh(step), reader_of(4), TrainConfig(output_dir=str(tmp_path)))
    assert 0 < progress.seconds < progress.train_s - 1
    assert progress.timed_samples == 3 * BATCH_SIZE


def test_log_steps(tmp_path):
    log = Log()
    go(tmp_path, reader_of(5), train_epoch=2, log_steps=3, listener=log)
    assert log.steps("log") == [3, 6, 9]


@pytest.mark.parametrize(
    ("num_batches", "accumulation", "numbers"),
    [
        (5, 1, [2, 4, 6, 8, 10]),
        (5, 2, [2, 4, 6]),
        (7, 2, [2, 4, 6, 8]),  # every fourth step is an incomplete window
        (4, 1, [2, 4, 6, 8]),
        (3, 1, [2, 4, 6]),
    ],
)
def test_save_steps_and_the_final_save(tmp_path, num_batches, accumulation, numbers):
    """Each step once, the last one too, whatever ends there."""
    log = Log()
    config = {"accumulation": accumulation, "train_epoch": 2, "save_steps": 2}
    go(tmp_path, reader_of(num_batches), listener=log, **config)
    assert saved(tmp_path) == log.steps("before_save") == log.steps("after_save") == numbers


def test_what_is_due_is_saved_before_the_reader_fails(tmp_path):
    class Broken(MemoryIterator):
        def __next__(self) -> Batch:
            if self.place == 2:
                raise ValueError("row 3: got null")
            return super().__next__()

    reader = reader_of(3)
    reader.start_at = lambda position: Broken(reader, position["batch"])
    with pytest.raises(ValueError, match="row 3: got null"):
        go(tmp_path, reader, save_steps=2)
    assert saved(tmp_path) == [2]


def test_max_to_keep(tmp_path):
    go(tmp_path, reader_of(7), save_steps=2, max_to_keep=2)
    assert saved(tmp_path) == [6, 7]


@pytest.mark.parametrize("name", ["log_steps", "save_steps", "train_steps", "train_epoch", "max_to_keep"])
def test_counts_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("name", ["log_steps", "save_steps", "train_steps", "train_epoch", "max_to_keep"])
def test_counts_that_are_none(name):
    with pytest.raises(TypeError, match=f"{name}: got 1000.0, expected an int"):
        TrainConfig(**{name: 1e3})


@pytest.mark.parametrize("num", [0, 1.5])
def test_no_steps_per_replay(tmp_path, num):
    step, config = deepfm_step(), TrainConfig(output_dir=str(tmp_path / "x"))
    with pytest.raises(ValueError, match=f"steps_per_replay: got {num}, expected at least 1, an int"):
        train(step, step.update_, fresh(step), reader_of(2), config, steps_per_replay=num)
    assert not (tmp_path / "x").exists()


class Restarts(MemoryReader):
    """Its epochs are iterables that begin again whenever they are iterated."""

    def start_at(self, position: dict) -> Any:
        reader, first = self, position["batch"]

        class Epoch:
            def __init__(self) -> None:
                self.position = {"batch": first}

            def __iter__(self) -> Iterator[Batch]:
                for number, batch in enumerate(reader.batches[first:], start=first + 1):
                    self.position = {"batch": number}
                    yield batch

        return Epoch()


def test_an_epoch_that_is_no_iterator_ends(tmp_path):
    def stop() -> None:
        raise OverflowError("a fourth of three batches")

    _, progress = go(tmp_path, Restarts(deepfm_batches(3)), listener=Log(("after_step", 4), stop))
    assert progress.step == 3


# Accumulation.


@pytest.mark.parametrize("accumulation", [3, 4])
def test_an_incomplete_last_window_is_one_step_on_its_concatenation(tmp_path, accumulation):
    """8 micro-batches with unequal counts, against the same samples in batches `accumulation` times as large."""
    rng = random.Random(3)
    parts = [
        random_samples(rng, size, features=FEATURES, num_numeric=NUM_NUMERIC, ids=range(40))
        for size in (8, 8, 5, 8, 1, 8, 8, 3)
    ]
    windows = [list(itertools.chain(*parts[i : i + accumulation])) for i in range(0, len(parts), accumulation)]
    small, large = (
        go(tmp_path / str(k), MemoryReader([batch_of(s, size) for s in samples]), accumulation=k)
        for k, samples, size in ((accumulation, parts, BATCH_SIZE), (1, windows, BATCH_SIZE * accumulation))
    )
    assert small[1].step == large[1].step == len(windows)
    assert_same_state(small[0]._replace(window=large[0].window), large[0])


def test_windows_do_not_span_epochs(tmp_path):
    """Two epochs of an incomplete window are what one epoch twice is."""
    go(tmp_path / "two", reader_of(5), accumulation=4, train_epoch=2)
    go(tmp_path / "one", reader_of(5), accumulation=4)
    go(tmp_path / "one", reader_of(5), accumulation=4, train_epoch=2, resume=True)
    assert last_bytes(tmp_path / "two") == last_bytes(tmp_path / "one")
