"""count_rows_ on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.counters import NUM_UNIQUE
from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, programs

__all__ = ["count_rows_"]


@triton.jit
def count_touched(counts, counters, unique_rows, due, BLOCK: tl.constexpr):
    num = tl.where(tl.load(due), tl.load(counters + NUM_UNIQUE), 0)
    for begin in range(tl.program_id(0) * BLOCK, num, tl.num_programs(0) * BLOCK):
        nth = begin + tl.arange(0, BLOCK)
        row = tl.load(unique_rows + nth, mask=nth < num, other=0)
        tl.store(counts + row, tl.load(counts + row, mask=nth < num, other=0) + 1, mask=nth < num)


def count_rows_(counts: Tensor, counters: Tensor, unique_rows: Tensor, due: Tensor) -> None:
    """`recfx.kernels.rows.count_rows.definition`."""
    count_touched[programs(unique_rows.numel(), BLOCK, at_once=32)](
        counts, counters, unique_rows, due, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
