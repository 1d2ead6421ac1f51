"""What a caller of `train` sees: its settings, its events, where it stands, and what it needs of a reader."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from recfx.checks import check_int, check_number, check_type

__all__ = ["Event", "Progress", "Reader", "TrainConfig"]

Event = Literal[
    "before_epoch", "after_epoch", "before_step", "after_step", "log", "before_save", "after_save", "before_evaluation",
    "after_evaluation",
]  # fmt: skip


OTHERS = ("output_dir", "save_in_background", "watch", "reduce_by")  # settings that are not counts
OPTIONAL = ("train_steps", "eval_every", "stop_after", "reduce_after")


class Reader(Protocol):
    """Epochs of batches, numbered from 0, that can be started anywhere. An iterator has a JSON-able `position`.

    It may have an `identity`, a str: a position is not used by a reader with another identity. Without one, every
    position is used. It may have `described`, a str that names its data in errors; so may its iterators, for where
    they are.
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
              eval_every: steps between evaluations within an epoch, besides the one at its end; None: only that one.
              watch: a value of the evaluations, such as "auc" or "click/log_loss". After each evaluation that is the
              best so far by it, a checkpoint is saved; <output_dir>/best.json names it, and it is kept besides the
              newest max_to_keep. None: "auc" where one of the next two is given, or else nothing.
              stop_after: the run ends after so many evaluations in a row without a better one; None: it does not.
              reduce_after: after so many in a row, all learning rates are multiplied by `reduce_by`, and again after
              as many more. It needs a step built with train_step(rate_factor=True). None: they are not.
              reduce_by: above 0 and below 1.
    Raises:   TypeError when a count is not an int, ValueError when it is below 1, or reduce_by out of range.
    """

    output_dir: str = "./ckpt"
    log_steps: int = 10
    save_steps: int = 2000
    train_steps: int | None = None
    train_epoch: int = 1
    max_to_keep: int = 5
    full_save_every: int = 1
    save_in_background: bool = False
    eval_every: int | None = None
    watch: str | None = None
    stop_after: int | None = None
    reduce_after: int | None = None
    reduce_by: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in OTHERS and not (name in OPTIONAL and value is None):
                check_int(name, value, 1)
        check_type("watch", self.watch, str | None, "It is the name of a value of the evaluation, such as 'auc'.")
        check_number("reduce_by", self.reduce_by)
        if not 0 < self.reduce_by < 1:
            raise ValueError(
                f"reduce_by: got {self.reduce_by}, expected 0 < reduce_by < 1. Learning rates are lowered."
            )

    @property
    def watched(self) -> str | None:
        """The value of the evaluations that is followed; None: none."""
        if self.watch is None and (self.stop_after is not None or self.reduce_after is not None):
            return "auc"
        return self.watch


@dataclass
class Progress:
    """Where training stands; what event listeners are given.

    People read the first epoch as epoch 1, in bars, log lines and errors: `epoch_number` and `epoch_text`. `epoch` is
    the index in code, from 0, as in `reader.epoch(0)` and in the `loop` of a checkpoint.
    """

    epoch: int = 0  # how many epochs are complete; so also the index, from 0, of the one in progress
    epoch_number: int = 0  # the epoch in progress or, between two, the one before, from 1; 0: none has begun
    num_epochs: int = 0  # `TrainConfig.train_epoch`
    step: int = 0  # optimiser steps since the model began, `TrainState.step`
    num_samples: int = 0  # real samples trained in this run
    timed_samples: int = 0  # samples trained in `seconds`: without those of the first call, which compiles
    seconds: float = 0.0  # spent on `timed_samples`, with reading and logging, without saving, evaluating and compiling
    first_step_s: float = 0.0  # of this run, with the time that compiling it took
    train_s: float = 0.0
    loss: float = float("nan")  # mean over the samples since the epoch began
    auc: float = float("nan")  # of several tasks, that of the first one that has it
    metrics: dict[str, float] = field(default_factory=dict)  # all that is counted since the epoch began, by name
    num_nonfinite: int = 0  # micro-batches with NaN or infinity, which `on_nonfinite="skip"` leaves out
    stopped: str = ""  # "train_steps", "stop_after", "interrupted", "listener" or ""
    evaluation: dict[str, float] = field(default_factory=dict)
    steps_left: int | None = None  # of the run; None: not known, as in the first epoch without `train_steps`
    num_steps: int = 0  # optimiser steps trained in this run
    times: dict[str, float] = field(default_factory=dict)  # seconds of this run by phase: "reading", "evaluating", ...
    rate_factor: float = 1.0  # of all learning rates, see `TrainConfig.reduce_after`
    asked_to_stop: bool = False  # by `stop`

    def stop(self) -> None:
        """Ends the run after the step in progress, as ctrl-C does: it saves, and a resumed run goes on from there.

        For a listener of `train`; one that returns "stop" does the same. On many ranks one of them is enough.
        """
        self.asked_to_stop = True

    @property
    def was_cut(self) -> bool:
        """Whether the run was ended before it had come to its end, by a signal or a listener."""
        return self.stopped in ("interrupted", "listener")

    @property
    def eta_s(self) -> float:
        """Seconds that the rest of the training steps takes at the speed so far; NaN where that is not known."""
        if self.steps_left is None or not self.num_steps or not self.timed_samples:
            return float("nan")
        return self.steps_left * (self.num_samples / self.num_steps) / self.samples_per_s

    @property
    def samples_per_s(self) -> float:
        """Over `timed_samples`; NaN before there are any."""
        return self.timed_samples / self.seconds if self.seconds else float("nan")

    @property
    def epoch_text(self) -> str:
        """The epoch for people: "epoch 1 of 3"."""
        return f"epoch {self.epoch_number} of {max(self.num_epochs, self.epoch_number)}"
