"""cross_lists on a GPU: distinct ids by the scratch table of find_or_insert_, whatever the lists' lengths.

key_lists     ids of both features end to end, each with the number of its list, those of y after those of x
claim         every (list, id) claims a place, which ends with its first occurrence
flag_firsts   first occurrences are summed up (`scan.py`), which ranks them
count_pairs   first occurrences by rank; distinct x times distinct y of each sample, summed up
write_pairs   each place of the result looks its sample up, and in it x and y
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, list_bounds, lower_bound, search_steps
from recfx.kernels.gpu.scan import lower_bound_of_sums, num_counters, store_sums, sum_of_all, sum_up_to, sums_of
from recfx.kernels.index.gpu.find_or_insert import claim, scratch_table
from recfx.kernels.lists.gpu.string_hash import hash_pair

__all__ = ["cross_lists"]


@triton.jit
def key_lists(
    id_P, cell_P, lists, x, x_offsets, y, y_offsets, num_x, num_positions, num_lists, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """lists: 0, 1 .. for `claim`, which finds an item's list there as it finds an id's vocabulary."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_y = k >= num_x
    place = tl.where(of_y, k - num_x, k)
    owner = lower_bound(tl.where(of_y, y_offsets, x_offsets) + 1, num_lists, steps, place + 1)
    id = tl.load(tl.where(of_y, y, x) + place, mask=k < num_positions, other=0)
    tl.store(id_P + k, id, mask=k < num_positions)
    tl.store(lists + k, k, mask=k < 2 * num_lists)
    cell = tl.where(owner < num_lists, owner + tl.where(of_y, num_lists, 0), -1)
    tl.store(cell_P + k, cell, mask=k < num_positions)


