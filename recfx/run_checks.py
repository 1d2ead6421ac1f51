"""What capture, the loop and checkpoints ask of a step, a state and a run, before anything is compiled or changed."""

from __future__ import annotations

from pathlib import Path

from recfx.checks import check_function, check_type, said
from recfx.step import Step, TrainState

__all__ = [
    "check_new",
    "check_not_trained",
    "check_program",
    "check_reader",
    "check_run",
    "data_of",
    "described_by",
    "place_of",
    "times_trained",
    "without_warning",
]

OF_INIT = "Make one by step.init(params)."


def check_program(step: object, state: object, advice: str) -> None:
    """Raises TypeError when they are not a step and its state, ValueError when the state is another step's.

    Args:     advice: the order of the arguments, a sentence.
    """
    check_type("step", step, Step, f"Build one: recfx.step.train_step(...). {advice}")
    check_type("state", state, TrainState, f"{OF_INIT} {advice}")
    assert isinstance(step, Step)
    assert isinstance(state, TrainState)
    expected, got = [t.width for t in step.plan.tables], [t.grads.shape[1] for t in state.tables]
    if got != expected:
        raise ValueError(f"state: got tables of widths {got}, expected {expected}. Use the state of this step.")


def check_run(run: object, state: object, use: str) -> None:
    """Raises TypeError when they are not a function of (state, batch) and a state.

    Args:     use: what may be given, such as "step.update_".
    """
    check_function("run", run, "state, batch", "state, aux", f"Use {use} or its capture.")
    check_type("state", state, TrainState, OF_INIT)


def check_reader(reader: object) -> None:
    """Raises TypeError when it has no epochs that can be entered anywhere."""
    if not all(callable(getattr(reader, name, None)) for name in ("epoch", "start_at")):
        raise TypeError(
            f"reader: got {said(reader)}, expected one with the methods `epoch` and `start_at`. A run is resumed where "
            "it stopped. Use recfx.data.reading(...)."
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
    """What a reader, or an iterator of one, says of itself in errors: those of `recfx.data` do."""
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
    """For a caller that raises where there is no batch: an iterator of `recfx.data` would warn of it too."""
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
