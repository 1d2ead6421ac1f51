"""pool on a GPU: one launch for all slices of the columns, each output written once; another adds what was refused.

The initial value of a refused id takes many registers to compute. It has a kernel of its own, which ends at once where
no id was refused, a thousand cells at a time, so that more programs can gather rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels import op
from recfx.kernels.gpu.initial import initial_values
from recfx.kernels.gpu.launch import TILE, rows_of, slices
from recfx.kernels.gpu.runs import run_of, runs_of

__all__ = ["pool"]

REFUSED = tl.constexpr(op.REFUSED)


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
    blocks, rows, row_P, weight_P, begins, last_cell, stride, num_cells, WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr,
    DIMS: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    begin, end = run_of(begins, last_cell, cell)
    for s in tl.static_range(len(FIRSTS)):
        pool_slice(
            blocks[s], rows, row_P, weight_P, stride, cell, begin, end, num_cells, WEIGHTED, FIRSTS[s], DIMS[s],
            COLUMNS[s], CELLS,
        )  # fmt: skip


@triton.jit
def add_refused_slice(
    block, row_P, id_P, weight_P, init_keys, init_params, width, cell, vocabulary, begin, end, WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([CELLS, COLUMNS], tl.float32)
    for j in range(tl.max(end - begin, axis=0)):
        refused = tl.load(row_P + begin + j, mask=begin + j < end, other=-1) == REFUSED
        id = tl.load(id_P + begin + j, mask=refused, other=0)[:, None]
        new = refused[:, None] & (column < DIM)
        value = initial_values(init_keys, init_params, width, vocabulary[:, None], id, FIRST + column, new)
        if WEIGHTED:
            value *= tl.load(weight_P + begin + j, mask=refused, other=0.0)[:, None]
        total += tl.where(new, value, 0.0)
    at = block + cell.to(tl.int64)[:, None] * DIM + column
    within = (begin < end)[:, None] & (column < DIM)
    tl.store(at, tl.load(at, mask=within, other=0.0) + total, mask=within)


@triton.jit
def has_refused(row_P, begin, end):
    lowest = begin * 0
    for j in range(tl.max(end - begin, axis=0)):
        lowest = tl.minimum(lowest, tl.load(row_P + begin + j, mask=begin + j < end, other=0))
    return tl.min(lowest, axis=0) == REFUSED


@triton.jit
def add_refused(
    blocks, row_P, id_P, vocabularies, init_keys, init_params, weight_P, begins, last_cell, width, num_lookups,
    WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr, DIMS: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    span_begin, span_end = run_of(begins, last_cell, tl.program_id(0) * SPAN + tl.arange(0, SPAN))
    if has_refused(row_P, span_begin, span_end):
        for first in range(0, SPAN, CELLS):
            cell = tl.program_id(0) * SPAN + first + tl.arange(0, CELLS)
            begin, end = run_of(begins, last_cell, cell)
            if has_refused(row_P, begin, end):
                vocabulary = tl.load(vocabularies + cell % num_lookups)
                for s in tl.static_range(len(FIRSTS)):
                    add_refused_slice(
                        blocks[s], row_P, id_P, weight_P, init_keys, init_params, width, cell, vocabulary, begin, end,
                        WEIGHTED, FIRSTS[s], DIMS[s], COLUMNS[s], CELLS,
                    )  # fmt: skip


def pool(
    rows: Tensor, row_P: Tensor, id_P: Tensor, cell_P: Tensor, vocabularies: Tensor, batch_size: int, init_keys: Tensor,
    init_params: Tensor, firsts: Sequence[int], dims: Sequence[int], weight_P: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`recfx.kernels.pool.definition`; known rows of a list are added in order, and then what was refused."""
    num_lookups = len(vocabularies)
    blocks = [rows.new_empty(batch_size, num_lookups, dim) for dim in dims]
    num_cells, cells = batch_size * num_lookups, rows_of(max(dims))
    if num_cells:
        runs, weight = runs_of(cell_P, num_cells), rows if weight_P is None else weight_P
        static = {"WEIGHTED": weight_P is not None, **slices(firsts, dims), "CELLS": cells}
        pool_cells[(triton.cdiv(num_cells, cells),)](
            tuple(blocks), rows, row_P, weight, *runs, rows.stride(0), num_cells, **static
        )
        add_refused[(triton.cdiv(num_cells, TILE),)](
            tuple(blocks), row_P, id_P, vocabularies, init_keys, init_params, weight, *runs, rows.shape[2], num_lookups,
            SPAN=TILE, **static,
        )  # fmt: skip
    return blocks
