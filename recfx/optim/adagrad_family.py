"""Adagrad, per weight and per row.

    per weight:  g <- g + wd w;  sum <- sum + g^2;                w <- w - lr g / (sqrt(sum) + eps)
    per row:     g <- g + wd w;  sum <- sum + mean over the row of g^2;  the same step for all its weights

Ref: Duchi, Hazan & Singer 2011. Per row as fbgemm's exact row-wise Adagrad: a sum for each row of each logical table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.kernels.rows.optimizer_rows import adagrad_rows, adagrad_update, rowwise_adagrad_rows
from recfx.optim.building import (
    DenseOptimizer,
    Rate,
    Scalars,
    SparseOptimizer,
    check_ranges,
    dense_optimizer,
    rate_at,
    row_optimizer,
)
from recfx.types import Params

__all__ = ["AdagradState", "adagrad", "sparse_adagrad", "sparse_rowwise_adagrad"]


class AdagradState(NamedTuple):
    """Sums of squared gradients by parameter name, and the steps taken."""

    sum: Params
    step: Tensor  # i64 []


def sparse_adagrad(lr: Rate, *, initial: float = 0.0, eps: float = 1e-10, weight_decay: float = 0.0) -> SparseOptimizer:
    """torch.optim.Adagrad on the rows a step touched; every other row is left alone.

    Args:     lr: step size, >= 0: a float, a 0-d tensor, or a function of the steps taken (`recfx.optim.schedules`).
              initial: of the sum of squares, >= 0 (torch's initial_accumulator_value). Not stored: rows begin at 0.
              eps: >= 0; weight_decay: L2 penalty, >= 0.
    Slots:    sum next to the weight in each row: 4 W bytes.
    Cost:     reads 3 U W floats, writes 2 U W.
    Raises:   ValueError on a value outside its range.
    """
    scalars = _scalars(lr, initial, eps, weight_decay)
    return row_optimizer(adagrad_rows, scalars, lr, weight_decay, slots=("sum",))


def sparse_rowwise_adagrad(
    lr: Rate, *, initial: float = 0.0, eps: float = 1e-8, weight_decay: float = 0.0
) -> SparseOptimizer:
    """Adagrad with one sum per row: the mean over its weights of the squared gradient. The least memory that adapts.

    Args:     as `sparse_adagrad`.
    Slots:    sum, 4 bytes per row of each logical table (an embedding and a bias side by side have one each).
    Cost:     reads 2 U W floats, writes U W.
    Raises:   ValueError on a value outside its range.
    """
    scalars = _scalars(lr, initial, eps, weight_decay)
    return row_optimizer(rowwise_adagrad_rows, scalars, lr, weight_decay, row_slots=("sum",))


def adagrad(lr: Rate, *, initial: float = 0.0, eps: float = 1e-10, weight_decay: float = 0.0) -> DenseOptimizer:
    """torch.optim.Adagrad as a function of the signature of `adamw`'s. Arguments as `sparse_adagrad`."""
    scalars = _scalars(lr, initial, eps, weight_decay)

    def hyper(t: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([*scalars(t.double(), rate_at(lr, t.double()), weight_decay), scale.double()])

    def formula(w: Tensor, sum: Tensor, g: Tensor, hyper: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        *factors, scale = hyper
        return adagrad_update(w, sum, g * scale, *factors)

    return dense_optimizer(AdagradState, formula, hyper)


def _scalars(lr: Rate, initial: float, eps: float, weight_decay: float) -> Scalars:
    check_ranges(lr, initial=(initial, 0, math.inf), eps=(eps, 0, math.inf), weight_decay=(weight_decay, 0, math.inf))

    def scalars(t: Tensor, rate: Tensor, decay: Tensor | float) -> list[Tensor]:
        return [decay + torch.zeros_like(rate), rate, torch.full_like(t, initial), torch.full_like(t, eps)]

    return scalars
