"""The loop around a captured step: epochs, logging, evaluation, checkpoints, signals."""

from __future__ import annotations

import errno
import itertools
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from recfx import checkpoint, metrics
from recfx.checkpoint.folders import FolderLock
from recfx.checks import check_int, check_type
from recfx.metrics import BinaryCounts
from recfx.run_checks import (
    check_new,
    check_not_trained,
    check_program,
    check_reader,
    check_run,
    data_of,
    described_by,
    times_trained,
    without_warning,
)
from recfx.step import Step, TrainState
from recfx.train.labels import check_held_out_labels, check_labels, find_bad_label
from recfx.train.nonfinite import check_finite, find_nonfinite, is_stopped
from recfx.types import NUM_SAMPLES, Batch

__all__ = [
    "Event",
    "Progress",
    "Reader",
    "TrainConfig",
    "check_finite",
    "check_labels",
    "check_output",
    "evaluate",
    "read_metrics",
    "reset_metrics_",
    "train",
]

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOM_BYTES = 2**20  # written to the output folder, and deleted, to see whether it has any room

Run = Callable[[TrainState, Batch], tuple[TrainState, Any]]
RunSteps = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Any]]
Event = Literal[
    "before_epoch", "after_epoch", "before_step", "after_step", "log", "before_save", "after_save", "before_evaluation",
    "after_evaluation",
]  # fmt: skip


class Reader(Protocol):
    """Epochs of batches, by number from 0, that can be entered anywhere; an iterator has a JSON-able `position`.

    It may have an `identity`, a str: positions of a reader with another identity are not read. Without, they all are.
    It may have `described`, a str that names its data in errors; so may its iterators, of their position.
    """

    def epoch(self, number: int) -> Any: ...

    def start_at(self, position: dict) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the loop does besides stepping; names are the seed system's. Steps are optimiser steps.

    Args:     output_dir: where checkpoints go.  log_steps: steps between log events.
              save_steps: steps between checkpoints; one is saved at the end, and when ctrl-C, SIGTERM or SIGHUP ends
              the run.
              train_steps: stop after so many steps, counted from the state that `train` was given; None: after the
              data. With resume=True they are counted from where the interrupted call began. After a call that
              reached them, one with the same reader trains nothing more.  train_epoch: passes over the data.
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
    """Where training stands; what event listeners are shown.

    Wherever a person reads of an epoch, in bars, log lines and errors, the first one is epoch 1: `epoch_number`, and
    `epoch_text`. `epoch` is the index in code, from 0, as `reader.epoch(0)` and the `loop` of a checkpoint have it.
    """

    epoch: int = 0  # how many epochs are complete; so also the index, from 0, of the one in progress
    epoch_number: int = 0  # the epoch in progress or, between two, the one before, from 1; 0: none has begun
    num_epochs: int = 0  # `TrainConfig.train_epoch`
    step: int = 0  # optimiser steps since the model began, `TrainState.step`
    num_samples: int = 0  # real samples trained in this run, all of them
    timed_samples: int = 0  # of these, the ones in `seconds`: all but the first call's, which waits for the compiler
    seconds: float = 0.0  # that they took, with reading and logging, without saving, evaluating and compiling
    first_step_s: float = 0.0  # of this run, with the time that compiling it took
    train_s: float = 0.0
    loss: float = float("nan")  # mean over the samples since the epoch began
    auc: float = float("nan")
    num_nonfinite: int = 0  # micro-batches with NaN or infinity, which `on_nonfinite="skip"` leaves out
    stopped: str = ""  # "train_steps", "interrupted" or ""
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def samples_per_s(self) -> float:
        """Over `timed_samples`; NaN before there are any."""
        return self.timed_samples / self.seconds if self.seconds else float("nan")

    @property
    def epoch_text(self) -> str:
        """The epoch for people: "epoch 1 of 3"."""
        return f"epoch {self.epoch_number} of {max(self.num_epochs, self.epoch_number)}"


