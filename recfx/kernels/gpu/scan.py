"""Sums over all programs of a launch, made by that launch: no program waits for another, and none is run for it.

Each program adds up its own items and hands in the total. The last one to do so of every PART programs turns the totals
of its part into sums of those before; the last part's does the same for the parts. The next launch then reads

    sum up to item i  =  items of i's program up to i  +  sum_before(i's program)

Sums are of integers and by place, so they do not depend on who is last. What programs hand to each other passes through
atomics, never by plain loads, which may show what memory held before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "add_up", "lower_bound_of_sums", "num_counters", "store_sums", "sum_before", "sum_of_all", "sum_up_to", "sums_of",
]  # fmt: skip

PART = tl.constexpr(128)  # programs whose totals one program adds up


def num_counters(num_programs: int) -> int:
    """How many i32 `add_up` counts with. Each is -1 before the launch."""
    return triton.cdiv(num_programs, PART.value) + 1


def sums_of(like: Tensor, num_programs: int) -> Tensor:
    """Memory for the sums of a launch, i64: programs, parts, all. Whatever it holds before."""
    return like.new_empty(num_programs + num_counters(num_programs), dtype=torch.int64)


@triton.jit
def sum_in_place(sums, num, before):
    """Up to PART sums become `before` plus those in front of each; what they sum up to."""
    nth = tl.arange(0, PART)
    item = tl.where(nth < num, tl.atomic_add(sums + nth, 0, mask=nth < num, sem="relaxed"), 0)
    tl.atomic_xchg(sums + nth, before + tl.cumsum(item, axis=0) - item, mask=nth < num, sem="relaxed")
    return tl.sum(item, axis=0)


@triton.jit
def add_up(sums, counters, total):
    """Hands in a program's total, an i64 scalar. Every program of the launch calls it once."""
    program, num = tl.program_id(0), tl.num_programs(0)
    part, num_parts = program // PART, (num + PART - 1) // PART
    size = tl.minimum(num - part * PART, PART)
    tl.atomic_xchg(sums + program, total, sem="relaxed")
    if tl.atomic_add(counters + part, 1, sem="acq_rel") == size - 2:
        of_part = sum_in_place(sums + part * PART, size, total * 0)
        tl.atomic_xchg(sums + num + part, of_part, sem="relaxed")
        if tl.atomic_add(counters + num_parts, 1, sem="acq_rel") == num_parts - 2:
            so_far = total * 0
            for first in range(0, num_parts, PART):
                so_far += sum_in_place(sums + num + first, num_parts - first, so_far)
            tl.atomic_xchg(sums + num + num_parts, so_far, sem="relaxed")


@triton.jit
def sum_before(sums, num_programs, program, mask):
    """i64 sums over the programs in front of each, read by a later launch."""
    within = tl.load(sums + program, mask=mask, other=0)
    return within + tl.load(sums + num_programs + program // PART, mask=mask, other=0)


@triton.jit
def sum_of_all(sums, num_programs):
    return tl.load(sums + num_programs + (num_programs + PART - 1) // PART)


@triton.jit
def store_sums(sums_P, sums, counters, k, item, mask):
    """Hands in the items k of a program, and stores their sums within it."""
    tl.store(sums_P + k, tl.cumsum(item, axis=0), mask=mask)
    add_up(sums, counters, tl.sum(item.to(tl.int64), axis=0))


@triton.jit
def sum_up_to(scan, k, mask, BLOCK: tl.constexpr):
    """i64 sums of all items up to k and with it. scan: (sums_P, sums, programs of BLOCK items) of `store_sums`."""
    return tl.load(scan[0] + k, mask=mask, other=0) + sum_before(scan[1], scan[2], k // BLOCK, mask)


@triton.jit
def lower_bound_of_sums(scan, first, num, steps, key, BLOCK: tl.constexpr):
    """The first of `num` items from item `first` on up to which the sum is not less than `key`; less `first`."""
    low = tl.zeros_like(key).to(tl.int32)
    high = low + num
    for _ in range(steps):
        middle = (low + high) // 2
        less = sum_up_to(scan, first + middle, low < high, BLOCK) < key
        high = tl.where((low < high) & ~less, middle, high)
        low = tl.where((low < high) & less, middle + 1, low)
    return low
