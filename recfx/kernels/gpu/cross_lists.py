"""cross_lists on a GPU: distinct ids by the scratch table of find_or_insert_, whatever the lists' lengths.

key_lists     ids of both features end to end, each with the number of its list, those of y behind those of x
claim         every (list, id) claims a place, which ends with its first occurrence
flag_firsts   (scan) ranks of the first occurrences
count_pairs   first occurrences by rank; distinct x times distinct y of each sample (scan)
write_pairs   each place of the result looks its sample up, and in it x and y
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.find_or_insert import claim, scratch_table
from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, list_bounds, lower_bound, search_steps
from recfx.kernels.gpu.string_hash import hash_pair

__all__ = ["cross_lists"]


@triton.jit
def key_lists(id_P, cell_P, x, x_offsets, y, y_offsets, num_x, num_positions, num_lists, steps, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_y = k >= num_x
    place = tl.where(of_y, k - num_x, k)
    owner = lower_bound(tl.where(of_y, y_offsets, x_offsets) + 1, num_lists, steps, place + 1)
    id = tl.load(tl.where(of_y, y, x) + place, mask=k < num_positions, other=0)
    tl.store(id_P + k, id, mask=k < num_positions)
    cell = tl.where(owner < num_lists, owner + tl.where(of_y, num_lists, 0), -1)
    tl.store(cell_P + k, cell, mask=k < num_positions)


@triton.jit
def flag_firsts(flags_P, first_H, place_P, cell_P, num_positions, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    first = tl.load(first_H + tl.load(place_P + k, mask=valid, other=0), mask=valid, other=-1)
    tl.store(flags_P + k, (first == k).to(tl.int64), mask=k < num_positions)


@triton.jit
def rank_at(sums_P, position, within):
    """How many first occurrences stand before a position."""
    return tl.load(sums_P + position - 1, mask=within & (position > 0), other=0)


@triton.jit
def ranks_of(sums_P, offsets, before, size, owner, num_lists):
    """Ranks from which and up to which a list's distinct ids go; `before`: positions in front of its feature's."""
    begin, end = list_bounds(offsets, owner, num_lists, size)
    return rank_at(sums_P, begin + before, owner < num_lists), rank_at(sums_P, end + before, owner < num_lists)


@triton.jit
def count_pairs(
    firsts, num_pairs, flags_P, sums_P, x_offsets, y_offsets, num_x, num_positions, num_lists, BLOCK: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_first = tl.load(flags_P + k, mask=k < num_positions, other=0) > 0
    tl.store(firsts + rank_at(sums_P, k, is_first), k, mask=is_first)
    x_begin, x_end = ranks_of(sums_P, x_offsets, 0, num_x, k, num_lists)
    y_begin, y_end = ranks_of(sums_P, y_offsets, num_x, num_positions - num_x, k, num_lists)
    tl.store(num_pairs + k, (x_end - x_begin) * (y_end - y_begin), mask=k < num_lists)


@triton.jit
def write_pairs(
    values, weights, offsets, overflow, ends, firsts, sums_P, x, x_offsets, x_weights, y, y_offsets, y_weights, num_x,
    num_positions, num_lists, capacity, steps, X_WEIGHTED: tl.constexpr, Y_WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends + k - 1, mask=(k > 0) & (k <= num_lists), other=0)
    tl.store(offsets + k, tl.minimum(end, capacity).to(tl.int32), mask=k <= num_lists)
    owner = lower_bound(ends, num_lists, steps, (k + 1).to(tl.int64))
    has = (k < capacity) & (owner < num_lists)
    nth = k - rank_at(ends, owner, has)
    x_begin, _ = ranks_of(sums_P, x_offsets, 0, num_x, owner, num_lists)
    y_begin, y_end = ranks_of(sums_P, y_offsets, num_x, num_positions - num_x, owner, num_lists)
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
        tl.store(overflow, tl.maximum(tl.load(ends + num_lists - 1) - capacity, 0))


def cross_lists(
    x: Tensor, x_offsets: Tensor, x_weights: Tensor | None, y: Tensor, y_offsets: Tensor, y_weights: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`recfx.kernels.cross_lists.definition`."""
    num_x, num_lists, num = x.numel(), x_offsets.numel() - 1, x.numel() + y.numel()
    values, weights = x.new_empty(capacity), x.new_empty(capacity, dtype=torch.float32)
    offsets, overflow = torch.empty_like(x_offsets), x.new_empty(())
    if not (num and num_lists):
        return values.zero_(), weights.zero_(), offsets.zero_(), overflow.zero_()
    id_P, flags_P, num_pairs = x.new_empty(num), x.new_empty(num), x.new_empty(num_lists)
    cell_P, place_P, firsts = (x_offsets.new_empty(num) for _ in range(3))
    (first_H, _), steps, block = (
        scratch_table(cell_P),
        search_steps(num_lists),
        {"BLOCK": BLOCK, "num_warps": NUM_WARPS},
    )
    lists = torch.arange(2 * num_lists, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(num, BLOCK),)
    key_lists[grid](id_P, cell_P, x, x_offsets, y, y_offsets, num_x, num, num_lists, steps, **block)
    claim[grid](
        first_H, first_H, place_P, id_P, cell_P, lists, x.new_zeros(()), cell_P, num, len(lists),
        first_H.numel(), ADMITS=False, **block,
    )  # fmt: skip
    flag_firsts[grid](flags_P, first_H, place_P, cell_P, num, **block)
    sums_P = torch.cumsum(flags_P, 0)
    count_pairs[(triton.cdiv(max(num, num_lists), BLOCK),)](
        firsts, num_pairs, flags_P, sums_P, x_offsets, y_offsets, num_x, num, num_lists, **block
    )
    write_pairs[(triton.cdiv(max(capacity, num_lists + 1), BLOCK),)](
        values, weights, offsets, overflow, torch.cumsum(num_pairs, 0), firsts, sums_P, x, x_offsets,
        weights if x_weights is None else x_weights, y, y_offsets, weights if y_weights is None else y_weights, num_x,
        num, num_lists, capacity, steps, X_WEIGHTED=x_weights is not None, Y_WEIGHTED=y_weights is not None, **block,
    )  # fmt: skip
    return values, weights, offsets, overflow