def train(
    step: Step,
    run: Run | RunSteps,
    state: TrainState,
    reader: Reader,
    config: TrainConfig,
    *,
    steps_per_replay: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    evaluate_with: Callable[[TrainState], dict[str, float]] | None = None,
    on_event: Callable[[Event, Progress, TrainState], None] = lambda *_: None,
) -> tuple[TrainState, Progress]:
    """Trains until the data, the epochs or `train_steps` end. Ctrl-C, SIGTERM and SIGHUP finish the step and save.

    Args:     run: `step.update_` or its capture.  state: freshly initialised, or loaded.
              steps_per_replay: above 1, `run` is what `capture_steps` made for as many, and is given so many batches at
              once; fewer before a sweep, a log line, a checkpoint, the last of `train_steps` and the end of the data.
              Events of steps then come once a call, and a signal finishes it.
              resume: continue from the newest checkpoint in output_dir, if there is one. When this reader wrote it, the
              bytes are the same as never having stopped. When a run over other data ended with it, this run begins
              at the start of its data.
              overwrite: delete the checkpoints in output_dir before the first step.
              evaluate_with: state -> values by name, called after every epoch and after `train_steps`; a resumed run
              that has nothing left to train is evaluated too. Torch's generators come out of it as they were.
              on_event: told of every phase.
    Returns:  the state after the last step, and where training stands.
    Raises:   ValueError when steps_per_replay is below 1, there is nothing to train on, output_dir holds checkpoints
              and neither resume, overwrite nor a state loaded from there says what to do, or it holds some to resume
              from and the state is loaded or trained already, or the newest one was saved in the middle of other data,
              or when labels were outside [0, 1], before or in this call, see `check_labels`; FloatingPointError when
              the step met NaN or infinity, before or in this call, and is to stop, see `check_finite`; OSError when
              output_dir cannot be written, see `check_output`; what `run`, the reader, a listener and the checkpoint
              raise. A save that is being written is waited for.
    """
    if type(steps_per_replay) is not int or steps_per_replay < 1:
        raise ValueError(f"steps_per_replay: got {steps_per_replay!r}, expected at least 1, an int.")
    check_program(step, state, "The order is (step, run, state, reader, config).")
    check_run(run, state, "step.update_")
    check_reader(reader)
    check_type("config", config, TrainConfig)
    check_output(config, int(state.step), resume=resume, overwrite=overwrite)
    identity, described = getattr(reader, "identity", None), described_by(reader)
    progress, position = Progress(step=int(state.step), num_epochs=config.train_epoch), None
    begun, began = time.perf_counter(), progress.step
    looked: tuple[int, dict | None] = progress.step, None  # where all was finite: step, position in this epoch
    saving = False

    def where_labels() -> str:
        """The steps since the last look, and such a label read again."""
        before, position = looked
        num, last = (progress.step - before) * step.accumulation, progress.step
        steps = f" in step {last}" if last == before + 1 else f" in steps {before + 1} to {last}"
        if not num:  # evaluate_with has counted them
            return ""
        try:
            batches = reader.epoch(progress.epoch) if position is None else reader.start_at(position)
            try:
                return steps + find_bad_label(step, state, batches, num, position, progress.epoch)
            finally:
                batches.close()
        except Exception as error:  # only the message suffers
            return f"{steps}, which could not be read again ({str(error) or type(error).__name__})"

    def look(position: dict | None) -> None:
        """Raises when a step since the last look met a label outside [0, 1], NaN or infinity."""
        nonlocal looked
        check_labels(step, state, where=where_labels)
        if is_stopped(step, state):
            batch, where = find_nonfinite(step, state, reader, progress.epoch, *looked)
            check_finite(step, state, batch=batch, where=where)
        looked = progress.step, position

    def save(position: dict | None, *, is_end: bool = False) -> None:
        nonlocal saving
        saved(wait=True)
        look(position)
        on_event("before_save", progress, state)
        write = saver.save_in_background if config.save_in_background else saver.save
        of_reader = {"position": position, "reader": identity, "data": described, "began": began, "ended": is_end}
        write(state, number=progress.step, loop={"epoch": progress.epoch, **of_reader})
        saving = True
        saved()

    def save_unless_last(stream: Iterator[Batch], position: dict) -> Iterator[Batch]:
        """Saves between two batches. After the last one the epoch's end saves, with the place of the next epoch."""
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
            steps = min(steps, began + config.train_steps - progress.step)
        return min(steps_per_replay, steps * step.accumulation - window)

    def after_steps(num: int, position: dict | None) -> None:
        progress.step += num
        step.sweep_(state, progress.step)
        if progress.step % config.log_steps == 0:
            look(position)
            read_metrics(progress, state)
            on_event("log", progress, state)
        on_event("after_step", progress, state)

    def should_stop() -> bool:
        if config.train_steps is not None and progress.step - began >= config.train_steps:
            progress.stopped = "train_steps"
        elif interrupted:
            progress.stopped = "interrupted"
        return bool(progress.stopped)

    def evaluate_now() -> None:
        if evaluate_with is not None and progress.stopped != "interrupted":
            on_event("before_evaluation", progress, state)
            with torch.random.fork_rng([state.step.device] if state.step.is_cuda else []):
                progress.evaluation = evaluate_with(state)
            on_event("after_evaluation", progress, state)

    keep = {"max_to_keep": config.max_to_keep, "full_every": config.full_save_every}
    with checkpoint.Saver(config.output_dir, step, **keep) as saver, _interrupts() as interrupted:
        found = checkpoint.latest(config.output_dir)
        if found is not None and resume:
            check_new(state, found)
            state, loop = checkpoint.load(found, step, state)
            progress.step = began = int(state.step)
            if loop.get("reader", identity) == identity:
                progress.epoch, position = loop.get("epoch", 0), loop.get("position")
                began = loop.get("began", 0)
            elif not loop.get("ended"):
                got, expected = data_of(described, identity), data_of(loop.get("data"), loop["reader"])
                raise ValueError(
                    f"reader: got {got}, expected {expected}{' as it was' if got == expected else ''}: {found} was "
                    "saved in the middle of other data, the rest of which would never be trained. Finish it with its "
                    "reader, or leave it: give train a state loaded from there, without resume."
                )
        progress.epoch_number = progress.epoch + (position is not None)
        check_finite(step, state, where=", before this call of train")
        started, looked = progress.step, (progress.step, position)
        if should_stop() or progress.epoch >= config.train_epoch:
            if progress.stopped != "interrupted":
                warnings.warn(
                    f"recfx: nothing is left to train: {found} has come to the end of what was asked for. Give other "
                    "data, more epochs or more steps.",
                    stacklevel=2,
                )
            evaluate_now()
        while progress.epoch < config.train_epoch and not should_stop():
            reset_metrics_(state)
            progress.epoch_number = progress.epoch + 1
            on_event("before_epoch", progress, state)
            batches = reader.epoch(progress.epoch) if position is None else reader.start_at(position)
            if not progress.first_step_s:
                without_warning(batches)
            stream = iter(batches)
            window = 0  # micro-batches of the open accumulation window
            clock = time.perf_counter()
            while some := list(itertools.islice(stream, most_batches(window))):
                if overwrite and progress.step == began:  # now there is something to train on
                    saver.delete_all()
                if window == 0 or window + len(some) > step.accumulation:
                    on_event("before_step", progress, state)
                state = run_all(state, some)
                clock = _count(progress, some, clock, run)
                position, (num_steps, window) = batches.position, divmod(window + len(some), step.accumulation)
                if num_steps == 0:
                    continue
                after_steps(num_steps, position)
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
                    after_steps(1, position)
                look(position)
                progress.epoch, position = progress.epoch + 1, None
                looked = progress.step, None
                on_event("after_epoch", progress, state)
                goes_on = progress.epoch < config.train_epoch
                stops = bool(goes_on or window) and should_stop()  # a window that was flushed may be the last step
                if goes_on and not stops and progress.step % config.save_steps == 0:
                    save(position)
            try:
                evaluate_now()
            except Exception:  # held-out data that cannot be read must not cost what was trained
                save(position, is_end=progress.epoch >= config.train_epoch)
                raise
        read_metrics(progress, state)
        progress.train_s = time.perf_counter() - begun
        if progress.step > started or progress.stopped != "interrupted":
            save(position, is_end=progress.stopped != "interrupted" or progress.epoch >= config.train_epoch)
        saved(wait=True)
    return state, progress


