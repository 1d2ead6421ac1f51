"""AdamW and its documented variants, for dense parameters and for the rows a step touched.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    torch:   w <- (1 - lr wd) w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    recis:   w <- (1 - lr wd) w - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
    tf:      as torch, decay (1 - wd) w, not scaled by lr
    adam:    as torch, no decay

Both kinds are one formula, w <- decay w - alpha m / (sqrt(v) + eps'), whose scalars depend on the variant and on t.

Ref: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.kernels.adamw_rows import adamw_rows_, adamw_update
from recfx.table import TableState, copy_of
from recfx.types import Params, Transform

__all__ = [
    "AdamState",
    "SparseOptimizer",
    "adam",
    "adamw",
    "adamw_recis",
    "adamw_tf",
    "sparse_adam",
    "sparse_adamw",
    "sparse_adamw_recis",
    "sparse_adamw_tf",
]

Rate = float | Tensor
Hyper = Callable[[Tensor, Tensor], Tensor]  # (t i64 [], gradient scale f32 []) -> f64 [8], see adamw_update


class AdamState(NamedTuple):
    """First and second moments by parameter name, and the steps taken."""

    m: Params
    v: Params
    step: Tensor  # i64 []


class SparseOptimizer(NamedTuple):
    """An optimiser of the rows one step touched. It declares its slots per weight; the table owns the memory.

    update:   (rows f32 [U, 1 + slots, W], grads f32 [U, W], step i64 [], scale f32 []) -> rows; pure: the meaning.
    apply:    (TableState, scale, due bool []) -> TableState; pure, on the step's unique rows.
    apply_:   the same, in place: what is captured.
    """

    num_slots: int
    update: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    apply: Callable[[TableState, Tensor, Tensor], TableState]
    apply_: Callable[[TableState, Tensor, Tensor], TableState]


def sparse_adamw(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> SparseOptimizer:
    """AdamW on the rows a step touched; every other row is left alone.

    Args:     lr: step size, >= 0, float or 0-d tensor.
              b1, b2: decay of the moments per step, in [0, 1).  eps: >= 0; 0 gives NaN where a gradient is 0.
              weight_decay: per unit of lr, >= 0.
    Slots:    m, v beside the weight in each row: 8 W bytes.
    Cost:     reads 4 U W floats, writes 3 U W; never syncs.
    Differs:  from torch.optim.AdamW: untouched rows neither decay nor move, t counts steps of the table.
    Raises:   ValueError on a value outside its range.
    """
    return _sparse(_hyper(lr, b1, b2, eps, weight_decay))


def sparse_adamw_recis(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> SparseOptimizer:
    """`sparse_adamw` with eps outside the bias correction, as RecIS computes it."""
    return _sparse(_hyper(lr, b1, b2, eps, weight_decay, eps_corrected=False))


def sparse_adamw_tf(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> SparseOptimizer:
    """`sparse_adamw` whose decay is not scaled by lr: w <- (1 - wd) w."""
    return _sparse(_hyper(lr, b1, b2, eps, weight_decay, decay_by_lr=False))


def sparse_adam(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> SparseOptimizer:
    """`sparse_adamw` without decay."""
    return _sparse(_hyper(lr, b1, b2, eps, 0.0))


def adamw(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01) -> Transform:
    """torch.optim.AdamW as a function: `update(state, params, grads, scale, due) -> (state, params)`.

    Gradients are multiplied by `scale` f32 []; nothing moves unless `due` bool []. None: always due, and cheaper.
    """
    return _dense(_hyper(lr, b1, b2, eps, weight_decay))


def adamw_recis(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> Transform:
    """`adamw` with eps outside the bias correction, as RecIS computes it."""
    return _dense(_hyper(lr, b1, b2, eps, weight_decay, eps_corrected=False))


def adamw_tf(
    lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> Transform:
    """`adamw` whose decay is not scaled by lr: w <- (1 - wd) w."""
    return _dense(_hyper(lr, b1, b2, eps, weight_decay, decay_by_lr=False))


def adam(lr: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """`adamw` without decay."""
    return _dense(_hyper(lr, b1, b2, eps, 0.0))


def _hyper(
    lr: Rate,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    eps_corrected: bool = True,
    decay_by_lr: bool = True,
) -> Hyper:
    """The step's scalars, in float64: 1 - b2^t in float32 would be wrong in the fifth digit at t = 1."""
    ranges = {
        "b1": (b1, 0, 1),
        "b2": (b2, 0, 1),
        "eps": (eps, 0, math.inf),
        "weight_decay": (weight_decay, 0, math.inf),
    }
    if not isinstance(lr, Tensor):
        ranges["lr"] = (lr, 0, math.inf)
    for name, (value, low, high) in ranges.items():
        if not low <= value < high:
            raise ValueError(f"{name}: got {value}, expected {low} <= {name} < {high}.")

    def hyper(t: Tensor, scale: Tensor) -> Tensor:
        step = t.double()
        rate = lr.double() if isinstance(lr, Tensor) else torch.full_like(step, lr)
        root = torch.sqrt(1 - b2**step)
        alpha = rate * root / (1 - b1**step)
        decay = 1 - (rate if decay_by_lr else 1.0) * weight_decay
        constants = [torch.full_like(step, c) for c in (b1, 1 - b1, b2, 1 - b2)]
        decay = decay if isinstance(decay, Tensor) else torch.full_like(step, decay)
        return torch.stack(
            [decay, *constants, alpha, eps * (root if eps_corrected else torch.ones_like(root)), scale.double()]
        )

    return hyper


