"""sum_adamw_rows_ on a GPU: as add_row_grads_, but the sum of a row's gradients goes from registers into AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import at_once, programs, rows_of
from recfx.kernels.gpu.runs import run_of
from recfx.kernels.rows.gpu.add_row_grads import chunk_sums, sum_of_rows
from recfx.kernels.rows.gpu.optimizer_rows import adamw, scalar

__all__ = ["sum_adamw_rows_"]

SUM_ADAMW = 8, 4, 3  # `launch.at_once`


@triton.jit
def update_slice(
    at, hyper, partial, block, cell_N, weight_N, width, begin, end, valid, WEIGHTED: tl.constexpr, FIRST: tl.constexpr,
    DIM: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = sum_of_rows(
        total, partial, block, cell_N, weight_N, width, begin, end, WEIGHTED, FIRST, DIM, LOOKUPS, COLUMNS, CHUNK
    )
    column = tl.arange(0, COLUMNS)[None, :]
    within = valid[:, None] & (column < DIM)
    decay, alpha, scale = scalar(hyper, 0), scalar(hyper, 5), scalar(hyper, 7)
    adamw(at, FIRST + column, within, within, total * scale, decay, alpha, hyper + 1, width, ())


@triton.jit
def sum_adamw(
    rows, count, unique_rows, hyper, stride, partial, cell_N, weight_N, begins, last_number, blocks, width,
    WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr, DIMS: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    num = tl.load(count)
    for first in range(tl.program_id(0) * ROWS, num, tl.num_programs(0) * ROWS):
        unique = first + tl.arange(0, ROWS)
        begin, end = run_of(begins, last_number, unique)
        row = tl.load(unique_rows + unique, mask=unique < num, other=0)
        at = rows + row.to(tl.int64)[:, None] * stride
        for s in tl.static_range(len(FIRSTS)):
            update_slice(
                at, hyper, partial, blocks[s], cell_N, weight_N, width, begin, end, unique < num, WEIGHTED, FIRSTS[s],
                DIMS[s], LOOKUPS[s], COLUMNS[s], ROWS, CHUNK,
            )  # fmt: skip


def sum_adamw_rows_(
    rows: Tensor, counters: Tensor, unique_rows: Tensor, hyper: Tensor, inverse_P: Tensor, cell_P: Tensor,
    firsts: Sequence[int], dims: Sequence[int], blocks: Sequence[Tensor], weight_P: Tensor | None = None,
) -> None:  # fmt: skip
    """`recfx.kernels.rows.sum_adamw_rows.definition`; the same bytes from run to run."""
    most, per_program = min(unique_rows.numel(), cell_P.numel()), rows_of(max(dims))
    sources, static, count = chunk_sums(
        inverse_P, cell_P, firsts, dims, blocks, weight_P, rows.shape[2], most, counters
    )
    sum_adamw[programs(most, per_program, at_once(sum(dims), SUM_ADAMW, len(dims)))](
        rows, count, unique_rows, hyper, rows.stride(0), *sources, ROWS=per_program, **static
    )
