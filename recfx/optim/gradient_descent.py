"""Plain stochastic gradient descent: w <- w - lr (g + wd w). It keeps nothing but the weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.kernels.rows.optimizer_rows import sgd_rows, sgd_update
from recfx.optim.building import (
    DenseOptimizer,
    Rate,
    SparseOptimizer,
    check_ranges,
    dense_optimizer,
    rate_at,
    row_optimizer,
)

__all__ = ["SgdState", "sgd", "sparse_sgd"]


class SgdState(NamedTuple):
    """The steps taken."""

    step: Tensor  # i64 []


def sparse_sgd(lr: Rate, *, weight_decay: float = 0.0) -> SparseOptimizer:
    """torch.optim.SGD without momentum, on the rows a step touched; every other row is left alone.

    Args:     lr: step size, >= 0: a float, a 0-d tensor, or a function of the steps taken (`recfx.optim.schedules`).
              weight_decay: L2 penalty, >= 0.
    Slots:    none.
    Cost:     reads 2 U W floats, writes U W.
    Raises:   ValueError on a value outside its range.
    """
    check_ranges(lr, weight_decay=(weight_decay, 0, math.inf))
    return row_optimizer(sgd_rows, _scalars, lr, weight_decay)


def sgd(lr: Rate, *, weight_decay: float = 0.0) -> DenseOptimizer:
    """torch.optim.SGD without momentum, as a function of the signature of `adamw`'s."""
    check_ranges(lr, weight_decay=(weight_decay, 0, math.inf))

    def hyper(t: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([*_scalars(t.double(), rate_at(lr, t.double()), weight_decay), scale.double()])

    def formula(w: Tensor, g: Tensor, scalars: tuple[Tensor, ...]) -> tuple[Tensor]:
        decay, rate, scale = scalars
        return (sgd_update(w, g * scale, decay, rate),)

    return dense_optimizer(SgdState, formula, hyper)


def _scalars(t: Tensor, rate: Tensor, decay: Tensor | float) -> list[Tensor]:
    return [1 - rate * decay, rate]
