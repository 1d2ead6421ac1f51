"""The loop: what is counted, in which order things happen, and what ctrl-C does."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from recfx import metrics
from recfx.step import TrainState
from recfx.train import Progress, TrainConfig, evaluate, train
from recfx.types import NUM_SAMPLES, Batch
from tests.conftest import BATCH_SIZE, FEATURES, NUM_NUMERIC, deepfm_batches, deepfm_step
from tests.loop import Log, MemoryIterator, MemoryReader, fresh, go, interrupt, last_bytes, reader_of, saved
from tests.reference import exact_auc, random_samples
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


# In which order.


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


# Metrics and evaluation.


def test_metrics_start_from_zero_in_every_epoch(tmp_path):
    def look(event: str, progress: Progress, state: TrainState) -> None:
        counted.append((event, int(state.metrics.sums[0]), progress.loss))

    counted: list = []
    _, progress = go(tmp_path, reader_of(3), train_epoch=2, log_steps=1, listener=look)
    assert [n for event, n, _ in counted if event == "before_epoch"] == [0, 0]
    assert [n for event, n, _ in counted if event == "log"] == [BATCH_SIZE * i for i in (1, 2, 3)] * 2
    assert all(loss > 0 for event, _, loss in counted if event == "log")
    assert progress.loss == counted[-1][2]


def test_loss_and_auc_of_the_last_epoch_are_known_at_the_end(tmp_path):
    """Also when there were fewer steps than log_steps."""
    state, progress = go(tmp_path, reader_of(3), train_epoch=2)
    assert (progress.loss, progress.auc) == (metrics.log_loss(state.metrics), metrics.auc(state.metrics))
    assert progress.loss > 0
    assert 0 < progress.auc < 1


def leaves(state: TrainState) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(state)


def test_evaluate_changes_no_byte_of_the_state(tmp_path):
    """Ids it has never seen included, and not even in the middle of an accumulation window."""
    step = deepfm_step(accumulation=2)
    state = fresh(step)
    for batch in deepfm_batches(3, seed=5):
        state, _ = step.update_(state, batch)
    assert int(state.window.num_batches) == 1
    assert int(state.metrics.sums[0]) > 0
    before, tensors = [t.clone() for t in leaves(state)], leaves(state)
    held_out = deepfm_batches(4, seed=9, ids=tuple(range(20, 90)), short_last=True)
    first, again = (evaluate(step.evaluate_, state, held_out) for _ in range(2))
    assert first == again
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(a is b for a, b in zip(tensors, leaves(state), strict=True))


def test_evaluate_against_exact_values():
    step = deepfm_step()
    state = fresh(step)
    for batch in deepfm_batches(6, seed=5):
        state, _ = step.update_(state, batch)
    held_out = deepfm_batches(20, seed=9, short_last=True)
    values = evaluate(step.evaluate_, state, held_out)
    logit, label = ([], [])
    for batch in held_out:
        num = int(batch[NUM_SAMPLES])
        logit.append(step.evaluate_(state, batch)[1].logit[:num, 0].double())
        label.append(batch["label"][:num, 0].double())
    logit, label = torch.cat(logit), torch.cat(label)
    assert values["num_samples"] == len(label) == 20 * BATCH_SIZE - BATCH_SIZE // 2 - 1
    assert values["auc"] == pytest.approx(exact_auc(logit, label), abs=1e-3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
    assert values["log_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert values["calibration"] == pytest.approx(float(logit.sigmoid().sum() / label.sum()), rel=1e-5)


@pytest.mark.parametrize("eval_steps", [1, 3, 99])
def test_eval_steps(eval_steps):
    step = deepfm_step()
    reader = reader_of(5)
    values = evaluate(step.evaluate_, fresh(step), reader, eval_steps=eval_steps)
    assert values["num_samples"] == BATCH_SIZE * min(eval_steps, 5)


@pytest.mark.parametrize(
    ("batches", "eval_steps", "message"),
    [
        ([], None, "batches: got none from .*, expected one at least. There is nothing to evaluate"),
        (deepfm_batches(1), 0, "eval_steps: got 0, expected at least 1"),
    ],
)
def test_nothing_to_evaluate(batches, eval_steps, message):
    step = deepfm_step()
    state = fresh(step)
    state.metrics.sums.fill_(3)
    with pytest.raises(ValueError, match=message):
        evaluate(step.evaluate_, state, batches, eval_steps=eval_steps)
    assert state.metrics.sums.tolist() == [3] * 6


def test_evaluating_changes_nothing_in_training(tmp_path):
    held_out = deepfm_batches(3, seed=9, ids=tuple(range(20, 90)))
    step = deepfm_step()
    go(tmp_path / "with", reader_of(5), train_epoch=2, evaluate_with=lambda s: evaluate(step.evaluate_, s, held_out))
    go(tmp_path / "without", reader_of(5), train_epoch=2)
    assert last_bytes(tmp_path / "with") == last_bytes(tmp_path / "without")


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


# ctrl-C.


@pytest.mark.parametrize("event", ["before_step", "log", "after_step"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ctrl_c_finishes_the_step_saves_and_says_so(tmp_path, event, accumulation):
    log = Log((event, 3), interrupt)
    reader = reader_of(12)
    before = signal.getsignal(signal.SIGINT)
    state, progress = go(
        tmp_path, reader, accumulation=accumulation, listener=log, log_steps=1,
        evaluate_with=lambda state: pytest.fail("evaluated after ctrl-C"),
    )  # fmt: skip
    steps = 4 if event == "before_step" else 3
    assert (progress.step, progress.stopped) == (steps, "interrupted")
    assert int(state.dense.step) == steps
    assert saved(tmp_path) == [steps]
    assert log.names()[-2:] == ["before_save", "after_save"]
    assert "after_epoch" not in log.names()
    assert reader.closed == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_middle_of_a_window(tmp_path):
    calls = []
    step = deepfm_step(accumulation=3)

    def run(state: TrainState, batch: Batch) -> Any:
        calls.append(len(calls))
        if len(calls) == 5:
            interrupt()
        return step.update_(state, batch)

    config = TrainConfig(output_dir=str(tmp_path))
    state, progress = train(step, run, fresh(step), reader_of(12), config)
    assert (len(calls), progress.step, progress.stopped) == (6, 2, "interrupted")
    assert int(state.window.num_batches) == 0


def test_ctrl_c_between_epochs(tmp_path):
    """No step of the next epoch is run; without a next epoch, training is over."""
    for epochs, stopped in ((2, "interrupted"), (1, "")):
        log = Log(("before_evaluation", 3), interrupt)
        folder = tmp_path / str(epochs)
        _, progress = go(folder, reader_of(3), train_epoch=epochs, listener=log, evaluate_with=lambda state: {"auc": 1})
        assert (progress.step, progress.epoch, progress.stopped) == (3, 1, stopped)
        assert saved(folder) == [3]


def test_a_second_ctrl_c_raises(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, reader_of(5), listener=Log(("before_step", 2), lambda: (interrupt(), interrupt())))
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread(tmp_path):
    """Where Python delivers no signals, the loop runs without them."""
    out: list = []
    thread = threading.Thread(target=lambda: out.append(go(tmp_path, reader_of(3))[1].step))
    thread.start()
    thread.join()
    assert out == [3]
