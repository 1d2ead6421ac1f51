"""The occurrences of each unique row, one row after another and in order within a row, and where each row's begin.

Up to MERGED positions take two launches, where torch's sort takes 13:

    sort_block     a block of positions by (unique number, position), in registers
    merge_blocks   an item's place is the number of items before it: in its own block its place there, in each other
                   block found by bisection. The item before it in that order shows where a row begins.

Comparisons grow with the square of the number of blocks, so more positions than that are sorted by torch, and one
launch, `take_sorted`, reads what comes out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS
from recfx.kernels.gpu.runs import mark_begins

__all__ = ["in_order"]

BITS = tl.constexpr(10)
SIZE = 2**BITS.value  # words of a block that is sorted in registers: one position fewer, and an end
POSITIONS = SIZE - 1
MERGED = 64 * POSITIONS  # up to so many positions are merged
BLOCKS, ITEMS = 8, 64  # a program of `merge_blocks` looks for so many items in so many blocks at once
ABSENT = tl.constexpr(2**31 - 1)  # no gradient, or a block's end: greater than all others
MOST_NUMBERS = ABSENT.value >> BITS.value  # a word is 31 bits: number, and position in the block


@triton.jit
def sort_block(words, number_P, cell_P, num_positions, SIZE: tl.constexpr):
    """words i32 [blocks, SIZE]: number << BITS | position in the block, rising, then ABSENT once at least."""
    lane = tl.arange(0, SIZE)
    first = tl.program_id(0) * (SIZE - 1)
    within = (lane < SIZE - 1) & (first + lane < num_positions)
    valid = tl.load(cell_P + first + lane, mask=within, other=-1) >= 0
    number = tl.load(number_P + first + lane, mask=valid, other=-1)
    word = tl.sort(tl.where(number >= 0, (number << BITS) | lane, ABSENT))
    tl.store(words + tl.program_id(0) * SIZE + lane, word)


@triton.jit
def place_in_others(words, number, valid, place, before, own, num_blocks, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Each item's place among all blocks' items, and the number of the item before it, from those in its own."""
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)[:, None]
        other = (block < num_blocks) & (block != own)
        # Equal numbers of earlier blocks come before the item, those of later blocks after it.
        key = tl.where(valid[None, :], (number[None, :] + (block < own).to(tl.int32)) << BITS, ABSENT)
        begin = tl.minimum(block, num_blocks - 1) * SIZE
        low, step = begin + key * 0, SIZE // 2
        for _ in tl.static_range(BITS):  # no mask: a block's end is never less than a key
            low = tl.where(tl.load(words + (step - 1) + low) < key, low + step, low)
            step //= 2
        place += tl.sum(tl.where(other, low - begin, 0), axis=0)
        last = tl.load(words + (low - 1), mask=other & (low > begin), other=-1) >> BITS
        before = tl.maximum(before, tl.max(last, axis=0))
    return place, before


@triton.jit
def merge_blocks(
    number_N, cell_N, weight_N, begins, last_number, words, cell_P, weight_P, num_blocks, WEIGHTED: tl.constexpr,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * ITEMS // SIZE
    at = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    nth = at - own * SIZE
    word, previous = tl.load(words + at), tl.load(words + at - 1, mask=nth > 0, other=-1)
    if tl.min(previous, axis=0) < ABSENT:
        number, valid = word >> BITS, word < ABSENT
        place, before = place_in_others(words, number, valid, nth, previous >> BITS, own, num_blocks, SIZE, BLOCKS)
        k = own * (SIZE - 1) + (word & (SIZE - 1))
        tl.store(number_N + place, number, mask=valid)
        tl.store(cell_N + place, tl.load(cell_P + k, mask=valid, other=0), mask=valid)
        if WEIGHTED:
            tl.store(weight_N + place, tl.load(weight_P + k, mask=valid, other=0.0), mask=valid)
        # The place of the last block's first absent item is the end of the last row.
        is_end = (own == num_blocks - 1) & ~valid & (previous < ABSENT)
        tl.store(last_number + at * 0, before, mask=is_end)
        item = tl.where(valid, number, before + 1)
        mark_begins(begins, item, tl.where(valid | is_end, item - before, 0), place, ITEMS)


@triton.jit
def take_sorted(
    cell_N, weight_N, begins, last_number, number_N, order_N, cell_P, weight_P, num, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """number_N rises, -1 where there is no gradient."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(number_N + n, mask=n < num, other=-1)
    before = tl.load(number_N + n - 1, mask=(n > 0) & (n < num), other=-1)
    k = tl.load(order_N + n, mask=number >= 0, other=0)
    tl.store(cell_N + n, tl.load(cell_P + k, mask=number >= 0, other=-1), mask=n < num)
    if WEIGHTED:
        tl.store(weight_N + n, tl.load(weight_P + k, mask=number >= 0, other=0.0), mask=n < num)
    is_last = n == num - 1
    tl.store(last_number + n * 0, number, mask=is_last)
    tl.store(begins + number + 1, n + 1, mask=is_last)
    mark_begins(begins, number, tl.where(number >= 0, number - before, 0), n, BLOCK)


def in_order(
    number_P: Tensor, cell_P: Tensor, weight_P: Tensor | None, num_numbers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The positions that have a number and a cell, by number and in order within it.

    Shapes:  number_P i32 [P] less than num_numbers, cell_P i32 [P], both negative where there is no gradient,
             weight_P f32 [P].
    Returns: number_N, cell_N i32 [P], weight_N f32 [P] (cell_N where there is no weight), begins i32 and last_number
             i32 [1], from which `runs.run_of` reads the places of numbers 0 .. num_numbers - 1. The runs follow each
             other, and the last one ends at begins[last_number + 1]. Before the first one number_N is negative; after
             the last one nothing is written. A position with a number and no cell may be in its run, with cell -1.
    """
    num, weighted = cell_P.numel(), weight_P is not None
    weight = cell_P if weight_P is None else weight_P
    cell_N, begins, last_number = torch.empty_like(cell_P), cell_P.new_empty(num_numbers + 1), cell_P.new_empty(1)
    weight_N = cell_N if weight_P is None else torch.empty_like(weight_P)
    ends = begins, last_number
    if num <= MERGED and num_numbers <= MOST_NUMBERS:
        num_blocks, number_N = max(1, triton.cdiv(num, POSITIONS)), torch.empty_like(cell_P)
        words = cell_P.new_empty(num_blocks * SIZE)
        sort_block[(num_blocks,)](words, number_P, cell_P, num, SIZE=SIZE, num_warps=8)
        merge_blocks[(num_blocks * SIZE // ITEMS,)](
            number_N, cell_N, weight_N, *ends, words, cell_P, weight, num_blocks, WEIGHTED=weighted, SIZE=SIZE,
            BLOCKS=BLOCKS, ITEMS=ITEMS,
        )  # fmt: skip
    else:
        number_N, order_N = torch.sort(number_P, stable=True)
        take_sorted[(triton.cdiv(num, BLOCK),)](
            cell_N, weight_N, *ends, number_N, order_N, cell_P, weight, num, WEIGHTED=weighted, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return number_N, cell_N, weight_N, begins, last_number
