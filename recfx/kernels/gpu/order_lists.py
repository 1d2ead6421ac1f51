"""order_ids, order_lists and list_sums on a GPU: counted, summed up, then each position looks up its list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, list_bounds, lower_bound, search_steps

__all__ = ["list_sums", "order_ids", "order_lists"]


@triton.jit
def count_ids(count, offsets, num_lists, batch_size, num_lookups, LENGTHS: tl.constexpr, BLOCK: tl.constexpr):
    """How many ids of each list, sample by sample, have a place."""
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lookup = nth % num_lookups
    at = offsets + lookup * (batch_size + 1) + nth // num_lookups
    num = tl.load(at + 1, mask=nth < num_lists, other=0) - tl.load(at, mask=nth < num_lists, other=0)
    num = tl.maximum(num, 0)
    for l in tl.static_range(len(LENGTHS)):
        if LENGTHS[l] > 0:
            num = tl.where(lookup == l, tl.minimum(num, LENGTHS[l]), num)
    tl.store(count + nth, num, mask=nth < num_lists)


@triton.jit
def order_positions(
    id_P, cell_P, weight_P, ends, offsets, values, weights, sizes, num_positions, num_lists, batch_size, steps,
    LENGTHS: tl.constexpr, CELLS: tl.constexpr, WEIGHTED: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_lookups: tl.constexpr = len(LENGTHS)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    nth = lower_bound(ends, num_lists, steps, k + 1)
    valid = (k < num_positions) & (nth < num_lists)
    place = k - tl.load(ends + nth - 1, mask=valid & (nth > 0), other=0)
    lookup, sample = nth % num_lookups, nth // num_lookups
    at = place + tl.load(offsets + lookup * (batch_size + 1) + sample, mask=valid, other=0)
    id = tl.zeros([BLOCK], tl.int64)
    weight = tl.zeros([BLOCK], tl.float32)
    cell = sample * CELLS[num_lookups]
    is_id = k < 0
    for l in tl.static_range(num_lookups):
        # Whatever the offsets say: nothing is read outside the values, and no cell is another lookup's.
        mine = valid & (lookup == l) & (at >= 0) & (at < sizes[l])
        if LENGTHS[l] > 0:
            mine &= place < LENGTHS[l]
        is_id |= mine
        id += tl.load(values[l] + at, mask=mine, other=0)
        cell += tl.where(mine, CELLS[l], 0)
        if LENGTHS[l] > 0:
            cell += tl.where(mine, place, 0)
        if WEIGHTED:
            if HAS_WEIGHT[l]:
                weight += tl.load(weights[l] + at, mask=mine, other=0.0)
            else:
                weight += tl.where(mine, 1.0, 0.0)
    tl.store(id_P + k, id, mask=k < num_positions)
    tl.store(cell_P + k, tl.where(is_id, cell, -1), mask=k < num_positions)
    if WEIGHTED:
        tl.store(weight_P + k, weight, mask=k < num_positions)


@triton.jit
def sum_lists(sums, values, offsets, num_lists, num_values, BLOCK: tl.constexpr):
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = list_bounds(offsets, nth, num_lists, num_values)
    total = tl.zeros([BLOCK], tl.float64)
    for j in range(tl.max(end - begin, axis=0)):
        total += tl.load(values + begin + j, mask=begin + j < end, other=0.0).to(tl.float64)
    tl.store(sums + nth, total.to(tl.float32), mask=nth < num_lists)


def order(
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    lengths: Sequence[int],
    weights: Sequence[Tensor | None],
    weight_P: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num, batch_size = sum(v.numel() for v in values), offsets[0].numel() - 1
    num_lists = batch_size * len(values)
    id_P, cell_P = values[0].new_empty(num), offsets[0].new_empty(num)
    if num == 0:
        return id_P, cell_P
    of_lookup, count = torch.stack(list(offsets)), offsets[0].new_empty(num_lists)
    if num_lists:
        count_ids[(triton.cdiv(num_lists, BLOCK),)](
            count, of_lookup, num_lists, batch_size, len(values), LENGTHS=tuple(lengths), BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    first_cells = [sum(max(n, 1) for n in lengths[:l]) for l in range(len(lengths) + 1)]
    order_positions[(triton.cdiv(num, BLOCK),)](
        id_P, cell_P, id_P if weight_P is None else weight_P, torch.cumsum(count, 0, dtype=torch.int32), of_lookup,
        tuple(values), tuple(v if w is None else w for v, w in zip(values, weights, strict=True)),
        tuple(v.numel() for v in values), num, num_lists, batch_size, search_steps(num_lists), LENGTHS=tuple(lengths),
        CELLS=tuple(first_cells), WEIGHTED=weight_P is not None, HAS_WEIGHT=tuple(w is not None for w in weights),
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return id_P, cell_P


def order_ids(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`recfx.kernels.order_ids.definition`."""
    return order(values, offsets, [0] * len(values), [None] * len(values), None)


def order_lists(
    values: Sequence[Tensor], offsets: Sequence[Tensor], weights: Sequence[Tensor | None], lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`recfx.kernels.order_lists.definition`."""
    weight_P = values[0].new_empty(sum(v.numel() for v in values), dtype=torch.float32)
    return *order(values, offsets, lengths, weights, weight_P), weight_P


def list_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """`recfx.kernels.order_lists.list_sums_definition`."""
    num = offsets.numel() - 1
    sums = values.new_empty(num)
    if num:
        sum_lists[(triton.cdiv(num, BLOCK),)](
            sums, values, offsets, num, values.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return sums
