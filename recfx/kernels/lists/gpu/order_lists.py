"""order_ids, order_lists and list_sums on a GPU.

Offsets are sums already: how many ids come before a sample is the sum of its lookups' offsets. So one launch orders
whole lists (`order_cells`): a program takes some samples, writes where each of their lists ends, and then looks up the
list of each of its positions. Lists that are cut (`lengths`) are counted, summed up, and then looked up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, chosen, columns_of, list_bounds, lower_bound, search_steps
from recfx.kernels.gpu.scan import lower_bound_of_sums, num_counters, store_sums, sum_up_to, sums_of

__all__ = ["list_sums", "order_ids", "order_ids_ends", "order_lists"]

FEW_CELLS, CELLS = 256, 1024  # lists of a program of `order_cells`: of few lists many programs, of many fewer steps
MANY = 2**18  # lists from which a program takes more


@triton.jit
def offset_at(offsets, place, size, within):
    """Of each lookup; whatever the offsets say, 0 to the number of its values."""
    return tl.minimum(tl.maximum(tl.load(offsets + place, mask=within, other=0), 0), size).to(tl.int32)


@triton.jit
def num_before(offsets, place, size, within):
    """Ids before a place of all lookups' offsets."""
    return tl.sum(offset_at(offsets, place, size, within) - offset_at(offsets, 0, size, within))


