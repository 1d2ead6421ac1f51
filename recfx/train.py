"""The loop around a captured step: epochs, logging, evaluation, checkpoints, ctrl-C."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from recfx import checkpoint, metrics
from recfx.checks import check_int, check_type
from recfx.metrics import BinaryCounts
from recfx.run_checks import check_not_trained, check_program, check_reader, check_run, times_trained
from recfx.step import Step, TrainState
from recfx.types import NUM_SAMPLES, Batch

__all__ = ["Event", "Progress", "Reader", "TrainConfig", "evaluate", "read_metrics", "reset_metrics_", "train"]

Run = Callable[[TrainState, Batch], tuple[TrainState, Any]]
RunSteps = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Any]]
Event = Literal[
    "before_epoch", "after_epoch", "before_step", "after_step", "log", "before_save", "after_save", "before_evaluation",
    "after_evaluation",
]  # fmt: skip


class Reader(Protocol):
    """Epochs of batches, by number, that can be entered anywhere; an iterator has a JSON-able `position`."""

    def epoch(self, number: int) -> Any: ...

    def start_at(self, position: dict) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the loop does besides stepping; names are the seed system's. Steps are optimiser steps.

    Args:     output_dir: where checkpoints go.  log_steps: steps between log events.
              save_steps: steps between checkpoints; one is saved at the end and on ctrl-C in any case.
              train_steps: stop after so many steps in all; None: after the data.  train_epoch: passes over the data.
              max_to_keep: checkpoints kept.  full_save_every: of so many saves one holds every row, see `Saver`.
              save_in_background: training goes on while a checkpoint is written, see `Saver`.
    Raises:   TypeError when a count is no int, ValueError when it is below 1.
    """

    output_dir: str = "./ckpt"
    log_steps: int = 10
    save_steps: int = 2000
    train_steps: int | None = None
    train_epoch: int = 1
    max_to_keep: int = 5
    full_save_every: int = 1
    save_in_background: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("output_dir", "save_in_background") or (name == "train_steps" and value is None):
                continue
            check_int(name, value, 1)


@dataclass
class Progress:
    """Where training stands; what event listeners are shown."""

    epoch: int = 0
    step: int = 0
    num_samples: int = 0  # of this run, the first call left out: it waits for the compiler
    seconds: float = 0.0  # that they took, reading and logging included, saving and evaluating left out
    first_step_s: float = 0.0
    train_s: float = 0.0
    loss: float = float("nan")  # mean over the samples since the epoch began
    auc: float = float("nan")
    stopped: str = ""  # "train_steps", "interrupted" or ""
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def samples_per_s(self) -> float:
        return self.num_samples / self.seconds if self.seconds else float("nan")


