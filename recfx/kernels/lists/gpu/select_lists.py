"""select_lists on a GPU: one launch for all columns."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, chosen, list_bounds

__all__ = ["select_lists"]


@triton.jit
def select_numbers(out, values, offsets, sizes, num_samples, dim, fill, BLOCK: tl.constexpr):
    column, num_columns = tl.program_id(1), tl.num_programs(1)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = sample < num_samples
    begin, end = list_bounds(chosen(offsets, column), sample, num_samples, chosen(sizes, column))
    numbers = chosen(values, column) + begin
    at = out + (sample.to(tl.int64) * num_columns + column) * dim
    for d in range(dim):
        number = tl.load(numbers + d, mask=begin + d < end, other=0.0)
        tl.store(at + d, tl.where(begin + d < end, number, fill), mask=within)


def select_lists(values: Sequence[Tensor], offsets: Sequence[Tensor], dim: int, fill: float) -> Tensor:
    """`recfx.kernels.lists.select_lists.definition`."""
    num_samples = offsets[0].numel() - 1
    out = values[0].new_empty(num_samples, len(values) * dim)
    if num_samples:
        select_numbers[(triton.cdiv(num_samples, BLOCK), len(values))](
            out, tuple(values), tuple(offsets), tuple(v.numel() for v in values), num_samples, dim, fill, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