@triton.jit
def write_ends(
    ends, sources, weight_sources, offsets, values, weights, sizes, first, num_samples, LOOKUPS: tl.constexpr,
    SAMPLES: tl.constexpr, WEIGHTED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Where each list of samples `first` and on ends; for position k its id is at source + 8 k, its weight at weight
    source + 4 k, 0 without weights. Returns the positions of these samples: the first, the last + 1, and of all."""
    num_lookups: tl.constexpr = len(offsets)
    lookup = tl.arange(0, LOOKUPS)[None, :]
    sample = tl.arange(0, SAMPLES)[:, None]
    at, size, real = chosen(offsets, lookup) + 0 * lookup, chosen(sizes, lookup), lookup < num_lookups
    num_here = tl.minimum(num_samples - first, SAMPLES)
    within = real & (sample < num_here)
    begin = offset_at(at, first + sample, size, within)
    num = tl.maximum(offset_at(at, first + sample + 1, size, within) - begin, 0)
    position = num_before(at, first, size, real)
    all: tl.constexpr = SAMPLES * LOOKUPS
    end = position + tl.reshape(tl.cumsum(tl.reshape(num, [all]), axis=0), [SAMPLES, LOOKUPS])
    cell = (first + sample) * num_lookups + lookup
    tl.store(ends + cell, end, mask=within)
    behind = (begin - (end - num)).to(tl.int64)
    tl.store(sources + cell, chosen(values, lookup).to(tl.int64) + 8 * behind, mask=within)
    if WEIGHTED:
        source = chosen(weights, lookup).to(tl.int64) + 4 * behind
        tl.store(weight_sources + cell, tl.where(chosen(HAS_WEIGHT, lookup) != 0, source, 0), mask=within)
    return position, num_before(at, first + num_here, size, real), num_before(at, num_samples, size, real)


@triton.jit
def order_cells(
    id_P, cell_P, weight_P, ends, sources, weight_sources, offsets, values, weights, sizes, num_positions, num_samples,
    steps, LOOKUPS: tl.constexpr, SAMPLES: tl.constexpr, WEIGHTED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every position is written, whatever the offsets say: where a program ends the next one begins, by the same sum.
    If that sum falls, as it does for no right offsets, two programs may write a position."""
    first = tl.program_id(0) * SAMPLES
    begin, end, total = write_ends(
        ends, sources, weight_sources, offsets, values, weights, sizes, first, num_samples, LOOKUPS, SAMPLES, WEIGHTED,
        HAS_WEIGHT,
    )  # fmt: skip
    tl.debug_barrier()  # what this program wrote is read by other threads of it
    first_cell, num_cells = first * len(offsets), tl.minimum(num_samples - first, SAMPLES) * len(offsets)
    for block in range(tl.maximum(begin, 0), tl.minimum(end, num_positions), BLOCK):
        k = block + tl.arange(0, BLOCK)
        mine = (k < end) & (k < num_positions)
        nth = lower_bound(ends + first_cell, num_cells, steps, k + 1)
        has = mine & (nth < num_cells)
        cell = first_cell + nth
        source = tl.load(sources + cell, mask=has, other=0) + 8 * k.to(tl.int64)
        tl.store(id_P + k, tl.load(source.to(tl.pointer_type(tl.int64)), mask=has, other=0), mask=mine)
        tl.store(cell_P + k, tl.where(has, cell, -1), mask=mine)
        if WEIGHTED:
            source = tl.load(weight_sources + cell, mask=has, other=0)
            weighted = has & (source != 0)
            at = (source + 4 * k.to(tl.int64)).to(tl.pointer_type(tl.float32))
            weight = tl.where(weighted, tl.load(at, mask=weighted, other=0.0), tl.where(has, 1.0, 0.0))
            tl.store(weight_P + k, weight, mask=mine)
    for block in range(tl.maximum(total, 0) + tl.program_id(0) * BLOCK, num_positions, tl.num_programs(0) * BLOCK):
        k = block + tl.arange(0, BLOCK)
        tl.store(id_P + k, tl.zeros([BLOCK], tl.int64), mask=k < num_positions)
        tl.store(cell_P + k, tl.full([BLOCK], -1, tl.int32), mask=k < num_positions)
        if WEIGHTED:
            tl.store(weight_P + k, tl.zeros([BLOCK], tl.float32), mask=k < num_positions)


@triton.jit
def count_ids(sums_L, sums, counters, offsets, num_lists, LENGTHS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums up how many ids of each list, sample by sample, have a place."""
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lookup = nth % len(LENGTHS)
    at = chosen(offsets, lookup) + nth // len(LENGTHS)
    num = tl.load(at + 1, mask=nth < num_lists, other=0) - tl.load(at, mask=nth < num_lists, other=0)
    num, length = tl.maximum(num, 0), chosen(LENGTHS, lookup)
    store_sums(sums_L, sums, counters, nth, tl.where(length > 0, tl.minimum(num, length), num), nth < num_lists)


@triton.jit
def order_positions(
    id_P, cell_P, weight_P, ends, offsets, values, weights, sizes, num_positions, num_lists, steps,
    LENGTHS: tl.constexpr, FIRST_CELLS: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_lookups: tl.constexpr = len(LENGTHS)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    nth = lower_bound_of_sums(ends, 0, num_lists, steps, k + 1, BLOCK)
    valid = (k < num_positions) & (nth < num_lists)
    place = k - sum_up_to(ends, nth - 1, valid & (nth > 0), BLOCK).to(tl.int32)
    lookup, sample = nth % num_lookups, nth // num_lookups
    at = place + tl.load(chosen(offsets, lookup) + sample, mask=valid, other=0)
    length = chosen(LENGTHS, lookup)
    # Whatever the offsets say: nothing is read outside the values, and no cell is another lookup's.
    is_id = valid & (at >= 0) & (at < chosen(sizes, lookup)) & ((length == 0) | (place < length))
    id = tl.load(chosen(values, lookup) + at, mask=is_id, other=0)
    cell = sample * FIRST_CELLS[num_lookups] + chosen(FIRST_CELLS, lookup) + tl.where(length > 0, place, 0)
    weighted = is_id & (chosen(HAS_WEIGHT, lookup) != 0)
    weight = tl.load(chosen(weights, lookup) + at, mask=weighted, other=0.0)
    tl.store(id_P + k, id, mask=k < num_positions)
    tl.store(cell_P + k, tl.where(is_id, cell, -1), mask=k < num_positions)
    tl.store(weight_P + k, tl.where(is_id & ~weighted, 1.0, weight), mask=k < num_positions)


@triton.jit
def sum_lists(sums, values, offsets, num_lists, num_values, BLOCK: tl.constexpr):
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = list_bounds(offsets, nth, num_lists, num_values)
    total = tl.zeros([BLOCK], tl.float64)
    for j in range(tl.max(end - begin, axis=0)):
        total += tl.load(values + begin + j, mask=begin + j < end, other=0.0).to(tl.float64)
    tl.store(sums + nth, total.to(tl.float32), mask=nth < num_lists)


def order_whole(
    values: Sequence[Tensor], offsets: Sequence[Tensor], weights: Sequence[Tensor | None], weight_P: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, cells, and where each cell's positions end, i32 [cells]."""
    num, num_samples, num_lookups = sum(v.numel() for v in values), offsets[0].numel() - 1, len(values)
    num_cells, lookups = num_samples * num_lookups, columns_of(num_lookups)
    id_P, cell_P, ends = values[0].new_empty(num), offsets[0].new_empty(num), offsets[0].new_empty(num_cells)
    cells = FEW_CELLS if num_cells < MANY else CELLS
    samples, sources = max(1, cells // lookups), values[0].new_empty(num_cells)
    weight_sources, weights_of = sources, [id_P]  # not looked at without weights
    if weight_P is not None:
        weight_sources, weights_of = torch.empty_like(sources), [weight_P if w is None else w for w in weights]
    order_cells[(max(1, triton.cdiv(num_samples, samples)),)](
        id_P, cell_P, id_P if weight_P is None else weight_P, ends, sources, weight_sources, tuple(offsets),
        tuple(values), tuple(weights_of), tuple(v.numel() for v in values), num, num_samples,
        search_steps(samples * num_lookups), LOOKUPS=lookups, SAMPLES=samples, WEIGHTED=weight_P is not None,
        HAS_WEIGHT=tuple(int(w is not None) for w in weights), BLOCK=cells,
    )  # fmt: skip
    return id_P, cell_P, ends


def order_cut(
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    lengths: Sequence[int],
    weight_P: Tensor,
) -> tuple[Tensor, Tensor]:
    """Ids and cells where a lookup's length is not 0."""
    num, num_lists = sum(v.numel() for v in values), (offsets[0].numel() - 1) * len(values)
    id_P, cell_P, sums_L = values[0].new_empty(num), offsets[0].new_empty(num), offsets[0].new_empty(num_lists)
    if num == 0:
        return id_P, cell_P
    grid = (triton.cdiv(num_lists, BLOCK),)
    sums = sums_of(values[0], *grid)
    if num_lists:
        counters = offsets[0].new_full((num_counters(*grid),), -1)
        count_ids[grid](
            sums_L, sums, counters, tuple(offsets), num_lists, LENGTHS=tuple(lengths), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    first_cells = [sum(max(n, 1) for n in lengths[:l]) for l in range(len(lengths) + 1)]
    order_positions[(triton.cdiv(num, BLOCK),)](
        id_P, cell_P, weight_P, (sums_L, sums, *grid), tuple(offsets), tuple(values),
        tuple(weight_P if w is None else w for w in weights), tuple(v.numel() for v in values),
        num, num_lists, search_steps(num_lists), LENGTHS=tuple(lengths), FIRST_CELLS=tuple(first_cells),
        HAS_WEIGHT=tuple(int(w is not None) for w in weights), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return id_P, cell_P


def order_ids_ends(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`recfx.kernels.lists.order_ids.ends_definition`."""
    return order_whole(values, offsets, [None] * len(values), None)


def order_ids(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`recfx.kernels.lists.order_ids.definition`."""
    return order_ids_ends(values, offsets)[:2]


def order_lists(
    values: Sequence[Tensor], offsets: Sequence[Tensor], weights: Sequence[Tensor | None], lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`recfx.kernels.lists.order_lists.definition`."""
    weight_P = values[0].new_empty(sum(v.numel() for v in values), dtype=torch.float32)
    if any(lengths):
        return *order_cut(values, offsets, weights, lengths, weight_P), weight_P
    return *order_whole(values, offsets, weights, weight_P)[:2], weight_P


def list_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """`recfx.kernels.lists.order_lists.list_sums_definition`."""
    num = offsets.numel() - 1
    sums = values.new_empty(num)
    if num:
        sum_lists[(triton.cdiv(num, BLOCK),)](
            sums, values, offsets, num, values.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return sums
