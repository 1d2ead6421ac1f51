"""pool and pool_lists on a GPU: one launch for all slices of the columns, each output written once.

`pool_lists` is given where each list ends. `pool` marks the first and the last place of each cell, for lists that
are cut or weighted.

Where ids without a row have their initial value, a second kernel adds it: it takes many registers to compute, and more
programs can gather rows at once without. That kernel ends at once where all ids have a row, a thousand cells at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, TILE, rows_of, slices
from recfx.kernels.rows.gpu.initial import initial_values

__all__ = ["pool", "pool_lists"]


@triton.jit
def mark_cells(marks, cell_P, num_positions, num_cells, BLOCK: tl.constexpr):
    """marks[0, cell] = num_positions - its first place, marks[1, cell] = its last place + 1, both 0 at first.

    Only a position next to another cell or to padding may be the first or the last.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(cell_P + k, mask=k < num_positions, other=-1)
    valid = (cell >= 0) & (cell < num_cells)
    before = tl.load(cell_P + k - 1, mask=(k > 0) & (k < num_positions), other=-1)
    after = tl.load(cell_P + k + 1, mask=k + 1 < num_positions, other=-1)
    tl.atomic_max(marks + cell, num_positions - k, mask=valid & (before != cell), sem="relaxed")
    tl.atomic_max(marks + num_cells + cell, k + 1, mask=valid & (after != cell), sem="relaxed")


@triton.jit
def places_of(marks, cell, num_positions, num_cells, ENDED: tl.constexpr):
    """begin and end of the places of each cell, padding between them included; begin >= end where it has none. `marks`
    are those of `mark_cells`, or where lists end; whatever they say, places are within num_positions."""
    if ENDED:
        begin = tl.load(marks + cell - 1, mask=(cell > 0) & (cell < num_cells), other=0)
        end = tl.load(marks + cell, mask=cell < num_cells, other=0)
        return tl.maximum(begin, 0), tl.minimum(end, num_positions)
    begin = num_positions - tl.load(marks + cell, mask=cell < num_cells, other=0)
    return begin, tl.load(marks + num_cells + cell, mask=cell < num_cells, other=0)


