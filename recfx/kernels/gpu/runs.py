"""Where the runs of equal items begin: a pass over the items, in place of two binary searches for every reader."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS

__all__ = ["run_of", "runs_of"]


@triton.jit
def fill_gap(begins, item, gap, n, lane, i, BLOCK: tl.constexpr):
    """What is left of lane i's gap, by all lanes."""
    here = lane == i
    last, size = tl.sum(tl.where(here, item, 0), axis=0), tl.sum(tl.where(here, gap, 0), axis=0)
    place = tl.sum(tl.where(here, n, 0), axis=0)
    for g in range(BLOCK, size, BLOCK):
        tl.store(begins + (last - g - lane), place + lane * 0, mask=g + lane < size)


@triton.jit
def mark_runs(begins, last_item, item_N, num, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    n = tl.program_id(0) * BLOCK + lane
    item = tl.load(item_N + n, mask=n < num, other=-1)
    before = tl.load(item_N + n - 1, mask=(n > 0) & (n < num), other=-1)
    behind = tl.load(item_N + n + 1, mask=n + 1 < num, other=-1)
    gap = tl.where(item >= 0, item - before, 0)
    largest = tl.max(gap, axis=0)
    for g in range(tl.minimum(largest, BLOCK)):
        tl.store(begins + (item - g), n, mask=g < gap)
    if largest > BLOCK:
        for i in range(BLOCK):
            fill_gap(begins, item, gap, n, lane, i, BLOCK)
    is_last = (item >= 0) & (behind < 0)
    tl.store(begins + item + 1, n + 1, mask=is_last)
    is_none = (n == 0) & (item < 0) & (tl.load(item_N + num - 1, mask=num > 0, other=-1) < 0)
    tl.store(last_item + n * 0, tl.where(is_last, item, -1), mask=is_last | is_none)


@triton.jit
def run_of(begins, last_item, item):
    """begin and end of the places of each item; empty where it does not occur."""
    last = tl.load(last_item)
    begin = tl.load(begins + item, mask=item <= last, other=0)
    return begin, tl.load(begins + item + 1, mask=item <= last, other=0)


def runs_of(item_N: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """What `run_of` reads of items 0 .. num_items - 1 that rise along item_N, -1 where there is none, all of those in
    front of the others or all behind them."""
    begins, last_item, num = item_N.new_empty(num_items + 1), item_N.new_empty(1), item_N.numel()
    grid = (max(1, triton.cdiv(num, BLOCK)),)
    mark_runs[grid](begins, last_item, item_N, num, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return begins, last_item
