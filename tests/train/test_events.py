"""The loop: in which order things happen, and what an error in one of them costs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from recfx.step import TrainState
from recfx.train import Progress, TrainConfig, train
from recfx.types import Batch
from tests.conftest import deepfm_step
from tests.loop import Log, MemoryReader, fresh, go, last_bytes, reader_of, saved


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_order_of_events(tmp_path):
    log, values = Log(), {"auc": 0.5}
    _, progress = go(
        tmp_path, reader_of(3), accumulation=2, train_epoch=2, save_steps=3, log_steps=2, listener=log,
        evaluate_with=lambda state: values,
    )  # fmt: skip
    one, two = ("before_step", "after_step"), ("before_step", "log", "after_step")
    save, evaluation = ("before_save", "after_save"), ("before_evaluation", "after_evaluation")
    assert log.names() == [
        "before_epoch", *one, *two, "after_epoch", *evaluation,
        "before_epoch", *one, *save, *two, "after_epoch", *evaluation, *save,
    ]  # fmt: skip
    assert [epoch for event, epoch, _ in log.events if "epoch" in event] == [0, 1, 1, 2]
    assert log.steps("after_evaluation") == [2, 4]
    assert progress.evaluation is values


def test_people_count_epochs_from_one(tmp_path):
    """Also between two, where the number of complete ones has gone on already, and after a resume."""
    seen = []

    def look(event: str, progress: Progress, state: TrainState) -> None:
        if event in ("before_epoch", "log", "after_epoch", "after_evaluation", "before_save"):
            seen.append((event, progress.epoch, progress.epoch_text))

    config = {"train_epoch": 2, "log_steps": 3, "listener": look, "evaluate_with": lambda state: {}}
    assert Progress().epoch_number == 0
    _, progress = go(tmp_path, reader_of(3), train_steps=4, **config)
    first, second = "epoch 1 of 2", "epoch 2 of 2"
    one = [("before_epoch", 0, first), ("log", 0, first), ("after_epoch", 1, first), ("after_evaluation", 1, first)]
    two = [("after_evaluation", 1, second), ("before_save", 1, second)]
    assert seen == [*one, ("before_epoch", 1, second), *two]
    assert progress.epoch_text == second
    seen.clear()
    _, progress = go(tmp_path, reader_of(3), resume=True, **config)
    assert seen[0] == ("before_epoch", 1, second)
    assert (progress.epoch, progress.epoch_number, progress.num_epochs) == (2, 2, 2)
    with pytest.warns(match="nothing is left to train"):
        assert go(tmp_path, reader_of(3), resume=True, **config)[1].epoch_text == second


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(tmp_path, monkeypatch, how):
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    step, config = deepfm_step(), TrainConfig(output_dir=str(tmp_path / "new"))
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match=r"output_dir: got '.*new', where nothing can be written \(No space left on"):
        train(step, lambda state, batch: pytest.fail("trained"), fresh(step), reader_of(2), config, **how)


def test_the_checkpoint_is_there_after_save(tmp_path):
    def look(event: str, progress: Progress, state: TrainState) -> None:
        if event.endswith("_save"):
            seen.append((event, progress.step, (tmp_path / f"step-{progress.step:09d}").exists()))

    seen: list = []
    go(tmp_path, reader_of(3), save_steps=2, listener=look)
    assert seen == [(event, step, event == "after_save") for step in (2, 3) for event in ("before_save", "after_save")]


def test_evaluated_when_stopped_by_train_steps(tmp_path):
    log = Log()
    _, progress = go(tmp_path, reader_of(5), train_steps=3, listener=log, evaluate_with=lambda state: {"auc": 0.5})
    assert progress.evaluation == {"auc": 0.5}
    assert log.steps("after_evaluation") == [3]
    assert log.names()[-4:] == ["before_evaluation", "after_evaluation", "before_save", "after_save"]


@pytest.mark.parametrize(("save_steps", "numbers"), [(2000, [3]), (3, [3]), (2, [2, 3])])
@pytest.mark.parametrize("epochs", [1, 2])
def test_an_evaluation_that_fails_does_not_cost_what_was_trained(tmp_path, save_steps, numbers, epochs):
    def fail(state):
        raise ValueError("held-out files are gone")

    how = {"train_epoch": epochs, "save_steps": save_steps}
    with pytest.raises(ValueError, match="held-out files are gone"):
        go(tmp_path / "fails", reader_of(3), evaluate_with=fail, **how)
    assert saved(tmp_path / "fails") == numbers
    if epochs == 2:
        go(tmp_path / "fails", reader_of(3), resume=True, evaluate_with=lambda state: {}, **how)
        go(tmp_path / "works", reader_of(3), evaluate_with=lambda state: {}, **how)
        assert last_bytes(tmp_path / "fails") == last_bytes(tmp_path / "works")


def test_iterators_are_closed_when_training_stops_early(tmp_path):
    reader = reader_of(5)
    go(tmp_path, reader, train_steps=3)
    assert (reader.opened, reader.closed) == (1, 1)


def test_an_error_of_the_reader_is_not_swallowed(tmp_path):
    def broken() -> Iterator[Batch]:
        raise ValueError("file 'x': got 0 bytes")
        yield

    reader = MemoryReader([])
    reader.start_at = lambda position: broken()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="file 'x': got 0 bytes"):
        go(tmp_path, reader)
    assert signal.getsignal(signal.SIGINT) is before


def test_nan_from_before_is_an_error_before_the_first_step(tmp_path):
    """Training on would only lose what is still whole."""
    step, log = deepfm_step(), Log()
    state = fresh(step)
    state.nonfinite.first_step.fill_(1)
    config = TrainConfig(output_dir=str(tmp_path), log_steps=100)
    with pytest.raises(FloatingPointError, match=r"step 1: .*, before this call of train, expected finite numbers"):
        train(step, step.update_, state, reader_of(2), config, on_event=log)
    assert log.events == saved(tmp_path) == []


def test_nan_is_told_of_where_the_reader_cannot_read_again(tmp_path):
    """A file that is gone does not replace the error."""
    reader = reader_of(4)
    begin, calls = reader.start_at, []

    def start_at(position: dict) -> Any:
        calls.append(position)
        if len(calls) > 1:
            raise FileNotFoundError("part-0 is gone")
        return begin(position)

    reader.start_at = start_at
    step = deepfm_step()

    def run(state: TrainState, batch: Batch) -> Any:
        state.nonfinite.first_step.fill_(1)
        return step.update_(state, batch)

    config = TrainConfig(output_dir=str(tmp_path), log_steps=1)
    with pytest.raises(FloatingPointError, match=r"of epoch 1, which could not be read again \(part-0 is gone\)"):
        train(step, run, fresh(step), reader, config)
