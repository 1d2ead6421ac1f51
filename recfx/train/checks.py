"""What `train` and `evaluate` check of their arguments, and how their errors describe readers and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recfx.checks import check_function, check_type, said
from recfx.metrics import BinaryCounts
from recfx.run_checks import OF_INIT
from recfx.step import Task, TrainState
from recfx.step.tasks import Tasks
from recfx.types import Batch

__all__ = [
    "Run",
    "RunSteps",
    "check_new",
    "check_not_trained",
    "check_reader",
    "check_run",
    "data_of",
    "described_by",
    "place_of",
    "tasks_of",
    "times_trained",
    "without_warning",
]

Run = Callable[[TrainState, Batch], tuple[TrainState, Any]]
RunSteps = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Any]]


def check_run(run: object, state: object, use: str) -> None:
    """Raises TypeError when they are not a function of (state, batch) and a state.

    Args:     use: what may be given, such as "step.update_".
    """
    check_function("run", run, "state, batch", "state, aux", f"Use {use} or its capture.")
    check_type("state", state, TrainState, OF_INIT)


def tasks_of(run: object, state: TrainState) -> Tasks:
    """The tasks that `run` evaluates: a step's `evaluate_` and its capture know them.

    Raises:   TypeError when it does not, and the metrics are not the default ones.
    """
    tasks = getattr(run, "tasks", None)
    if tasks is None:
        advice = "Give step.evaluate_ or its capture as it is: it knows how its metrics are read."
        check_type("state.metrics", state.metrics, BinaryCounts, advice)
    return tasks or Tasks(by_name={"": Task(label="label")}, are_named=False)


def check_reader(reader: object) -> None:
    """Raises TypeError when it has no epochs that can be entered anywhere."""
    if not all(callable(getattr(reader, name, None)) for name in ("epoch", "start_at")):
        raise TypeError(
            f"reader: got {said(reader)}, expected one with the methods `epoch` and `start_at`. A run resumes where it "
            "stopped. Use recfx.data.reading(...)."
        )


def check_new(state: TrainState, found: Path) -> None:
    """Raises ValueError when a state that a checkpoint is to be loaded into has been trained or loaded already."""
    step, num_rows = int(state.step), sum(int(t.num_rows) for t in state.tables)
    if step or num_rows:
        raise ValueError(
            f"state: got one of step {step} with {num_rows} rows, and resume=True, expected a new one. output_dir "
            f"holds {found}, which would replace what was loaded or trained already. Load other weights only where "
            "checkpoint.latest(output_dir) is None."
        )


def described_by(thing: object) -> str | None:
    """How errors describe a reader, or an iterator of one: its `described`, which those of `recfx.data` have."""
    described = getattr(thing, "described", None)
    return described if isinstance(described, str) else None


def data_of(described: str | None, identity: object) -> str:
    """A reader in an error: by its data, or else by its identity."""
    if described is not None:
        return f"one of {described}"
    return "one without an identity" if identity is None else f"one of {identity}"


def place_of(position: dict | None, epoch: int, described: str | None) -> str:
    """Where a batch is, for an error: "follows position ... of epoch 1 (...)".

    Args:     position: that it follows, None for the first one.  epoch: its number, from 0: people count from 1.
              described: see `described_by`.
    """
    where = "is the first one" if position is None else f"follows position {position}"
    return f"{where} of epoch {epoch + 1}{f' ({described})' if described else ''}"


def without_warning(batches: object) -> None:
    """Turns off the warning of an iterator of `recfx.data` without a batch: the caller raises an error instead."""
    if hasattr(batches, "warns"):
        batches.warns = False


def times_trained(state: TrainState) -> tuple[int, ...]:
    """Grows with every training step. Read from the device."""
    return int(state.step), int(state.window.num_batches), *(int(t.tally[0]) for t in state.tables)


def check_not_trained(before: tuple[int, ...], state: TrainState) -> None:
    """Raises ValueError when a step has trained since `times_trained` was `before`."""
    if times_trained(state) != before:
        raise ValueError(
            "run: got one that trains, expected step.evaluate_ or its capture. The state has learnt the batches that "
            "were held out. Go on from a checkpoint."
        )
