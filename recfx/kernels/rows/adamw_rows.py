"""adamw_rows_: the AdamW family on the unique rows of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE, STEP
from recfx.kernels.dense import all_finite
from recfx.kernels.op import define_op

__all__ = ["adamw_rows_", "adamw_rows_checked_", "adamw_update"]


def adamw_update(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """m <- b1 m + c1 g;  v <- b2 v + c2 g^2;  w <- decay w - alpha m / (sqrt(v) + eps), with g scaled by `scale`.

    Shapes:   w, m, v, g alike; scalars [] of w's dtype: decay, b1, c1, b2, c2, alpha, eps, scale.
    """
    decay, b1, c1, b2, c2, alpha, eps, scale = scalars
    g = g * scale
    m = b1 * m + c1 * g
    v = b2 * v + c2 * g * g
    return decay * w - alpha * m / (v.sqrt() + eps), m, v


def definition(rows: Tensor, grads: Tensor, counters: Tensor, unique_rows: Tensor, hyper: Tensor, due: Tensor) -> None:
    """`adamw_update` on rows[unique_rows[:NUM_UNIQUE]]; grads and NUM_UNIQUE are then zero, STEP is one more.

    Nothing happens unless `due`: a micro-batch inside a gradient accumulation window leaves the rows alone.

    Shapes:   rows f32 [R, 3, W] (weight, m, v), grads f32 [U, W], unique_rows i32 [U], counters as in
              `TableState`, hyper f64 [8], the scalars of `adamw_update`, due bool [].
    """
    if not due:
        return
    num = int(counters[NUM_UNIQUE])
    row = unique_rows[:num].long()
    w, m, v = rows[row].unbind(1)
    for slot, new in enumerate(adamw_update(w, m, v, grads[:num], hyper.to(w.dtype).unbind())):
        rows[row, slot] = new
    grads[:num] = 0
    counters[NUM_UNIQUE] = 0
    counters[STEP] += 1


def checked_definition(
    rows: Tensor,
    grads: Tensor,
    counters: Tensor,
    unique_rows: Tensor,
    hyper: Tensor,
    due: Tensor,
    others: Sequence[Tensor],
) -> Tensor:
    """`adamw_rows_`; returns bool []: whether grads[:NUM_UNIQUE] and `others` were finite.

    Shapes:   others f32, of any shape.
    """
    found = all_finite.definition(others, [grads], [counters if due else torch.zeros_like(counters)])
    definition(rows, grads, counters, unique_rows, hyper, due)
    return found


adamw_rows_ = define_op(
    "adamw_rows_",
    definition=definition,
    cuda="rows.gpu.optimizer_rows",
    fake=lambda *_: None,
)

# On a CPU, where the rows' gradients are read for the update anyway. On others the definition reads the host.
adamw_rows_checked_ = define_op(
    "adamw_rows_checked_",
    definition=checked_definition,
    fake=lambda rows, grads, counters, unique_rows, hyper, due, others: torch.empty_like(due),
)
