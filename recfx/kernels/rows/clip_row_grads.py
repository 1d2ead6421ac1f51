"""clip_row_grads_ and squared_norm: the gradients of one step's rows, clipped, and the sum of their squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE
from recfx.kernels.op import define_op

__all__ = ["clip_row_grads_", "clipped", "squared_norm"]


def clipped(grads: Tensor, scale: Tensor, dims: Sequence[int], limit: float, max_norm: float) -> Tensor:
    """grads so that, times scale, no item is beyond +-limit, and then no logical row's norm beyond max_norm.

    Shapes:   grads f32 [U, W], scale f32 [], dims: widths of the logical tables, W in sum -> f32 [U, W].
    """
    bound = limit / scale
    parts = torch.minimum(torch.maximum(grads, -bound), bound).split(list(dims), dim=1)
    factors = [max_norm / (part.norm(dim=1, keepdim=True) * scale) for part in parts]
    return torch.cat([torch.where(f < 1, part * f, part) for part, f in zip(parts, factors, strict=True)], dim=1)


def definition(
    grads: Tensor, counters: Tensor, scale: Tensor, due: Tensor, dims: Sequence[int], limit: float, max_norm: float
) -> None:
    """`clipped` on grads[:NUM_UNIQUE], unless the step is not `due`.

    Shapes:   grads f32 [U, W], counters as in `TableState`, scale f32 [], due bool [].
    """
    if due:
        num = int(counters[NUM_UNIQUE])
        grads[:num] = clipped(grads[:num], scale, dims, limit, max_norm)


clip_row_grads_ = define_op(
    "clip_row_grads_",
    definition=definition,
    cuda="rows.gpu.clip_row_grads",
    fake=lambda *_: None,
)


def squared_norm_definition(grads: Tensor, counters: Tensor) -> Tensor:
    """The sum of squares of grads[:NUM_UNIQUE], f64 []. Shapes: grads f32 [U, W], counters as in `TableState`."""
    return grads[: int(counters[NUM_UNIQUE])].double().square().sum()


squared_norm = define_op(
    "squared_norm",
    definition=squared_norm_definition,
    cuda="rows.gpu.clip_row_grads",
    fake=lambda grads, counters: grads.new_empty((), dtype=torch.float64),
)
