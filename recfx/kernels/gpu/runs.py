"""Where the runs of equal items begin, in place of two binary searches for every reader."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["mark_begins", "run_of"]


@triton.jit
def fill_gap(begins, item, gap, n, lane, i, BLOCK: tl.constexpr):
    """What is left of lane i's gap, by all lanes."""
    here = lane == i
    last, size = tl.sum(tl.where(here, item, 0), axis=0), tl.sum(tl.where(here, gap, 0), axis=0)
    place = tl.sum(tl.where(here, n, 0), axis=0)
    for g in range(BLOCK, size, BLOCK):
        tl.store(begins + (last - g - lane), place + lane * 0, mask=g + lane < size)


@triton.jit
def mark_begins(begins, item, gap, n, BLOCK: tl.constexpr):
    """begins[item - g] = n for 0 <= g < gap: of an item that is found first at place n, and those before it that do
    not occur. Of a lane that marks nothing, gap is 0."""
    largest = tl.max(gap, axis=0)
    for g in range(tl.minimum(largest, BLOCK)):
        tl.store(begins + (item - g), n, mask=g < gap)
    if largest > BLOCK:
        lane = tl.arange(0, BLOCK)
        for i in range(BLOCK):
            fill_gap(begins, item, gap, n, lane, i, BLOCK)


@triton.jit
def run_of(begins, last_item, item):
    """begin and end of the places of each item; empty where it does not occur."""
    last = tl.load(last_item)
    begin = tl.load(begins + item, mask=item <= last, other=0)
    return begin, tl.load(begins + item + 1, mask=item <= last, other=0)
