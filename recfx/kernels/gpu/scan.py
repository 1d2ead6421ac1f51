"""Sums over all programs of a launch, made by that launch: no program waits for another, and none is run for it.

Each program adds up its own items and hands in the total. The last one to do so of every PART programs turns the totals
of its part into sums of those before; the last part's does the same for the parts. A launch behind it then reads

    sum up to item i  =  items of i's program up to i  +  sum_before(i's program)

Sums are of integers and by place, so they do not depend on who is last. What programs hand to each other goes by
atomics, never by plain loads, which may show what memory held before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_up", "num_counters", "sum_before", "sum_of_all", "sums_of"]

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