def check_output(config: TrainConfig, step: int = 0, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raises what `train` raises of output_dir; a program calls it before it compiles, which takes longer.

    Makes the folder where there is none, and writes a temporary file of 1 MiB into it.

    Args:     step: that the run begins at.  resume, overwrite: as of `train`.
    Raises:   NotADirectoryError when output_dir is a file or below one; OSError when it cannot be written or has no
              room; BlockingIOError when another process saves there; ValueError when it holds checkpoints and neither
              resume nor overwrite is given, or both are.
    """
    if resume and overwrite:
        raise ValueError("overwrite: got True with resume=True, expected one of them. A run goes on or begins again.")
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM_BYTES))
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            errno.ENOTDIR, f"output_dir: got '{folder}', a file or below one, expected a folder. Choose another path."
        ) from error
    except OSError as error:
        raise type(error)(
            error.errno,
            f"output_dir: got '{folder}', where nothing can be written ({error.strerror or error}), expected a folder "
            "for checkpoints. Nothing was trained. Choose another path, or make room there.",
        ) from error
    FolderLock(folder).release()
    found = None if resume or overwrite else checkpoint.latest(folder)
    if found is not None:
        _check_follows(found, step, config.output_dir)


def _check_follows(found: Path, step: int, folder: str) -> None:
    """Checkpoints are ordered by their steps: a run whose numbers begin below those in its folder would be lost."""
    newest = int(found.name.rpartition("-")[2])
    if step == 0 or step < newest:
        raise ValueError(
            f"output_dir: got '{folder}', which holds {found.name}, for a run that begins at step {step}, expected a "
            "folder without checkpoints that are as new. Give resume=True (--resume) to go on from there, "
            "overwrite=True (--overwrite) to delete them, or another output_dir."
        )


def evaluate(
    run: Run, state: TrainState, batches: Iterable[Batch], *, eval_steps: int | None = None
) -> dict[str, float]:
    """AUC, log loss, calibration and number of samples of held-out batches; the state's own metrics come out unchanged.

    AUC, log loss and calibration are NaN when a logit or loss was not finite; `num_nonfinite` counts those samples.
    Padding of a short batch counts for nothing: give a reader with drop_remainder=False, and every row is evaluated.

    Args:     run: `step.evaluate_` or its capture.  eval_steps: batches to read; None: all.
    Raises:   ValueError when there is no batch, eval_steps is below 1, or a label is outside [0, 1] and the step is one
              that checks labels: it says in which batch, which is read again where `batches` can be.
    """
    if eval_steps is not None:
        check_int("eval_steps", eval_steps, 1)
    check_run(run, state, "step.evaluate_")
    check_type("batches", batches, Iterable, "Give a reader, or a list of batches.")
    stream, before = iter(batches), times_trained(state)
    without_warning(stream)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"batches: got none from {stream}, expected one at least. There is nothing to evaluate.")
    kept, num = [t.clone() for t in state.metrics], 0
    try:
        reset_metrics_(state)
        for batch in itertools.islice(itertools.chain([first], stream), eval_steps):
            state, _ = run(state, batch)
            num += 1
        check_not_trained(before, state)
        values = _values_of(state.metrics)
        check_held_out_labels(metrics.num_bad_labels(state.metrics), run, state, batches, num)
    finally:
        for target, source in zip(state.metrics, kept, strict=True):
            target.copy_(source)
    return values


def _values_of(counts: BinaryCounts) -> dict[str, float]:
    return {
        "auc": metrics.auc(counts),
        "log_loss": metrics.log_loss(counts),
        "calibration": metrics.calibration(counts),
        "num_samples": float(counts.sums[0]),
        "num_nonfinite": float(metrics.num_nonfinite(counts)),
    }


def read_metrics(progress: Progress, state: TrainState) -> None:
    """Loss and AUC since the metrics were last reset, and what was left out, read from the device."""
    progress.loss, progress.auc = metrics.log_loss(state.metrics), metrics.auc(state.metrics)
    progress.num_nonfinite = int(state.nonfinite.num_batches)


def reset_metrics_(state: TrainState) -> None:
    """Counts of the next phase start from zero."""
    for t in state.metrics:
        t.zero_()


def _count(progress: Progress, batches: list[Batch], clock: float, run: Any) -> float:
    now, num = time.perf_counter(), sum(int(batch[NUM_SAMPLES]) for batch in batches)
    progress.num_samples += num
    compile_s = run.take_compile_s() if hasattr(run, "take_compile_s") else 0.0  # a layout may be new at any step
    if progress.first_step_s:
        progress.timed_samples += num
        progress.seconds += now - clock - compile_s
    else:
        progress.first_step_s = now - clock + compile_s
    return now


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects ctrl-C, SIGTERM and SIGHUP instead of raising, so that a step is never cut in half.

    A second one of the same kind raises: supervisors send SIGTERM and SIGHUP together. A signal that the process was
    started to ignore, as `nohup` does with SIGHUP, stays ignored, and one that is handled outside Python is left alone:
    its handler could not be put back.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if number in received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
