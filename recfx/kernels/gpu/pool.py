"""pool on a GPU: one launch for all slices of the columns, each output written once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels import op
from recfx.kernels.gpu.initial import initial_values
from recfx.kernels.gpu.launch import columns_of, lower_bound, rows_of, search_steps

__all__ = ["pool"]

REFUSED = tl.constexpr(op.REFUSED)


@triton.jit
def pool_slice(
    block, rows, row_P, id_P, weight_P, init_keys, init_params, stride, width, cell, vocabulary, begin, end, num_cells,
    WEIGHTED: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    within = column < DIM
    total = tl.zeros([CELLS, COLUMNS], tl.float32)
    for j in range(tl.max(end - begin, axis=0)):
        has = begin + j < end
        row = tl.load(row_P + begin + j, mask=has, other=-1)
        at = rows + row.to(tl.int64) * stride + FIRST
        value = tl.load(at[:, None] + column, mask=(row >= 0)[:, None] & within, other=0.0)
        refused = row == REFUSED
        if tl.max(refused.to(tl.int32), axis=0) > 0:
            id = tl.load(id_P + begin + j, mask=refused, other=0)[:, None]
            new = refused[:, None] & within
            initial = initial_values(init_keys, init_params, width, vocabulary[:, None], id, FIRST + column, new)
            value = tl.where(new, initial, value)
        if WEIGHTED:
            value *= tl.load(weight_P + begin + j, mask=has, other=0.0)[:, None]
        total += value
    at = cell.to(tl.int64)[:, None] * DIM + column
    tl.store(block + at, total, mask=(cell < num_cells)[:, None] & within)


@triton.jit
def pool_cells(
    blocks, rows, row_P, id_P, cell_P, vocabularies, init_keys, init_params, weight_P, stride, width, num_positions,
    steps, num_cells, num_lookups, WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr, DIMS: tl.constexpr,
    COLUMNS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    # Padding, -1, stands behind all cells as an unsigned number.
    cells = cell_P.to(tl.pointer_type(tl.uint32))
    begin = lower_bound(cells, num_positions, steps, cell.to(tl.uint32)).to(tl.int32)
    end = lower_bound(cells, num_positions, steps, (cell + 1).to(tl.uint32)).to(tl.int32)
    vocabulary = tl.load(vocabularies + cell % num_lookups)
    for s in tl.static_range(len(FIRSTS)):
        pool_slice(
            blocks[s], rows, row_P, id_P, weight_P, init_keys, init_params, stride, width, cell, vocabulary, begin, end,
            num_cells, WEIGHTED, FIRSTS[s], DIMS[s], COLUMNS[s], CELLS,
        )  # fmt: skip


def pool(
    rows: Tensor, row_P: Tensor, id_P: Tensor, cell_P: Tensor, vocabularies: Tensor, batch_size: int, init_keys: Tensor,
    init_params: Tensor, firsts: Sequence[int], dims: Sequence[int], weight_P: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`recfx.kernels.pool.definition`; the rows of a list are added in order."""
    num_lookups, num = len(vocabularies), cell_P.numel()
    blocks = [rows.new_empty(batch_size, num_lookups, dim) for dim in dims]
    num_cells, cells = batch_size * num_lookups, rows_of(max(dims))
    if num_cells:
        pool_cells[(triton.cdiv(num_cells, cells),)](
            tuple(blocks), rows, row_P, id_P, cell_P, vocabularies, init_keys, init_params,
            rows if weight_P is None else weight_P, rows.stride(0), rows.shape[2], num, search_steps(num), num_cells,
            num_lookups, WEIGHTED=weight_P is not None, FIRSTS=tuple(firsts), DIMS=tuple(dims),
            COLUMNS=tuple(map(columns_of, dims)), CELLS=cells,
        )  # fmt: skip
    return blocks