def train(
    step: Step,
    run: Run | RunSteps,
    state: TrainState,
    reader: Reader,
    config: TrainConfig,
    *,
    steps_per_replay: int = 1,
    resume: bool = False,
    evaluate_with: Callable[[TrainState], dict[str, float]] | None = None,
    on_event: Callable[[Event, Progress, TrainState], None] = lambda *_: None,
) -> tuple[TrainState, Progress]:
    """Trains until the data, the epochs or `train_steps` end, or ctrl-C, which finishes the step and saves.

    Args:     run: `step.update_` or its capture.  state: freshly initialised.
              steps_per_replay: above 1, `run` is what `capture_steps` made for as many, and is given so many batches at
              once; fewer before a sweep, a log line, a checkpoint, the last of `train_steps` and the end of the data.
              Events of steps then come once a call, and ctrl-C finishes it.
              resume: continue from the newest checkpoint in output_dir, if there is one: the same bytes as never
              having stopped.
              evaluate_with: state -> values by name, called after every epoch and after `train_steps`; a resumed run
              that has nothing left to train is evaluated too.  on_event: told of every phase.
    Returns:  the state after the last step, and where training stands.
    Raises:   ValueError when steps_per_replay is below 1 or there is nothing to train on; what `run`, the reader, a
              listener and the checkpoint raise. A save that is being written is waited for.
    """
    if type(steps_per_replay) is not int or steps_per_replay < 1:
        raise ValueError(f"steps_per_replay: got {steps_per_replay!r}, expected at least 1, an int.")
    check_program(step, state, "The order is (step, run, state, reader, config).")
    check_run(run, state, "step.update_")
    check_reader(reader)
    check_type("config", config, TrainConfig)
    progress, position = Progress(), None
    begun = time.perf_counter()
    saving = False

    def save(position: dict | None) -> None:
        nonlocal saving
        saved(wait=True)
        on_event("before_save", progress, state)
        write = saver.save_in_background if config.save_in_background else saver.save
        write(state, number=progress.step, loop={"epoch": progress.epoch, "position": position})
        saving = True
        saved()

    def save_unless_last(stream: Iterator[Batch], position: dict) -> Iterator[Batch]:
        """Saves between two batches. Behind the last one the epoch's end saves, with the place of the next epoch."""
        try:
            following = list(itertools.islice(stream, 1))
        except Exception:
            save(position)
            raise
        if following:
            save(position)
        return itertools.chain(following, stream)

    def saved(*, wait: bool = False) -> None:
        """Tells of a save that is on disk."""
        nonlocal saving
        if saving and (wait or not saver.busy):
            saver.finish()
            saving = False
            on_event("after_save", progress, state)

    def run_all(state: TrainState, batches: list[Batch]) -> TrainState:
        return run(state, batches[0] if steps_per_replay == 1 else batches)[0]  # type: ignore[arg-type]

    def most_batches(window: int) -> int:
        """Batches that may be run before the loop has to look at the state."""
        intervals = config.log_steps, config.save_steps, step.sweep_every or config.save_steps
        steps = 1 if interrupted else min(n - progress.step % n for n in intervals)
        if config.train_steps is not None:
            steps = min(steps, config.train_steps - progress.step)
        return min(steps_per_replay, steps * step.accumulation - window)

    def after_steps(num: int) -> None:
        progress.step += num
        step.sweep_(state, progress.step)
        if progress.step % config.log_steps == 0:
            read_metrics(progress, state)
            on_event("log", progress, state)
        on_event("after_step", progress, state)

    def should_stop() -> bool:
        if config.train_steps is not None and progress.step >= config.train_steps:
            progress.stopped = "train_steps"
        elif interrupted:
            progress.stopped = "interrupted"
        return bool(progress.stopped)

    def evaluate_now() -> None:
        if evaluate_with is not None and progress.stopped != "interrupted":
            on_event("before_evaluation", progress, state)
            progress.evaluation = evaluate_with(state)
            on_event("after_evaluation", progress, state)

    keep = {"max_to_keep": config.max_to_keep, "full_every": config.full_save_every}
    with checkpoint.Saver(config.output_dir, step, **keep) as saver, _interrupts() as interrupted:
        found = checkpoint.latest(config.output_dir) if resume else None
        if found is not None:
            state, loop = checkpoint.load(found, step, state)
            progress.step, progress.epoch, position = loop["step"], loop["epoch"], loop["position"]
        if progress.epoch >= config.train_epoch or should_stop():
            evaluate_now()
        while progress.epoch < config.train_epoch and not should_stop():
            reset_metrics_(state)
            on_event("before_epoch", progress, state)
            batches = reader.epoch(progress.epoch) if position is None else reader.start_at(position)
            stream = iter(batches)
            window = 0  # micro-batches of the open accumulation window
            clock = time.perf_counter()
            while some := list(itertools.islice(stream, most_batches(window))):
                if window == 0 or window + len(some) > step.accumulation:
                    on_event("before_step", progress, state)
                state = run_all(state, some)
                clock = _count(progress, some, clock)
                position, (num_steps, window) = batches.position, divmod(window + len(some), step.accumulation)
                if num_steps == 0:
                    continue
                after_steps(num_steps)
                saved()
                if not window and should_stop():
                    batches.close()
                    break
                if progress.step % config.save_steps == 0:
                    stream = save_unless_last(stream, position)
                    clock = time.perf_counter()
            else:
                if position is None and not progress.first_step_s:
                    raise ValueError(
                        f"reader: got no batch from {batches}, expected one at least. Nothing would be trained. Give "
                        "more rows, a smaller batch_size, or drop_remainder=False."
                    )
                if window:
                    state = step.flush_(state)
                    after_steps(1)
                progress.epoch, position = progress.epoch + 1, None
                on_event("after_epoch", progress, state)
                goes_on = progress.epoch < config.train_epoch
                stops = bool(goes_on or window) and should_stop()  # a window that was flushed may be the last step
                if goes_on and not stops and progress.step % config.save_steps == 0:
                    save(position)
            evaluate_now()
        read_metrics(progress, state)
        progress.train_s = time.perf_counter() - begun
        save(position)
        saved(wait=True)
    return state, progress


def evaluate(
    run: Run, state: TrainState, batches: Iterable[Batch], *, eval_steps: int | None = None
) -> dict[str, float]:
    """AUC, log loss, calibration and number of samples of held-out batches; the state's own metrics come out unchanged.

    Args:     run: `step.evaluate_` or its capture.  eval_steps: batches to read; None: all.
    Raises:   ValueError when there is no batch, or eval_steps is below 1.
    """
    if eval_steps is not None:
        check_int("eval_steps", eval_steps, 1)
    check_run(run, state, "step.evaluate_")
    check_type("batches", batches, Iterable, "Give a reader, or a list of batches.")
    stream, before = iter(batches), times_trained(state)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"batches: got none from {stream}, expected one at least. There is nothing to evaluate.")
    kept = state._replace(metrics=BinaryCounts(*(t.clone() for t in state.metrics)))
    reset_metrics_(state)
    for batch in itertools.islice(itertools.chain([first], stream), eval_steps):
        state, _ = run(state, batch)
    check_not_trained(before, state)
    counts = state.metrics
    values = {
        "auc": metrics.auc(counts),
        "log_loss": metrics.log_loss(counts),
        "calibration": metrics.calibration(counts),
        "num_samples": float(counts.sums[0]),
    }
    for target, source in zip(state.metrics, kept.metrics, strict=True):
        target.copy_(source)
    return values


def read_metrics(progress: Progress, state: TrainState) -> None:
    """Loss and AUC since the metrics were last reset, read from the device."""
    progress.loss, progress.auc = metrics.log_loss(state.metrics), metrics.auc(state.metrics)


def reset_metrics_(state: TrainState) -> None:
    """Counts of the next phase start from zero."""
    for t in state.metrics:
        t.zero_()


def _count(progress: Progress, batches: list[Batch], clock: float) -> float:
    now = time.perf_counter()
    if progress.first_step_s:
        progress.num_samples += sum(int(batch[NUM_SAMPLES]) for batch in batches)
        progress.seconds += now - clock
    else:
        progress.first_step_s = now - clock
    return now


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects ctrl-C instead of raising it, so that a step is never cut in half. A second one raises."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
