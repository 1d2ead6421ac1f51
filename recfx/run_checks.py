"""Whether a step and a state belong together. Capture, the loop, checkpoints and row surgery check it first."""

from __future__ import annotations

from recfx.checks import check_type
from recfx.step import Step, TrainState

__all__ = ["OF_INIT", "check_step_and_state"]

OF_INIT = "Make one by step.init(params)."


def check_step_and_state(step: object, state: object, advice: str) -> None:
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