def _sparse(hyper: Hyper) -> SparseOptimizer:
    def update(rows: Tensor, grads: Tensor, step: Tensor, scale: Tensor) -> Tensor:
        w, m, v = rows.unbind(1)
        return torch.stack(adamw_update(w, m, v, grads, hyper(step + 1, scale).to(w.dtype).unbind()), dim=1)

    def apply(state: TableState, scale: Tensor, due: Tensor) -> TableState:
        num = int(state.num_unique) if due else 0
        row = state.unique_rows[:num].long()
        new = copy_of(state)
        new.rows[row] = update(state.rows[row], state.grads[:num], state.step, scale)
        new.grads[:num] = 0
        return new._replace(num_unique=state.num_unique * ~due, step=state.step + due)

    def apply_(state: TableState, scale: Tensor, due: Tensor) -> TableState:
        scalars = hyper(state.step + 1, scale)
        adamw_rows_(state.rows, state.grads, state.num_unique, state.unique_rows, scalars, due)
        state.step.add_(due)
        return state

    return SparseOptimizer(2, update, apply, apply_)


def _dense(hyper: Hyper) -> Transform:
    def init(params: Params) -> AdamState:
        device = next(iter(params.values())).device
        m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
        return AdamState(m, v, torch.zeros((), dtype=torch.int64, device=device))

    def update(
        state: AdamState, params: Params, grads: Params, scale: Tensor, due: Tensor | None
    ) -> tuple[AdamState, Params]:
        scalars = hyper(state.step + 1, scale).float().unbind()
        new: tuple[Params, Params, Params] = ({}, {}, {})
        for name, w in params.items():
            old = (w, state.m[name], state.v[name])
            for part, before, after in zip(new, old, adamw_update(*old, grads[name], scalars), strict=True):
                part[name] = after if due is None else torch.where(due, after, before)
        return AdamState(new[1], new[2], state.step + (1 if due is None else due)), new[0]

    def update_(
        state: AdamState, params: Params, grads: Params, scale: Tensor, due: Tensor | None
    ) -> tuple[AdamState, Params]:
        new_state, new_params = update(state, params, grads, scale, due)
        for target, source in ((params, new_params), (state.m, new_state.m), (state.v, new_state.v)):
            for name in target:
                target[name].copy_(source[name])
        state.step.copy_(new_state.step)
        return state, params

    return Transform(init, update, update_)
