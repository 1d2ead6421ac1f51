"""AdamW and its documented variants, for dense parameters and for the rows a step touched.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    torch's:  w <- decay w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)         adamw, adam
    RecIS's:  w <- decay w - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)       adamw_recis, adamw_tf, adam_recis
    decay:    1 - lr wd of adamw and adamw_recis; 1 - wd, not scaled by lr, of adamw_tf; 1 of adam and adam_recis

Both are one formula, w <- decay w - alpha m / (sqrt(v) + eps'), whose scalars depend on the variant and on t. They
differ where gradients are small: RecIS compares eps with sqrt(v), which at first is a 32nd of the gradient.

Ref: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.kernels.rows.adamw_rows import adamw_rows_, adamw_rows_checked_, adamw_update
from recfx.kernels.rows.optimizer_rows import adamw_rows_by_column
from recfx.kernels.rows.sum_adamw_rows import sum_adamw_rows_
from recfx.optim.building import (
    Checked,
    DenseOptimizer,
    Fused,
    Rate,
    Scalars,
    SparseOptimizer,
    check_ranges,
    dense_optimizer,
    rate_at,
    row_optimizer,
)
from recfx.table import Occurrences, RowLayout, TableState
from recfx.types import Params

__all__ = [
    "AdamState",
    "adam",
    "adam_recis",
    "adamw",
    "adamw_recis",
    "adamw_tf",
    "sparse_adam",
    "sparse_adam_recis",
    "sparse_adamw",
    "sparse_adamw_recis",
    "sparse_adamw_tf",
]


class AdamState(NamedTuple):
    """First and second moments by parameter name, and the steps taken."""

    m: Params
    v: Params
    step: Tensor  # i64 []


def sparse_adamw(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> SparseOptimizer:
    """AdamW on the rows a step touched; every other row is left alone.

    Args:     lr: step size, >= 0: a float, a 0-d tensor, or a function of the steps taken (`recfx.optim.schedules`).
              b1, b2: decay of the moments per step, in [0, 1).  eps: >= 0; 0 gives NaN where a gradient is 0.
              weight_decay: per unit of lr, >= 0.
    Slots:    m, v next to the weight in each row: 8 W bytes.
    Cost:     reads 4 U W floats, writes 3 U W; never syncs.
    Differs:  from torch.optim.AdamW: untouched rows neither decay nor move, t counts steps of the table.
    Raises:   ValueError on a value outside its range.
    """
    return _sparse(_scalars(lr, b1, b2, eps, weight_decay), lr, weight_decay)


def sparse_adamw_recis(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> SparseOptimizer:
    """RecIS's SparseAdamW: `sparse_adamw` with eps outside the bias correction.

    Differs:  from `sparse_adamw` where gradients are small: with a constant 1e-7 and lr 1e-3, five steps without decay
              move a weight by -1.7042e-3, those of `sparse_adamw` by -4.5455e-3.
    """
    return _sparse(_scalars(lr, b1, b2, eps, weight_decay, eps_corrected=False), lr, weight_decay)


def sparse_adamw_tf(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> SparseOptimizer:
    """RecIS's SparseAdamWTF: `sparse_adamw_recis` whose decay is not scaled by lr, w <- (1 - wd) w."""
    scalars = _scalars(lr, b1, b2, eps, weight_decay, eps_corrected=False, decay_by_lr=False)
    return _sparse(scalars, lr, weight_decay)


