"""take_lists on a GPU, all columns at once: lengths end to end, summed up, then each place looks its list up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, search_steps
from recfx.kernels.gpu.scan import lower_bound_of_sums, num_counters, store_sums, sum_up_to, sums_of

__all__ = ["take_lists"]


@triton.jit
def sum_lengths(sums_L, sums, counters, lengths, BEGINS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums up the lengths of all columns end to end, none below 0."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = lengths[0] + k
    for c in tl.static_range(1, len(lengths)):
        at = tl.where(k >= BEGINS[c], lengths[c] + (k - BEGINS[c]), at)
    within = k < BEGINS[len(lengths)]
    length = tl.load(at, mask=within, other=0)
    store_sums(sums_L, sums, counters, k, tl.maximum(length, 0).to(tl.int64), within)


@triton.jit
def take_column(
    out, out_offsets, values, size, first, ends, begin_list, num_lists, capacity, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """`ends` go on from those of the columns before. Outside the values every item is 0."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = sum_up_to(ends, begin_list - 1 + 0 * k, begin_list > 0 * k, BLOCK)
    end = sum_up_to(ends, begin_list + k - 1, (k > 0) & (k <= num_lists), BLOCK)
    tl.store(out_offsets + k, tl.where(k > 0, tl.minimum(end - before, capacity), 0).to(tl.int32), mask=k <= num_lists)
    owner = lower_bound_of_sums(ends, begin_list, num_lists, steps, k + 1 + before, BLOCK)
    has = (k < capacity) & (owner < num_lists)
    begin = sum_up_to(ends, begin_list + owner - 1, has & (owner > 0), BLOCK)
    place = k - tl.where(owner > 0, begin - before, 0)
    source = tl.load(first + owner, mask=has, other=0) + place
    has &= (source >= 0) & (source < size)
    tl.store(out + k, tl.load(values + source, mask=has, other=0), mask=k < capacity)


@triton.jit
def take_columns(
    outs, out_offsets, values, sizes, firsts, ends, steps, BEGINS: tl.constexpr, CAPACITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for c in tl.static_range(len(CAPACITIES)):
        if tl.program_id(1) == c:
            take_column(
                outs[c], out_offsets[c], values[c], sizes[c], firsts[c], ends, BEGINS[c],
                BEGINS[c + 1] - BEGINS[c], CAPACITIES[c], steps, BLOCK,
            )  # fmt: skip


def take_lists(
    values: Sequence[Tensor], first: Sequence[Tensor], length: Sequence[Tensor], capacity: Sequence[int]
) -> list[Tensor]:
    """`recfx.kernels.lists.take_lists.definition`."""
    out = [v.new_empty(size) for v, size in zip(values, capacity, strict=True)]
    offsets = [f.new_empty(f.numel() + 1) for f in first]
    nums = tuple(f.numel() for f in first)
    begins, grid = (0, *accumulate(nums)), (triton.cdiv(sum(nums), BLOCK),)
    sums_L = first[0].new_empty(sum(nums), dtype=torch.int64)
    sums = sums_of(sums_L, *grid)
    if any(nums):
        counters = first[0].new_full((num_counters(*grid),), -1)
        sum_lengths[grid](sums_L, sums, counters, tuple(length), BEGINS=begins, BLOCK=BLOCK, num_warps=NUM_WARPS)
    most = max(*capacity, *(o.numel() for o in offsets))
    take_columns[(triton.cdiv(most, BLOCK), len(values))](
        tuple(out), tuple(offsets), tuple(values), tuple(v.numel() for v in values), tuple(first),
        (sums_L, sums, *grid), search_steps(max(nums)), BEGINS=begins, CAPACITIES=tuple(capacity), BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return [t for pair in zip(out, offsets, strict=True) for t in pair]
