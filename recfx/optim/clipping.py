"""Gradient clipping, of the mean gradients that an optimiser uses. Value and row norm wrap an optimiser and compose;

    sparse_clip_value(sparse_clip_row_norm(sparse_adamw(1e-3), 1.0), 0.1)      values first, then row norms

the global norm couples all gradients of a step and is an argument of `recfx.step.train_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recfx.kernels.rows.clip_row_grads import clip_row_grads_, clipped, squared_norm
from recfx.optim.building import DenseOptimizer, SparseOptimizer
from recfx.table import RowLayout, TableState
from recfx.types import Params

__all__ = ["clip_global_norm", "clip_value", "sparse_clip_row_norm", "sparse_clip_value"]


def clip_value(optimizer: DenseOptimizer, limit: float) -> DenseOptimizer:
    """`optimizer` on gradients whose items are cut to +-limit, as torch.nn.utils.clip_grad_value_ does.

    Raises:   ValueError when limit is not above 0.
    """
    _check("limit", limit)

    def cut(update: Callable) -> Callable:
        def clipping(
            state: Any, params: Params, grads: Params, scale: Tensor, due: Tensor | None
        ) -> tuple[Any, Params]:
            grads = {name: (g * scale).clamp(-limit, limit) for name, g in grads.items()}
            return update(state, params, grads, torch.ones_like(scale), due)

        return clipping

    return DenseOptimizer(optimizer.init, cut(optimizer.update), cut(optimizer.update_))


def sparse_clip_value(optimizer: SparseOptimizer, limit: float) -> SparseOptimizer:
    """`optimizer` on row gradients whose items are cut to +-limit.

    Raises:   ValueError when limit is not above 0.
    """
    _check("limit", limit)
    return _sparse(optimizer, limit, math.inf)


def sparse_clip_row_norm(optimizer: SparseOptimizer, max_norm: float) -> SparseOptimizer:
    """`optimizer` on row gradients shortened to `max_norm`, each row of each logical table by itself.

    Raises:   ValueError when max_norm is not above 0.
    """
    _check("max_norm", max_norm)
    return _sparse(optimizer, math.inf, max_norm)


def clip_global_norm(max_norm: float) -> Callable[..., Tensor]:
    """For `train_step(clip=...)`: all gradients, dense and of rows, shortened together to `max_norm`.

    scale <- scale min(1, max_norm / (norm + 1e-6)), torch.nn.utils.clip_grad_norm_ over parameters and touched rows.

    Raises:   ValueError when max_norm is not above 0.
    """
    _check("max_norm", max_norm)

    def clip(
        grads: Params, tables: Sequence[TableState], scale: Tensor, *, total: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """As any `clip`. total: sums a number f64 [] over the ranks, each of which has its own rows."""
        squares = [g.double().square().sum() for g in grads.values()]
        of_rows = [squared_norm(t.grads, t.counters) for t in tables]
        squares += of_rows if total is None else [total(torch.stack(of_rows).sum())]
        norm = torch.stack(squares).sum().sqrt() * scale
        return scale * (max_norm / (norm + 1e-6)).clamp(max=1).float()

    return clip


def _sparse(optimizer: SparseOptimizer, limit: float, max_norm: float) -> SparseOptimizer:
    def update(rows: Tensor, grads: Tensor, step: Tensor, scale: Tensor) -> Tensor:
        return optimizer.update(rows, clipped(grads, scale, grads.shape[1:], limit, max_norm), step, scale)

    def apply_(
        state: TableState, scale: Tensor, due: Tensor, columns: RowLayout | None = None, most_rows: int | None = None
    ) -> TableState:
        dims = state.grads.shape[1:] if columns is None else columns.dims
        clip_row_grads_(state.grads, state.counters, scale, due, dims, limit, max_norm)
        return optimizer.apply_(state, scale, due, columns, most_rows)

    return optimizer._replace(update=update, apply_=apply_)


def _check(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value}, expected > 0. Nothing would be learnt.")