@triton.jit
def flag_firsts(flags_P, sums_P, sums, counters, first_H, place_P, cell_P, num_positions, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    first = tl.load(first_H + tl.load(place_P + k, mask=valid, other=0), mask=valid, other=-1)
    flag = (first == k).to(tl.int32)
    tl.store(flags_P + k, flag, mask=k < num_positions)
    store_sums(sums_P, sums, counters, k, flag, k < num_positions)


@triton.jit
def rank_at(ranks, position, within, BLOCK: tl.constexpr):
    """How many first occurrences stand before a position."""
    return sum_up_to(ranks, position - 1, within & (position > 0), BLOCK)


@triton.jit
def ranks_of(ranks, offsets, before, size, owner, num_lists, BLOCK: tl.constexpr):
    """Ranks from which and up to which a list's distinct ids go; `before`: positions in front of its feature's."""
    begin, end = list_bounds(offsets, owner, num_lists, size)
    within = owner < num_lists
    return rank_at(ranks, begin + before, within, BLOCK), rank_at(ranks, end + before, within, BLOCK)


@triton.jit
def count_pairs(
    firsts, sums_L, sums, counters, flags_P, ranks, x_offsets, y_offsets, num_x, num_positions, num_lists,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_first = tl.load(flags_P + k, mask=k < num_positions, other=0) > 0
    tl.store(firsts + rank_at(ranks, k, is_first, BLOCK), k, mask=is_first)
    x_begin, x_end = ranks_of(ranks, x_offsets, 0, num_x, k, num_lists, BLOCK)
    y_begin, y_end = ranks_of(ranks, y_offsets, num_x, num_positions - num_x, k, num_lists, BLOCK)
    store_sums(sums_L, sums, counters, k, (x_end - x_begin) * (y_end - y_begin), k < num_lists)


@triton.jit
def write_pairs(
    values, weights, offsets, overflow, ends, firsts, ranks, x, x_offsets, x_weights, y, y_offsets, y_weights, num_x,
    num_positions, num_lists, capacity, steps, X_WEIGHTED: tl.constexpr, Y_WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = sum_up_to(ends, k - 1, (k > 0) & (k <= num_lists), BLOCK)
    tl.store(offsets + k, tl.minimum(end, capacity).to(tl.int32), mask=k <= num_lists)
    owner = lower_bound_of_sums(ends, 0, num_lists, steps, k + 1, BLOCK)
    has = (k < capacity) & (owner < num_lists)
    nth = k - sum_up_to(ends, owner - 1, has & (owner > 0), BLOCK)
    x_begin, _ = ranks_of(ranks, x_offsets, 0, num_x, owner, num_lists, BLOCK)
    y_begin, y_end = ranks_of(ranks, y_offsets, num_x, num_positions - num_x, owner, num_lists, BLOCK)
    num_y = tl.maximum(y_end - y_begin, 1)
    x_at = tl.load(firsts + x_begin + nth // num_y, mask=has, other=0)
    y_at = tl.load(firsts + y_begin + nth % num_y, mask=has, other=num_x) - num_x
    value = hash_pair(tl.load(x + x_at, mask=has, other=0), tl.load(y + y_at, mask=has, other=0))
    tl.store(values + k, tl.where(has, value, 0), mask=k < capacity)
    weight = tl.where(has, 1.0, 0.0)
    if X_WEIGHTED:
        weight *= tl.load(x_weights + x_at, mask=has, other=0.0)
    if Y_WEIGHTED:
        weight *= tl.load(y_weights + y_at, mask=has, other=0.0)
    tl.store(weights + k, weight, mask=k < capacity)
    if tl.program_id(0) == 0:
        tl.store(overflow, tl.maximum(sum_of_all(ends[1], ends[2]) - capacity, 0))


def cross_lists(
    x: Tensor, x_offsets: Tensor, x_weights: Tensor | None, y: Tensor, y_offsets: Tensor, y_weights: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`recfx.kernels.lists.cross_lists.definition`."""
    num_x, num_lists, num = x.numel(), x_offsets.numel() - 1, x.numel() + y.numel()
    values, weights = x.new_empty(capacity), x.new_empty(capacity, dtype=torch.float32)
    offsets, overflow = torch.empty_like(x_offsets), x.new_empty(())
    if not (num and num_lists):
        return values.zero_(), weights.zero_(), offsets.zero_(), overflow.zero_()
    grid, of_lists = (triton.cdiv(num, BLOCK),), (triton.cdiv(max(num, num_lists), BLOCK),)
    id_P, sums_L, sums, of_pairs = x.new_empty(num), x.new_empty(num_lists), sums_of(x, *grid), sums_of(x, *of_lists)
    cell_P, flags_P, sums_P, place_P, firsts = (x_offsets.new_empty(num) for _ in range(5))
    lists, sizes = x_offsets.new_empty(2 * num_lists), [num_counters(*grid), num_counters(*of_lists)]
    first_H, counters = scratch_table(cell_P, num_counters=sum(sizes))
    counters, counters_of_pairs = counters.split(sizes)
    steps, block = search_steps(num_lists), {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    key_lists[(triton.cdiv(max(num, 2 * num_lists), BLOCK),)](
        id_P, cell_P, lists, x, x_offsets, y, y_offsets, num_x, num, num_lists, steps, **block
    )
    salt = lists  # its first item: 0
    claim[grid](
        first_H, first_H, place_P, id_P, cell_P, lists, salt, cell_P, num, len(lists), first_H.numel(), ADMITS=False,
        **block,
    )  # fmt: skip
    flag_firsts[grid](flags_P, sums_P, sums, counters, first_H, place_P, cell_P, num, **block)
    ranks, ends = (sums_P, sums, *grid), (sums_L, of_pairs, *of_lists)
    count_pairs[of_lists](
        firsts, sums_L, of_pairs, counters_of_pairs, flags_P, ranks, x_offsets, y_offsets, num_x, num, num_lists,
        **block,
    )  # fmt: skip
    write_pairs[(triton.cdiv(max(capacity, num_lists + 1), BLOCK),)](
        values, weights, offsets, overflow, ends, firsts, ranks, x, x_offsets,
        weights if x_weights is None else x_weights, y, y_offsets, weights if y_weights is None else y_weights, num_x,
        num, num_lists, capacity, steps, X_WEIGHTED=x_weights is not None, Y_WEIGHTED=y_weights is not None, **block,
    )  # fmt: skip
    return values, weights, offsets, overflow
