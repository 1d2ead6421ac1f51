"""Learning rates as functions of the steps taken: accepted wherever an optimiser takes `lr`.

A schedule is any function from the steps taken before this one, a whole number f64 [], to the learning rate, f64 [], in
torch operations: it is traced into the step, so it never recompiles it and never reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.optim.building import Rate, Schedule, scheduled_rate

__all__ = ["constant", "cosine", "exponential", "linear", "piecewise", "warm_up"]


def constant(lr: float) -> Schedule:
    """`lr` at every step.

    Example:  >>> constant(0.1)(torch.tensor(7.0)).item()
              0.1...
    """
    _check(lr=lr)
    return lambda step: torch.full_like(step, lr)


def linear(start: float, end: float, num_steps: int) -> Schedule:
    """From `start` at the first step straight to `end` after `num_steps`, and `end` from there on.

    Example:  >>> linear(1.0, 0.0, 4)(torch.arange(6.0)).tolist()
              [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check(start=start, end=end, num_steps=num_steps)
    return lambda step: start + (end - start) * (step / num_steps).clamp(max=1)


def cosine(start: float, num_steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from `start` at the first step to `end` after `num_steps`, and `end` from there on.

    Ref: Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.
    """
    _check(start=start, end=end, num_steps=num_steps)
    return lambda step: end + (start - end) * 0.5 * (1 + torch.cos(math.pi * (step / num_steps).clamp(max=1)))


def exponential(start: float, factor: float, num_steps: int) -> Schedule:
    """`start`, times `factor` per `num_steps` steps, smoothly: start factor^(step / num_steps)."""
    _check(start=start, factor=factor, num_steps=num_steps)
    return lambda step: start * factor ** (step / num_steps)


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """values[0] for the first boundaries[0] steps, then values[1] until boundaries[1], and so on.

    Raises:   ValueError when boundaries do not rise, or are not one fewer than the values.
    Example:  >>> piecewise([1.0, 0.5, 0.25], [2, 3])(torch.arange(5.0)).tolist()
              [1.0, 1.0, 0.5, 0.25, 0.25]
    """
    if len(values) != len(boundaries) + 1 or list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"boundaries: got {list(boundaries)}, expected {len(values) - 1} rising ones, one per change.")
    for i, value in enumerate(values):
        _check(**{f"values[{i}]": value})

    def schedule(step: Tensor) -> Tensor:
        rate = torch.full_like(step, values[0])
        for boundary, value in zip(boundaries, values[1:], strict=True):
            rate = torch.where(step >= boundary, value, rate)
        return rate

    return schedule


def warm_up(lr: Rate, num_steps: int) -> Schedule:
    """Linear from lr / num_steps at the first step to lr; after it, `lr` counts from the end of the warm-up.

    Example:  >>> warm_up(linear(1.0, 0.0, 2), 4)(torch.arange(6.0)).tolist()
              [0.25, 0.5, 0.75, 1.0, 1.0, 0.5]
    """
    _check(num_steps=num_steps)
    if not callable(lr) and not isinstance(lr, Tensor):
        _check(lr=lr)
    return lambda step: scheduled_rate(lr, (step - num_steps).clamp(min=0) + 1) * ((step + 1) / num_steps).clamp(max=1)


def _check(**values: float) -> None:
    for name, value in values.items():
        low = 1 if name == "num_steps" else 0
        if not low <= value < math.inf:
            raise ValueError(f"{name}: got {value}, expected {low} <= {name} < inf.")
