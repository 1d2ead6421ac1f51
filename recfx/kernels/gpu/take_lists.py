"""take_lists on a GPU, all columns at once: lengths end to end, summed up, then each place looks its list up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, chosen, lower_bound, search_steps

__all__ = ["take_lists"]


@triton.jit
def join_lengths(joined, lengths, nums, BEGINS: tl.constexpr, BLOCK: tl.constexpr):
    """The lengths of all columns end to end, none below 0: i64, so that they are summed up as they are."""
    column = tl.program_id(1)
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = nth < chosen(nums, column)
    length = tl.load(chosen(lengths, column) + nth, mask=within, other=0)
    tl.store(joined + chosen(BEGINS, column) + nth, tl.maximum(length, 0).to(tl.int64), mask=within)


@triton.jit
def take_column(
    out, out_offsets, values, size, first, ends, has_before, num_lists, capacity, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """`ends` go on from those of the column before, if there is one. Outside the values every item is 0."""
    before = tl.load(ends - 1, mask=has_before, other=0)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends + k - 1, mask=(k > 0) & (k <= num_lists), other=0)
    tl.store(out_offsets + k, tl.where(k > 0, tl.minimum(end - before, capacity), 0).to(tl.int32), mask=k <= num_lists)
    owner = lower_bound(ends, num_lists, steps, k + 1 + before)
    has = (k < capacity) & (owner < num_lists)
    begin = tl.load(ends + owner - 1, mask=has & (owner > 0), other=0)
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
                outs[c], out_offsets[c], values[c], sizes[c], firsts[c], ends + BEGINS[c], BEGINS[c] > 0,
                BEGINS[c + 1] - BEGINS[c], CAPACITIES[c], steps, BLOCK,
            )  # fmt: skip


def take_lists(
    values: Sequence[Tensor], first: Sequence[Tensor], length: Sequence[Tensor], capacity: Sequence[int]
) -> list[Tensor]:
    """`recfx.kernels.take_lists.definition`."""
    out = [v.new_empty(size) for v, size in zip(values, capacity, strict=True)]
    offsets = [f.new_empty(f.numel() + 1) for f in first]
    nums = tuple(f.numel() for f in first)
    begins, joined = (0, *accumulate(nums)), first[0].new_empty(sum(nums), dtype=torch.int64)
    if any(nums):
        join_lengths[(triton.cdiv(max(nums), BLOCK), len(nums))](
            joined, tuple(length), nums, BEGINS=begins, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    ends, most = torch.cumsum(joined, 0), max(*capacity, *(o.numel() for o in offsets))
    take_columns[(triton.cdiv(most, BLOCK), len(values))](
        tuple(out), tuple(offsets), tuple(values), tuple(v.numel() for v in values), tuple(first), ends,
        search_steps(max(nums)), BEGINS=begins, CAPACITIES=tuple(capacity), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return [t for pair in zip(out, offsets, strict=True) for t in pair]
