"""What a run decides from its evaluations: which was best, when to lower learning rates, when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recfx.step import TrainState
from recfx.train.progress import TrainConfig

__all__ = ["Decision", "Watch", "check_evaluated", "check_watched", "is_lower_better"]

LOWER = ("log_loss", "loss", "rmse", "mae", "mse", "ece", "normalised_entropy", "normalized_entropy")


@dataclass(frozen=True)
class Decision:
    """What follows from an evaluation."""

    improved: bool  # it is the best one so far
    reduces: bool  # learning rates are to be lowered now
    stops: bool  # the run is to end


@dataclass
class Watch:
    """Follows one value of the evaluations of a run. Of equal evaluations, all ranks take the same decision.

    NaN is never an improvement. An evaluation of a step that has been counted already, as after a resume, is ignored.

    Args:     key: the value, such as "auc" or "click/log_loss"; None: nothing is followed.
              stop_after: evaluations in a row without improvement that end the run; None: it goes on.
              reduce_after: as many until learning rates are lowered, and again after as many more; None: never.
    Example:  >>> watch = Watch("auc", stop_after=2)
              >>> [watch.take(step, {"auc": auc}).stops for step, auc in enumerate([0.7, 0.6, 0.65])]
              [False, False, True]
              >>> watch.best_step, watch.best
              (0, 0.7)
    """

    key: str | None
    stop_after: int | None = None
    reduce_after: int | None = None
    evaluated: int = -1  # the step of the last evaluation that was counted; -1: none
    best: float = math.nan
    best_step: int = -1
    num_worse: int = 0  # evaluations since the best one
    num_flat: int = 0  # the same, or since learning rates were lowered

    @staticmethod
    def of(config: TrainConfig) -> Watch:
        """The watch that a configuration describes."""
        return Watch(config.watched, config.stop_after, config.reduce_after)

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        return self.stop_after is not None and self.num_worse >= self.stop_after

    def take(self, step: int, values: Mapping[str, float]) -> Decision:
        """Counts the evaluation of a step.

        Raises:   ValueError when the value that is followed is not among `values`.
        """
        if self.key is None or step <= self.evaluated:
            return Decision(improved=False, reduces=False, stops=self.stops)
        check_watched(self.key, values)
        value, self.evaluated = float(values[self.key]), step
        improved = self._is_better(value)
        if improved:
            self.best, self.best_step, self.num_worse, self.num_flat = value, step, 0, 0
        else:
            self.num_worse, self.num_flat = self.num_worse + 1, self.num_flat + 1
        reduces = self.reduce_after is not None and self.num_flat >= self.reduce_after
        if reduces:
            self.num_flat = 0
        return Decision(improved, reduces, self.stops)

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if math.isnan(self.best):
            return True
        assert self.key is not None
        return value < self.best if is_lower_better(self.key) else value > self.best

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, for JSON."""
        best = None if math.isnan(self.best) else self.best
        counts = {"evaluated": self.evaluated, "best_step": self.best_step}
        return {"key": self.key, "best": best, **counts, "num_worse": self.num_worse, "num_flat": self.num_flat}

    def restore(self, record: Mapping[str, Any] | None) -> None:
        """Continues from a checkpoint's `record`; from the start where that followed another value."""
        if record and record["key"] == self.key:
            self.best = math.nan if record["best"] is None else record["best"]
            self.evaluated, self.best_step = record["evaluated"], record["best_step"]
            self.num_worse, self.num_flat = record["num_worse"], record["num_flat"]


def is_lower_better(key: str) -> bool:
    """Whether smaller values of a metric are better.

    Example:  >>> is_lower_better("click/log_loss"), is_lower_better("auc")
              (True, False)
    """
    return key.split("/")[-1] in LOWER


def check_evaluated(config: TrainConfig, state: TrainState, *, is_evaluated: bool) -> None:
    """Raises ValueError when settings need an evaluation that there is none of, or a factor that the state lacks."""
    for name in ("eval_every", "watch", "stop_after", "reduce_after"):
        if getattr(config, name) is not None and not is_evaluated:
            raise ValueError(
                f"{name}: got {getattr(config, name)!r} without an evaluation, expected one. It is decided by values "
                "on held-out data. Give train evaluate_with=..., or the command held-out files (--eval_paths)."
            )
    if config.reduce_after is not None and not isinstance(state.rate, Tensor):
        raise ValueError(
            f"reduce_after: got {config.reduce_after} with a state that has no factor of learning rates, expected one. "
            "They are part of the graph. Build the step with train_step(rate_factor=True)."
        )


def check_watched(key: str, values: Mapping[str, float]) -> None:
    """Raises ValueError when an evaluation does not have the value that is to be followed."""
    if key not in values:
        known = ", ".join(f"'{name}'" for name in values) or "no values"
        raise ValueError(
            f"watch: got '{key}', expected one of {known}, which the evaluation returned. Give TrainConfig(watch=...)."
        )
    if key.split("/")[-1] == "calibration" or key.split("/")[-1].startswith("num_"):
        raise ValueError(f"watch: got '{key}', expected a value of which higher or lower is better, such as 'auc'.")