def sparse_adam(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> SparseOptimizer:
    """`sparse_adamw` without decay: torch.optim.Adam's formula. RecIS's is `sparse_adam_recis`."""
    return _sparse(_scalars(lr, b1, b2, eps, 0.0), lr, 0.0)


def sparse_adam_recis(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> SparseOptimizer:
    """RecIS's SparseAdam: `sparse_adamw_recis` without decay. RecIS ignores its `weight_decay`, so there is none."""
    return _sparse(_scalars(lr, b1, b2, eps, 0.0, eps_corrected=False), lr, 0.0)


def adamw(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> DenseOptimizer:
    """torch.optim.AdamW as a function: `update(state, params, grads, scale, due) -> (state, params)`.

    Gradients are multiplied by `scale` f32 []; nothing moves unless `due` bool []. None: always due, and cheaper.
    """
    return _dense(_scalars(lr, b1, b2, eps, weight_decay), lr, weight_decay)


def adamw_recis(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> DenseOptimizer:
    """`adamw` with eps outside the bias correction, as RecIS computes it for rows: `sparse_adamw_recis`."""
    return _dense(_scalars(lr, b1, b2, eps, weight_decay, eps_corrected=False), lr, weight_decay)


def adamw_tf(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> DenseOptimizer:
    """RecIS's AdamWTF: `adamw_recis` whose decay is not scaled by lr, w <- (1 - wd) w."""
    return _dense(_scalars(lr, b1, b2, eps, weight_decay, eps_corrected=False, decay_by_lr=False), lr, weight_decay)


def adam(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> DenseOptimizer:
    """`adamw` without decay: torch.optim.Adam as a function."""
    return _dense(_scalars(lr, b1, b2, eps, 0.0), lr, 0.0)


def adam_recis(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> DenseOptimizer:
    """`adamw_recis` without decay: the form of `sparse_adam_recis`."""
    return _dense(_scalars(lr, b1, b2, eps, 0.0, eps_corrected=False), lr, 0.0)


def _scalars(
    lr: Rate,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    eps_corrected: bool = True,
    decay_by_lr: bool = True,
) -> Scalars:
    """decay, alpha, b1, 1 - b1, b2, 1 - b2, eps', in float64: in float32, 1 - b2^t is wrong in the fifth digit."""
    check_ranges(lr, b1=(b1, 0, 1), b2=(b2, 0, 1), eps=(eps, 0, math.inf), weight_decay=(weight_decay, 0, math.inf))

    def scalars(t: Tensor, rate: Tensor, decay: Tensor | float) -> list[Tensor]:
        root = torch.sqrt(1 - b2**t)
        alpha = rate * root / (1 - b1**t)
        kept = 1 - (rate if decay_by_lr else torch.ones_like(rate)) * decay
        constants = [torch.full_like(t, c) for c in (b1, 1 - b1, b2, 1 - b2)]
        return [kept, alpha, *constants, eps * (root if eps_corrected else torch.ones_like(root))]

    return scalars


def _stacked(scalars: Scalars, lr: Rate, weight_decay: float, t: Tensor, scale: Tensor) -> Tensor:
    """f64 [8], as `adamw_update` takes them."""
    t = t.double()
    decay, alpha, *betas, eps = scalars(t, rate_at(lr, t), weight_decay)
    return torch.stack([decay, *betas, alpha, eps, scale.double()])


def _sparse(scalars: Scalars, lr: Rate, weight_decay: float) -> SparseOptimizer:
    by_column = row_optimizer(adamw_rows_by_column, scalars, lr, weight_decay, slots=("m", "v"))

    def apply_(
        state: TableState, scale: Tensor, due: Tensor, columns: RowLayout | None = None, most_rows: int | None = None
    ) -> TableState:
        if columns is not None and columns.rates is not None:
            return by_column.apply_(state, scale, due, columns, most_rows)
        hyper = _stacked(scalars, lr, weight_decay, state.step + 1, scale)
        adamw_rows_(state.rows, state.grads, state.counters, state.unique_rows, hyper, due)
        return state

    def apply_checked_(
        state: TableState, scale: Tensor, due: Tensor, others: Sequence[Tensor]
    ) -> tuple[TableState, Tensor]:
        hyper = _stacked(scalars, lr, weight_decay, state.step + 1, scale)
        touched = state.counters, state.unique_rows
        return state, adamw_rows_checked_(state.rows, state.grads, *touched, hyper, due, others)

    def sum_and_apply_(state: TableState, occurrences: Occurrences, scale: Tensor, due: Tensor) -> TableState:
        hyper = _stacked(scalars, lr, weight_decay, state.step + 1, scale)
        sum_adamw_rows_(state.rows, state.counters, state.unique_rows, hyper, *occurrences)
        return state

    return by_column._replace(
        apply_=apply_, fused=Fused(apply_, sum_and_apply_), checked=Checked(apply_, apply_checked_)
    )


def _without_denormals(*tensors_and_scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`adamw_update`, with first moments below any effect as 0: those of a dead unit decay until they are denormal
    numbers, and a processor takes many times as long over each of those."""
    w, m, v = adamw_update(*tensors_and_scalars)
    return w, torch.where(m.abs() < 1e-30, 0.0, m), v


def _dense(scalars: Scalars, lr: Rate, weight_decay: float) -> DenseOptimizer:
    return dense_optimizer(
        AdamState, _without_denormals, lambda t, scale: _stacked(scalars, lr, weight_decay, t, scale)
    )
