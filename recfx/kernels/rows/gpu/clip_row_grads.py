"""clip_row_grads_ and squared_norm on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.counters import NUM_UNIQUE
from recfx.kernels.gpu.launch import at_once, columns_of, cover_of, programs, rows_of

__all__ = ["clip_row_grads_", "squared_norm"]

CLIP_ROWS, SUM_SQUARES = (10, 10, 6), (12, 12, 12)  # `launch.at_once`


@triton.jit
def clip_rows(
    grads, counters, scale, due, stride, width, limit, max_norm, DIMS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, COVER: tl.constexpr,
):  # fmt: skip
    num = tl.where(tl.load(due), tl.load(counters + NUM_UNIQUE), 0)
    column = tl.arange(0, COLUMNS)[None, :]
    by = tl.load(scale)
    bound = limit / by
    for first_row in range(tl.program_id(0) * ROWS, num, tl.num_programs(0) * ROWS):
        unique = first_row + tl.arange(0, ROWS)[:, None]
        covers = (unique < num) & (column < COVER)  # what comes after the width is nobody's
        at = grads + unique.to(tl.int64) * stride + column
        g = tl.load(at, mask=covers, other=0.0)
        g = tl.where(g > bound, bound, tl.where(g < -bound, -bound, g))
        first = 0
        for t in tl.static_range(len(DIMS)):
            mine = (column >= first) & (column < first + DIMS[t])
            norm = tl.sqrt_rn(tl.sum(tl.where(mine, g * g, 0.0), axis=1))[:, None]
            cut = norm * by > max_norm
            factor = tl.div_rn(tl.zeros_like(norm) + max_norm, tl.where(cut, norm * by, 1.0))
            g = tl.where(mine & cut, g * factor, g)
            first += DIMS[t]
        tl.store(at, g, mask=covers)


@triton.jit
def sum_squares(
    sums, grads, counters, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COVER: tl.constexpr
):  # fmt: skip
    num = tl.load(counters + NUM_UNIQUE)
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(tl.program_id(0) * ROWS, num, tl.num_programs(0) * ROWS):
        unique = first + tl.arange(0, ROWS)[:, None]
        covers = (unique < num) & (column < COVER)
        g = tl.load(grads + unique.to(tl.int64) * stride + column, mask=covers, other=0.0).to(tl.float64)
        total += tl.where(column < width, g * g, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


def clip_row_grads_(
    grads: Tensor, counters: Tensor, scale: Tensor, due: Tensor, dims: Sequence[int], limit: float, max_norm: float
) -> None:
    """`recfx.kernels.rows.clip_row_grads.definition`."""
    width = grads.shape[1]
    clip_rows[programs(grads.shape[0], rows_of(width), at_once(width, CLIP_ROWS))](
        grads, counters, scale, due, grads.stride(0), width, limit, max_norm, DIMS=tuple(dims), ROWS=rows_of(width),
        COLUMNS=columns_of(width), COVER=cover_of(width, grads.stride(0)),
    )  # fmt: skip


def squared_norm(grads: Tensor, counters: Tensor) -> Tensor:
    """`recfx.kernels.rows.clip_row_grads.squared_norm_definition`; the same bytes from run to run."""
    num, width = grads.shape
    grid = programs(num, rows_of(width), at_once(width, SUM_SQUARES))
    sums = grads.new_empty(grid, dtype=torch.float64)
    sum_squares[grid](
        sums, grads, counters, grads.stride(0), width, ROWS=rows_of(width), COLUMNS=columns_of(width),
        COVER=cover_of(width, grads.stride(0)),
    )  # fmt: skip
    return sums.sum()
