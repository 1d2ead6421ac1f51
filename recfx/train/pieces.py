"""The pieces of the loop: a run, an epoch, a step, a save, an evaluation."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recfx import checkpoint
from recfx.step import Step, TrainState
from recfx.train.checks import Run, RunSteps, check_new, data_of, described_by, without_warning
from recfx.train.evaluation import read_metrics, reset_metrics_
from recfx.train.labels import check_labels, find_bad_label
from recfx.train.nonfinite import check_finite, find_nonfinite, is_stopped
from recfx.train.progress import Event, Progress, Reader, TrainConfig
from recfx.train.ranks import group_of
from recfx.train.stopping import Watch
from recfx.train.watching import MetricsFile, write_best
from recfx.types import NUM_SAMPLES, Batch

__all__ = ["EvaluateWith", "Loop", "OnEvent"]

OnEvent = Callable[[Event, Progress, TrainState], Any]  # "stop" ends the run, as `Progress.stop` does
EvaluateWith = Callable[[TrainState], dict[str, float]]


class Loop:
    """One call of `train`: its arguments, where training stands, and the pieces of the loop.

    state, progress: what `train` returns.
    group: the ranks that train together, or this process alone.
    position: of the reader within the epoch; None: at its start. Of many ranks it is read where it is needed: they
    exchange it.
    stops: whether a signal that came to any rank is to end the run: the same on all ranks.
    own_samples: real samples of this rank, all and timed, that `progress` does not count yet.
    window: micro-batches of the open accumulation window.
    began, started: the optimiser step that `train_steps` counts from, and the one this call begins at.
    checked: the last step after which all was finite and every label in [0, 1], and the position then.
    clock: when the last call of `run` ended.
    saving: whether a save has begun whose "after_save" is still to come; saved: its step.
    watch: what the run decides from its evaluations.  evaluated: the step of the last one in this call, -1: none.
    best_is_new: whether the last evaluation was the best one and no checkpoint of it has been saved.
    best_values: of the best evaluation in this call.
    in_epoch: steps of the epoch in progress that this call has trained, and whether that is all of them.
    epoch_steps: steps of a whole epoch, once one has been trained.
    """

    saver: checkpoint.Saver
    metrics_file: MetricsFile
    interrupted: list[int]  # signals received
    overwrite: bool

    def __init__(
        self,
        step: Step,
        run: Run | RunSteps,
        state: TrainState,
        reader: Reader,
        config: TrainConfig,
        steps_per_replay: int,
        evaluate_with: EvaluateWith | None,
        on_event: OnEvent,
    ) -> None:
        self.step, self.run, self.state, self.reader, self.config = step, run, state, reader, config
        self.steps_per_replay, self.evaluate_with, self.on_event = steps_per_replay, evaluate_with, on_event
        self.run_batches = run if steps_per_replay > 1 else lambda state, batches: run(state, batches[0])
        self.identity, self.described = getattr(reader, "identity", None), described_by(reader)
        self.progress = Progress(step=int(state.step), num_epochs=config.train_epoch)
        self.group, self.stops, self.own_samples = group_of(step), False, [0, 0]
        self.position: dict | None = None
        self.window = 0
        self.began = self.started = self.progress.step
        self.checked: tuple[int, dict | None] = self.progress.step, None
        self.begun_s = self.clock = time.perf_counter()
        self.saving, self.saved = False, -1
        self.watch, self.evaluated, self.best_is_new = Watch.of(config), -1, False
        self.best_values: dict[str, float] = {}
        self.in_epoch: tuple[int, bool] = 0, True
        self.epoch_steps: int | None = None

    # A run: it begins, has epochs, and ends.

    def resume_from(self, found: Path) -> None:
        """Continues from a checkpoint: in the middle of this reader's data, or at the start of other data."""
        check_new(self.state, found)
        self.state, loop = checkpoint.load(found, self.step, self.state)
        self.progress.step = self.began = int(self.state.step)
        if loop.get("reader", self.identity) == self.identity:
            self.progress.epoch, self.position = loop.get("epoch", 0), loop.get("position")
            self.began = loop.get("began", 0)
            self.watch.restore(loop.get("watch"))
        elif not loop.get("ended"):
            got, expected = data_of(self.described, self.identity), data_of(loop.get("data"), loop["reader"])
            raise ValueError(
                f"reader: got {got}, expected {expected}{' as it was' if got == expected else ''}: {found} was "
                "saved in the middle of other data, the rest of which would never be trained. Finish it with its "
                "reader, or leave it: give train a state loaded from there, without resume."
            )

    def evaluate_missed(self) -> None:
        """Evaluates where a resumed run was stopped before an evaluation that was due, so that it decides the same."""
        at_end = self.position is None and self.progress.epoch > 0
        is_due = 0 < self.progress.step > self.watch.evaluated and (at_end or self.is_evaluation_due())
        if self.watch.key is not None and is_due and not self.progress.stopped and not self.is_last_epoch_over():
            self.evaluate_or_save()

    def begin(self, found: Path | None) -> None:
        """Checks the state that training starts from. Where nothing is left to train, it is only evaluated."""
        progress = self.progress
        progress.epoch_number = progress.epoch + (self.position is not None)
        check_finite(self.step, self.state, where=", before this call of train")
        self.started = progress.step
        self.checked = progress.step, self.position
        self.hear_all()
        if self.should_stop() or self.is_last_epoch_over():
            if not progress.was_cut and self.group.is_first:
                warnings.warn(
                    f"recfx: nothing is left to train: {found} has come to the end of this run. Give other "
                    "data, more epochs or more steps.",
                    stacklevel=3,
                )
            self.evaluate()

    def has_more(self) -> bool:
        """Whether another epoch is to be run, or the rest of one. After the last one, nothing stops the run early."""
        self.hear_all()
        return not self.is_last_epoch_over() and not self.should_stop()

    def should_stop(self) -> bool:
        if self.config.train_steps is not None and self.progress.step - self.began >= self.config.train_steps:
            self.progress.stopped = "train_steps"
        elif self.watch.stops:
            self.progress.stopped = "stop_after"
        elif self.is_stopping:
            self.progress.stopped = "listener" if self.group.most([self.progress.asked_to_stop])[0] else "interrupted"
        return bool(self.progress.stopped)

    def hear_all(self) -> None:
        """Learns at a point where all ranks are, between their batches, whether one of them got a signal."""
        self.stops = bool(self.group.most([self.stops or self.was_asked])[0])

    @property
    def was_asked(self) -> bool:
        """Whether this rank got a signal, or its listener ends the run."""
        return bool(self.interrupted) or self.progress.asked_to_stop

    def end(self) -> None:
        """Saves what was trained."""
        progress = self.progress
        self.read_progress()
        progress.train_s = time.perf_counter() - self.begun_s
        if progress.step > self.started or not progress.was_cut:
            self.save(is_end=not progress.was_cut or self.is_last_epoch_over())
        self.report_saved(wait=True)
        self.metrics_file.end(progress, self.state)

    def is_last_epoch_over(self) -> bool:
        return self.progress.epoch >= self.config.train_epoch

    # An epoch: batches, steps, and its end.

    def run_epoch(self) -> None:
        """Trains on an epoch, or on the rest of one, and evaluates."""
        progress, reader = self.progress, self.reader
        reset_metrics_(self.state)
        progress.epoch_number = progress.epoch + 1
        self.tell("before_epoch")
        batches = reader.epoch(progress.epoch) if self.position is None else reader.start_at(self.position)
        if not progress.first_step_s:
            without_warning(batches)
        self.in_epoch = 0, self.position is None
        is_due = self.train_on(batches) and self.end_epoch(batches)
        self.evaluate_or_save()
        is_due = is_due or self.best_is_new
        if is_due and not self.is_last_epoch_over() and not self.should_stop():  # at its end a run saves anyway
            self.save()

    def train_on(self, batches: Any) -> bool:
        """Trains until the batches end, or until the run is to stop. Returns whether they have ended."""
        stream: Iterator[Batch] = iter(batches)
        self.window, self.clock = 0, time.perf_counter()
        while some := self.read_timed(batches, stream):
            num_steps = self.run_some(some)
            if self.group.world_size == 1 or self.is_position_due(num_steps):
                self.position = batches.position
            if num_steps == 0:
                continue
            self.after_steps(num_steps)
            self.report_saved()
            if not self.window and self.should_stop():
                batches.close()
                return False
            if self.progress.step % self.config.save_steps == 0 or self.best_is_new:
                stream = self.save_unless_last(batches, stream)
                self.clock = time.perf_counter()
        return True

    def read_timed(self, batches: Any, stream: Iterator[Batch]) -> list[Batch]:
        """The next batches, and the time that they took to come."""
        with self.timed("reading"):
            return self.read_some(batches, stream)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time of a block to `progress.times`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add_time(phase, time.perf_counter() - begun)

    def add_time(self, phase: str, seconds: float) -> None:
        self.progress.times[phase] = self.progress.times.get(phase, 0.0) + seconds

    def read_some(self, batches: Any, stream: Iterator[Batch], most: int | None = None) -> list[Batch]:
        """The next batches. Ranks tell each other with every batch whether one of them got a signal."""
        most = self.most_batches() if most is None else most
        if self.group.world_size == 1:
            return list(itertools.islice(stream, most))
        batches.interrupted = self.stops or self.was_asked
        some = list(itertools.islice(stream, most))
        self.stops = self.stops or bool(batches.is_interrupted)
        return some

    def is_position_due(self, num_steps: int) -> bool:
        """Whether the position is needed after so many more steps: to save it, or to read again what follows it."""
        config, step = self.config, self.progress.step + num_steps
        due = step % config.log_steps == 0 or step % config.save_steps == 0 or self.stops
        due = due or (config.eval_every is not None and step % config.eval_every == 0)
        return num_steps > 0 and (due or step - self.began == config.train_steps)

    @property
    def is_stopping(self) -> bool:
        """Whether a signal ends the run after this step. Of many ranks it is one that all of them know of."""
        return self.stops or (self.group.world_size == 1 and self.was_asked)

    def most_batches(self) -> int:
        """Batches that may be run before the loop has to look at the state."""
        config, accumulation, done = self.config, self.step.accumulation, self.progress.step
        whole = config.save_steps
        intervals = config.log_steps, whole, self.step.sweep_every or whole, config.eval_every or whole
        steps = 1 if self.is_stopping else min(n - done % n for n in intervals)
        if config.train_steps is not None:
            steps = min(steps, self.began + config.train_steps - done)
        return min(self.steps_per_replay, steps * accumulation - self.window)

    def run_some(self, batches: list[Batch]) -> int:
        """Runs micro-batches. Returns how many optimiser steps they completed."""
        accumulation = self.step.accumulation
        if self.overwrite and self.progress.step == self.began:  # now there is something to train on
            self.saver.delete_all()
        if self.window == 0 or self.window + len(batches) > accumulation:
            self.metrics_file.begin(self.progress, self.state)
            self.tell("before_step")
        begun = time.perf_counter()
        self.state, _ = self.run_batches(self.state, batches)  # type: ignore[arg-type]
        self.count(batches, begun)
        num_steps, self.window = divmod(self.window + len(batches), accumulation)
        return num_steps

    def count(self, batches: list[Batch], begun: float) -> None:
        """Counts the samples and the time of a call of `run`."""
        progress, now = self.progress, time.perf_counter()
        num = sum(int(batch[NUM_SAMPLES]) for batch in batches)
        self.own_samples[0] += num
        run: Any = self.run
        compile_s = run.take_compile_s() if hasattr(run, "take_compile_s") else 0.0  # any step may have a new layout
        if progress.first_step_s:
            self.own_samples[1] += num
            progress.seconds += now - self.clock - compile_s
        else:
            progress.first_step_s = now - self.clock + compile_s
        self.clock = now
        self.add_time("compiling", compile_s)
        self.add_time("training", now - begun - compile_s)
        if self.group.world_size == 1:
            self.add_samples()

    def add_samples(self) -> None:
        """Counts in `progress` the samples that all ranks have trained since it last did."""
        num, timed = self.group.sum_(torch.tensor(self.own_samples)).tolist()
        self.progress.num_samples += num
        self.progress.timed_samples += timed
        self.own_samples = [0, 0]

    def read_progress(self) -> None:
        """Loss, AUC and samples of all ranks."""
        self.add_samples()
        read_metrics(self.progress, self.state, group=self.group, tasks=self.step.tasks)

    def after_steps(self, num: int) -> None:
        progress = self.progress
        progress.step, progress.num_steps = progress.step + num, progress.num_steps + num
        self.in_epoch = self.in_epoch[0] + num, self.in_epoch[1]
        self.step.sweep_(self.state, progress.step)
        if progress.step % self.config.log_steps == 0:
            self.check()
            self.read_progress()
            self.count_left()
            self.metrics_file.log(progress, self.state)
            self.tell("log")
        if self.is_evaluation_due() and not self.is_stopping:
            self.check()
            self.evaluate_or_save()
            self.clock = time.perf_counter()
        self.tell("after_step")

    def is_evaluation_due(self) -> bool:
        """Whether an evaluation follows this step, besides that of an epoch's end."""
        return self.config.eval_every is not None and self.progress.step % self.config.eval_every == 0

    def count_left(self) -> None:
        """How many steps are left, where that is known."""
        progress, config, left = self.progress, self.config, None
        if self.epoch_steps is not None:
            left = max((config.train_epoch - progress.epoch) * self.epoch_steps - self.in_epoch[0], 0)
        if config.train_steps is not None:
            most = self.began + config.train_steps - progress.step
            left = most if left is None else min(left, most)
        progress.steps_left = left

    def end_epoch(self, batches: Any) -> bool:
        """Completes the last accumulation window. Returns whether a save is due, and another epoch follows.

        Where nothing is watched it is saved here, before the evaluation.
        """
        progress = self.progress
        if self.position is None and not progress.first_step_s:
            raise ValueError(
                f"reader: got no batch from {batches}, expected one at least. Nothing would be trained. Give "
                "more rows, a smaller batch_size, or drop_remainder=False."
            )
        if self.window:
            self.state = self.step.flush_(self.state)
            self.after_steps(1)
        self.check()
        self.add_samples()
        self.epoch_steps = self.in_epoch[0] if self.in_epoch[1] else self.epoch_steps
        progress.epoch, self.position = progress.epoch + 1, None
        self.checked = progress.step, None
        self.tell("after_epoch")
        self.hear_all()
        goes_on = not self.is_last_epoch_over()
        stops = bool(goes_on or self.window) and self.should_stop()  # a window that was flushed may be the last step
        is_due = goes_on and not stops and progress.step % self.config.save_steps == 0
        if is_due and self.watch.key is None:
            self.save()
            return False
        return is_due

    # Saving, checking, evaluating.

    def save(self, *, is_end: bool = False) -> None:
        with self.timed("saving"):
            self._save(is_end=is_end)

    def _save(self, *, is_end: bool) -> None:
        self.report_saved(wait=True)
        self.check()
        self.tell("before_save")
        write = self.saver.save_in_background if self.config.save_in_background else self.saver.save
        of_reader = {"position": self.position, "reader": self.identity, "data": self.described}
        of_run: dict[str, Any] = {"epoch": self.progress.epoch, "began": self.began, "ended": is_end}
        dealt = getattr(self.reader, "group", None) or self.group
        if dealt.streams > 1 or dealt.deterministic:
            of_run |= {"streams": dealt.streams, "deterministic": dealt.deterministic}
        if self.watch.key is not None:
            of_run["watch"] = self.watch.record()
        write(self.state, number=self.progress.step, loop=of_reader | of_run)
        self.saving, self.saved, self.best_is_new = True, self.progress.step, False
        self.report_saved()

    def save_unless_last(self, batches: Any, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Saves between two batches. After the last one the epoch's end saves, with the place of the next epoch."""
        try:
            following = self.read_some(batches, stream, 1)
        except Exception:
            if self.group.world_size == 1:
                self.save()
            raise
        if following:
            self.save()
        return itertools.chain(following, stream)

    def report_saved(self, *, wait: bool = False) -> None:
        """Emits "after_save" once a save is on disk, on all ranks after the same step."""
        if self.saving and (wait or not self.group.most([self.saver.busy])[0]):
            self.saver.finish()
            self.saving = False
            self.name_best()
            self.tell("after_save")

    def name_best(self) -> None:
        """Names the checkpoint that is on disk now in best.json, where its evaluation was the best one so far."""
        if self.group.is_first and self.watch.best_step == self.saved and self.best_values:
            write_best(self.config.output_dir, self.watch, self.best_values)

    def check(self) -> None:
        """Raises when a step since the last check met a label outside [0, 1], NaN or infinity."""
        check_labels(self.step, self.state, where=self.where_labels)
        if is_stopped(self.step, self.state):
            batch, where = find_nonfinite(self.step, self.state, self.reader, self.progress.epoch, *self.checked)
            check_finite(self.step, self.state, batch=batch, where=where)
        self.checked = self.progress.step, self.position

    def where_labels(self) -> str:
        """The steps since the last check, and the first label outside [0, 1], read again."""
        (before, position), last, epoch = self.checked, self.progress.step, self.progress.epoch
        num = (last - before) * self.step.accumulation
        steps = f" in step {last}" if last == before + 1 else f" in steps {before + 1} to {last}"
        if not num:  # evaluate_with has counted them
            return ""
        try:
            batches = self.reader.epoch(epoch) if position is None else self.reader.start_at(position)
            try:
                return steps + find_bad_label(self.step, self.state, batches, num, position, epoch)
            finally:
                batches.close()
        except Exception as error:  # only the message suffers
            return f"{steps}, which could not be read again ({str(error) or type(error).__name__})"

    def evaluate_or_save(self) -> None:
        """Evaluates, once a step. Held-out data that cannot be read must not cost what was trained."""
        try:
            if self.evaluated != self.progress.step:
                self.evaluate()
        except Exception:
            if self.group.world_size == 1:  # other ranks may be elsewhere, and a save is of all
                self.save(is_end=self.is_last_epoch_over())
            raise

    def evaluate(self) -> None:
        progress = self.progress
        if self.evaluate_with is None or progress.was_cut:
            return
        self.tell("before_evaluation")
        cuda = [self.state.step.device] if self.state.step.is_cuda else []
        with self.timed("evaluating"), torch.random.fork_rng(cuda):
            progress.evaluation = self.evaluate_with(self.state)
        self.evaluated = progress.step
        decision = self.watch.take(progress.step, progress.evaluation)
        self.best_is_new = decision.improved
        self.best_values = dict(progress.evaluation) if decision.improved else self.best_values
        if decision.reduces and isinstance(self.state.rate, torch.Tensor):
            self.state.rate.mul_(self.config.reduce_by)
        self.read_rate()
        self.metrics_file.evaluation(progress, self.state)
        self.tell("after_evaluation")

    def read_rate(self) -> None:
        """The factor of all learning rates, of a state that has one."""
        self.progress.rate_factor = float(self.state.rate) if isinstance(self.state.rate, torch.Tensor) else 1.0

    def tell(self, event: Event) -> None:
        if self.on_event(event, self.progress, self.state) == "stop":
            self.progress.stop()
