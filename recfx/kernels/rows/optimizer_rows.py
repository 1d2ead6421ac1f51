"""sgd_rows_, adagrad_rows_, rowwise_adagrad_rows_, adamw_rows_by_column_, ftrl_rows_: one step's rows, updated.

One operator per formula. What a formula does to a block of rows is written here, in torch; how a step's rows are walked
is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE, STEP
from recfx.kernels.op import define_op
from recfx.kernels.rows.adamw_rows import adamw_update

__all__ = [
    "RowOptimizer",
    "adagrad_rows",
    "adagrad_update",
    "adamw_rows_by_column",
    "ftrl_rows",
    "rowwise_adagrad_rows",
    "sgd_rows",
    "sgd_update",
    "updated_rows",
]

Own = Sequence[Tensor]
Widths = Sequence[int]
# (rows f32 [U, 1 + slots, W + row slots], grads f32 [U, W], decay and rate [] or [U, W], the formula's own scalars [],
# widths of the logical tables) -> rows
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Own, Widths], Tensor]


class RowOptimizer(NamedTuple):
    """What it does to a block of rows, see `updated_rows`; the operator that does it to a step's rows in place."""

    formula: Formula
    op_: Callable
    definition: Callable  # of the operator, in torch


def sgd_update(w: Tensor, g: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
    """w <- decay w - rate g."""
    return decay * w - rate * g


def adagrad_update(
    w: Tensor, sum: Tensor, g: Tensor, decay: Tensor, rate: Tensor, initial: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """g <- g + decay w;  sum <- sum + g^2;  w <- w - rate g / (sqrt(initial + sum) + eps)."""
    g = g + decay * w
    sum = sum + g * g
    return w - rate * g / ((initial + sum).sqrt() + eps), sum


def _sgd(rows: Tensor, g: Tensor, decay: Tensor, rate: Tensor, own: Own, dims: Widths) -> Tensor:
    return sgd_update(rows[:, 0], g, decay, rate)[:, None]


def _adagrad(rows: Tensor, g: Tensor, decay: Tensor, rate: Tensor, own: Own, dims: Widths) -> Tensor:
    w, sum = rows.unbind(1)
    initial, eps = own
    return torch.stack(adagrad_update(w, sum, g, decay, rate, initial, eps), dim=1)


def _rowwise_adagrad(rows: Tensor, g: Tensor, decay: Tensor, rate: Tensor, own: Own, dims: Widths) -> Tensor:
    """After the weights there is one sum per logical table, of the mean of its squared gradients."""
    initial, eps = own
    w, sum = rows[:, 0].split([g.shape[1], len(dims)], dim=1)
    g = g + decay * w
    squares = torch.stack([part.square().mean(dim=1) for part in g.split(list(dims), dim=1)], dim=1)
    sum = sum + squares
    root = ((initial + sum).sqrt() + eps).repeat_interleave(torch.tensor(dims, device=w.device), dim=1)
    return torch.cat([w - rate * g / root, sum], dim=1)[:, None]


def _adamw(rows: Tensor, g: Tensor, decay: Tensor, rate: Tensor, own: Own, dims: Widths) -> Tensor:
    w, m, v = rows.unbind(1)
    *betas, eps = own
    return torch.stack(adamw_update(w, m, v, g, [decay, *betas, rate, eps, torch.ones_like(eps)]), dim=1)


def _ftrl(rows: Tensor, g: Tensor, decay: Tensor, rate: Tensor, own: Own, dims: Widths) -> Tensor:
    """The proximal step: with r(n) = beta + sqrt(n), and r = 0 before a weight's first step,

    z <- z + rate g - (r(n + g^2) - r(n)) w;  n <- n + g^2;  w <- -sign(z) max(|z| - rate l1, 0) / (r(n) + rate decay)

    z is the paper's times the rate. A weight keeps its value where the rate, or r(n), is 0.
    """
    w, z, n = rows.unbind(1)
    beta, l1 = own
    before = torch.where((z == 0) & (n == 0), 0, beta + n.sqrt())
    n = n + g * g
    now = beta + n.sqrt()
    z = z + rate * g - (now - before) * w
    new = -torch.sign(z) * (z.abs() - rate * l1).clamp(min=0) / (now + rate * decay)
    return torch.stack([torch.where((rate > 0) & (now > 0), new, w), z, n], dim=1)


def updated_rows(
    formula: Formula,
    rows: Tensor,
    grads: Tensor,
    hyper: Tensor,
    dims: Sequence[int],
    rates: Tensor | None = None,
) -> Tensor:
    """`formula` on a block of rows.

    Shapes:   rows f32 [U, 1 + slots, W + row slots], grads f32 [U, W], hyper f64 [3 + n]: decay, rate, scale of the
              gradients and the formula's own; dims: widths of the logical tables, W in sum; rates f32 [U, 2, W]: decay
              and rate of each weight, in place of hyper's.
    """
    decay, rate, scale, *own = hyper.to(rows.dtype).unbind()
    if rates is not None:
        decay, rate = rates.unbind(1)
    return formula(rows, grads * scale, decay, rate, own, dims)


def _define(name: str, formula: Formula) -> RowOptimizer:
    def definition(
        rows: Tensor,
        grads: Tensor,
        counters: Tensor,
        unique_rows: Tensor,
        row_vocabularies: Tensor,
        hyper: Tensor,
        due: Tensor,
        dims: Sequence[int],
        rates: Tensor | None = None,
    ) -> None:
        """`updated_rows` for rows[unique_rows[:NUM_UNIQUE]]; grads and NUM_UNIQUE are then zero, STEP is one more.

        Nothing happens unless `due`: a micro-batch inside a gradient accumulation window leaves the rows alone.

        Shapes:   as in `updated_rows`, with rows of the whole table, unique_rows i32 [U], counters as in
                  `TableState`, row_vocabularies i32 [R], due bool [], and rates f32 [V, 2, W], by vocabulary.
        """
        if not due:
            return
        num = int(counters[NUM_UNIQUE])
        row = unique_rows[:num].long()
        of_row = None if rates is None else rates[row_vocabularies[row].long()]
        rows[row] = updated_rows(formula, rows[row], grads[:num], hyper, dims, of_row)
        grads[:num] = 0
        counters[NUM_UNIQUE] = 0
        counters[STEP] += 1

    op_ = define_op(
        f"{name}_",
        definition=definition,
        cuda="rows.gpu.optimizer_rows",
        fake=lambda *_: None,
    )
    return RowOptimizer(formula, op_, definition)


sgd_rows = _define("sgd_rows", _sgd)
adagrad_rows = _define("adagrad_rows", _adagrad)
rowwise_adagrad_rows = _define("rowwise_adagrad_rows", _rowwise_adagrad)
adamw_rows_by_column = _define("adamw_rows_by_column", _adamw)
ftrl_rows = _define("ftrl_rows", _ftrl)