@triton.jit
def pool_slice(
    block, rows, row_P, weight_P, stride, cell, begin, end, num_cells, WEIGHTED: tl.constexpr, FIRST: tl.constexpr,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    within = column < DIM
    total = tl.zeros([CELLS, COLUMNS], tl.float32)
    for j in range(tl.max(end - begin, axis=0)):
        has = begin + j < end
        row = tl.load(row_P + begin + j, mask=has, other=-1)
        at = rows + row.to(tl.int64) * stride + FIRST
        value = tl.load(at[:, None] + column, mask=(row >= 0)[:, None] & within, other=0.0)
        if WEIGHTED:
            value *= tl.load(weight_P + begin + j, mask=has, other=0.0)[:, None]
        total += value
    at = cell.to(tl.int64)[:, None] * DIM + column
    tl.store(block + at, total, mask=(cell < num_cells)[:, None] & within)


@triton.jit
def pool_cells(
    blocks, rows, row_P, weight_P, marks, stride, num_positions, num_cells, WEIGHTED: tl.constexpr,
    ENDED: tl.constexpr, FIRSTS: tl.constexpr, DIMS: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    begin, end = places_of(marks, cell, num_positions, num_cells, ENDED)
    for s in tl.static_range(len(FIRSTS)):
        pool_slice(
            blocks[s], rows, row_P, weight_P, stride, cell, begin, end, num_cells, WEIGHTED, FIRSTS[s], DIMS[s],
            COLUMNS[s], CELLS,
        )  # fmt: skip


@triton.jit
def add_unknown_slice(
    block, row_P, id_P, cell_P, weight_P, init_keys, unknown_params, width, cell, vocabulary, begin, end,
    WEIGHTED: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([CELLS, COLUMNS], tl.float32)
    for j in range(tl.max(end - begin, axis=0)):
        has = begin + j < end
        unknown = has & (tl.load(row_P + begin + j, mask=has, other=0) < 0)
        unknown &= tl.load(cell_P + begin + j, mask=unknown, other=-1) >= 0
        id = tl.load(id_P + begin + j, mask=unknown, other=0)[:, None]
        new = unknown[:, None] & (column < DIM)
        value = initial_values(init_keys, unknown_params, width, vocabulary[:, None], id, FIRST + column, new)
        if WEIGHTED:
            value *= tl.load(weight_P + begin + j, mask=unknown, other=0.0)[:, None]
        total += tl.where(new, value, 0.0)
    at = block + cell.to(tl.int64)[:, None] * DIM + column
    within = (begin < end)[:, None] & (column < DIM)
    total += tl.load(at, mask=within, other=0.0)
    tl.debug_barrier()  # of a narrow tile several threads have a copy, and one of them writes
    tl.store(at, total, mask=within)


@triton.jit
def has_unknown(row_P, begin, end):
    lowest = begin * 0
    for j in range(tl.max(end - begin, axis=0)):
        lowest = tl.minimum(lowest, tl.load(row_P + begin + j, mask=begin + j < end, other=0))
    return tl.min(lowest, axis=0) < 0


@triton.jit
def add_unknown(
    blocks, row_P, id_P, cell_P, vocabularies, init_keys, unknown_params, weight_P, marks, width, num_lookups,
    num_positions, num_cells, WEIGHTED: tl.constexpr, ENDED: tl.constexpr, FIRSTS: tl.constexpr, DIMS: tl.constexpr,
    COLUMNS: tl.constexpr, CELLS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    of_span = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    span_begin, span_end = places_of(marks, of_span, num_positions, num_cells, ENDED)
    if has_unknown(row_P, span_begin, span_end):
        for first in range(0, SPAN, CELLS):
            cell = tl.program_id(0) * SPAN + first + tl.arange(0, CELLS)
            begin, end = places_of(marks, cell, num_positions, num_cells, ENDED)
            if has_unknown(row_P, begin, end):
                vocabulary = tl.load(vocabularies + cell % num_lookups)
                for s in tl.static_range(len(FIRSTS)):
                    add_unknown_slice(
                        blocks[s], row_P, id_P, cell_P, weight_P, init_keys, unknown_params, width, cell, vocabulary,
                        begin, end, WEIGHTED, FIRSTS[s], DIMS[s], COLUMNS[s], CELLS,
                    )  # fmt: skip


def pool_cells_of(
    rows: Tensor, row_P: Tensor, id_P: Tensor, cell_P: Tensor, ends: Tensor | None, vocabularies: Tensor,
    batch_size: int, init_keys: Tensor, unknown_params: Tensor | None, firsts: Sequence[int], dims: Sequence[int],
    weight_P: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Known rows of a list are added in order, and then the initial values."""
    num, num_lookups = cell_P.numel(), len(vocabularies)
    blocks = [rows.new_empty(batch_size, num_lookups, dim) for dim in dims]
    num_cells, cells = batch_size * num_lookups, rows_of(max(dims))
    if num_cells == 0:
        return blocks
    marks, weight = ends, rows if weight_P is None else weight_P
    static = {"WEIGHTED": weight_P is not None, "ENDED": ends is not None, **slices(firsts, dims), "CELLS": cells}
    if marks is None:
        marks = cell_P.new_zeros(2, num_cells)
        mark_cells[(max(1, triton.cdiv(num, BLOCK)),)](marks, cell_P, num, num_cells, BLOCK=BLOCK, num_warps=NUM_WARPS)
    pool_cells[(triton.cdiv(num_cells, cells),)](
        tuple(blocks), rows, row_P, weight, marks, rows.stride(0), num, num_cells, **static
    )
    if unknown_params is not None:
        add_unknown[(triton.cdiv(num_cells, TILE),)](
            tuple(blocks), row_P, id_P, cell_P, vocabularies, init_keys, unknown_params, weight, marks,
            rows.shape[2], num_lookups, num, num_cells, SPAN=TILE, **static, num_warps=8,
        )  # fmt: skip
    return blocks


def pool(
    rows: Tensor, row_P: Tensor, id_P: Tensor, cell_P: Tensor, vocabularies: Tensor, batch_size: int, init_keys: Tensor,
    unknown_params: Tensor | None, firsts: Sequence[int], dims: Sequence[int], weight_P: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`recfx.kernels.rows.pool.definition`."""
    initial = init_keys, unknown_params
    return pool_cells_of(rows, row_P, id_P, cell_P, None, vocabularies, batch_size, *initial, firsts, dims, weight_P)


def pool_lists(
    rows: Tensor, row_P: Tensor, id_P: Tensor, cell_P: Tensor, ends: Tensor, vocabularies: Tensor, batch_size: int,
    init_keys: Tensor, unknown_params: Tensor | None, firsts: Sequence[int], dims: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """`recfx.kernels.rows.pool.lists_definition`."""
    initial = init_keys, unknown_params
    return pool_cells_of(rows, row_P, id_P, cell_P, ends, vocabularies, batch_size, *initial, firsts, dims, None)
