"""add_row_grads_ on a GPU: positions sorted by unique number, stably, then a program per few unique rows.

A row with up to CHUNK occurrences has them added one by one, in order, as a CPU does. Of a row with more, all but the
last few are summed beforehand by programs of their own, a chunk at a time, in a fixed tree; the chunks are added in
order, then the rest. Chunks begin where the row begins: a sum depends on the row's own occurrences, and on no race.

The atomic form needs no sort; its sums differ from run to run in the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import lower_bound, programs, rows_of, search_steps, slices

__all__ = ["add_row_grads_", "add_row_grads_atomic_", "chunk_sums", "sum_of_rows"]

CHUNK = 32


@triton.jit
def gradients(block, cell_N, weight_N, nth, has, column, DIM: tl.constexpr, WEIGHTED: tl.constexpr):
    """Weighted gradients f32 [nth, column] of the sorted occurrences `nth`; zeros where not `has`."""
    cell = tl.load(cell_N + nth, mask=has, other=0).to(tl.int64)
    value = tl.load(block + cell[:, None] * DIM + column, mask=has[:, None] & (column < DIM), other=0.0)
    if WEIGHTED:
        value *= tl.load(weight_N + nth, mask=has, other=0.0)[:, None]
    return value


@triton.jit
def sum_chunk(
    partial, block, cell_N, weight_N, begin, WEIGHTED: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    nth = begin + tl.arange(0, CHUNK)
    value = gradients(block, cell_N, weight_N, nth, nth >= 0, column, DIM, WEIGHTED)
    tl.store(partial + FIRST + column, tl.sum(value, axis=0)[None, :], mask=column < DIM)


@triton.jit
def sum_chunks(
    partial, number_N, cell_N, weight_N, blocks, num, steps, width, WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr,
    DIMS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial[c] of the chunk that begins in the c-th CHUNK of sorted places, if one does: there is at most one."""
    for c in range(tl.program_id(0), num // CHUNK, tl.num_programs(0)):
        last = c * CHUNK + CHUNK - 1
        number = tl.load(number_N + last)
        # A row that has a whole chunk here, and then some, goes on for half a chunk at one side at least.
        half: tl.constexpr = CHUNK // 2
        left = tl.load(number_N + last - half)
        right = tl.load(number_N + last + half, mask=last + half < num, other=-1)
        if (number >= 0) & ((left == number) | (right == number)):
            row_begin = tl.sum(lower_bound(number_N, num, steps, tl.zeros([1], tl.int32) + number), axis=0)
            begin = row_begin + (last - row_begin) // CHUNK * CHUNK
            behind = begin + CHUNK
            if tl.load(number_N + behind, mask=behind < num, other=-1) == number:
                for s in tl.static_range(len(FIRSTS)):
                    sum_chunk(
                        partial + (begin // CHUNK).to(tl.int64) * width, blocks[s], cell_N, weight_N, begin, WEIGHTED,
                        FIRSTS[s], DIMS[s], COLUMNS[s], CHUNK,
                    )  # fmt: skip


@triton.jit
def sum_of_rows(
    total, partial, block, cell_N, weight_N, width, begin, end, WEIGHTED: tl.constexpr, FIRST: tl.constexpr,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`total` and, added to it in order, the gradients of each row's sorted occurrences begin .. end."""
    column = tl.arange(0, COLUMNS)[None, :]
    num_chunks = tl.maximum(end - begin - 1, 0) // CHUNK
    for j in range(tl.max(num_chunks, axis=0)):
        at = partial + (begin // CHUNK + j).to(tl.int64)[:, None] * width + FIRST + column
        total += tl.load(at, mask=(j < num_chunks)[:, None] & (column < DIM), other=0.0)
    begin += num_chunks * CHUNK
    for j in range(0, tl.max(end - begin, axis=0), 4):  # four at a time: their gradients are on their way together
        k = begin + j
        a = gradients(block, cell_N, weight_N, k, k < end, column, DIM, WEIGHTED)
        b = gradients(block, cell_N, weight_N, k + 1, k + 1 < end, column, DIM, WEIGHTED)
        c = gradients(block, cell_N, weight_N, k + 2, k + 2 < end, column, DIM, WEIGHTED)
        d = gradients(block, cell_N, weight_N, k + 3, k + 3 < end, column, DIM, WEIGHTED)
        total = total + a + b + c + d
    return total


@triton.jit
def add_slice(
    grads, stride, partial, block, cell_N, weight_N, width, unique, begin, end, WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    at = grads + unique.to(tl.int64)[:, None] * stride + FIRST + column
    touched = (begin < end)[:, None] & (column < DIM)
    total = tl.load(at, mask=touched, other=0.0)
    total = sum_of_rows(
        total, partial, block, cell_N, weight_N, width, begin, end, WEIGHTED, FIRST, DIM, COLUMNS, CHUNK
    )
    tl.store(at, total, mask=touched)


@triton.jit
def add_rows(
    grads, stride, partial, number_N, cell_N, weight_N, blocks, num, steps, width, WEIGHTED: tl.constexpr,
    FIRSTS: tl.constexpr, DIMS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    num_unique = tl.load(number_N + num - 1) + 1
    for first in range(tl.program_id(0) * ROWS, num_unique, tl.num_programs(0) * ROWS):
        unique = first + tl.arange(0, ROWS)
        begin = lower_bound(number_N, num, steps, unique)
        end = lower_bound(number_N, num, steps, unique + 1)
        for s in tl.static_range(len(FIRSTS)):
            add_slice(
                grads, stride, partial, blocks[s], cell_N, weight_N, width, unique, begin, end, WEIGHTED, FIRSTS[s],
                DIMS[s], COLUMNS[s], CHUNK,
            )  # fmt: skip


@triton.jit
def add_slice_atomically(
    grads, stride, block, cell_P, weight_P, unique, k, WEIGHTED: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    value = gradients(block, cell_P, weight_P, k, unique >= 0, column, DIM, WEIGHTED)
    at = grads + unique.to(tl.int64)[:, None] * stride + FIRST + column
    tl.atomic_add(at, value, mask=(unique >= 0)[:, None] & (column < DIM), sem="relaxed")


@triton.jit
def add_atomically(
    grads, stride, inverse_P, cell_P, weight_P, blocks, num, WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr,
    DIMS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = tl.load(cell_P + k, mask=k < num, other=-1) >= 0
    unique = tl.load(inverse_P + k, mask=valid, other=-1)
    for s in tl.static_range(len(FIRSTS)):
        add_slice_atomically(
            grads, stride, blocks[s], cell_P, weight_P, unique, k, WEIGHTED, FIRSTS[s], DIMS[s], COLUMNS[s]
        )


def sorted_occurrences(inverse_P: Tensor, cell_P: Tensor, weight_P: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Number, cell and weight of all positions by unique number, in order within it; -1 where there is no gradient."""
    number_N, order = torch.sort(torch.where(cell_P < 0, -1, inverse_P), stable=True)
    cell_N = cell_P.index_select(0, order)
    return number_N, cell_N, cell_N if weight_P is None else weight_P.index_select(0, order)


def chunk_sums(
    inverse_P: Tensor, cell_P: Tensor, firsts: Sequence[int], dims: Sequence[int], blocks: Sequence[Tensor],
    weight_P: Tensor | None, width: int,
) -> tuple[tuple, dict]:  # fmt: skip
    """What `sum_of_rows` adds up, chunks of frequent rows summed beforehand: arguments from `partial` to `width`."""
    num, dense = cell_P.numel(), tuple(block.contiguous() for block in blocks)
    occurrences = sorted_occurrences(inverse_P, cell_P, weight_P)
    partial = dense[0].new_empty(num // CHUNK + 1, width)
    static = {"WEIGHTED": weight_P is not None, **slices(firsts, dims), "CHUNK": CHUNK}
    sources = partial, *occurrences, dense, num, search_steps(num), width
    sum_chunks[programs(num, CHUNK)](*sources, **static)
    return sources, static


def add_row_grads_(
    grads: Tensor, inverse_P: Tensor, cell_P: Tensor, firsts: Sequence[int], dims: Sequence[int],
    blocks: Sequence[Tensor], weight_P: Tensor | None = None,
) -> None:  # fmt: skip
    """`recfx.kernels.add_row_grads.definition`; the same bytes from run to run."""
    num, rows = cell_P.numel(), rows_of(max(dims))
    if num:
        sources, static = chunk_sums(inverse_P, cell_P, firsts, dims, blocks, weight_P, grads.shape[1])
        add_rows[programs(num, rows)](grads, grads.stride(0), *sources, ROWS=rows, **static)


def add_row_grads_atomic_(
    grads: Tensor, inverse_P: Tensor, cell_P: Tensor, firsts: Sequence[int], dims: Sequence[int],
    blocks: Sequence[Tensor], weight_P: Tensor | None = None,
) -> None:  # fmt: skip
    """`recfx.kernels.add_row_grads.definition`, the sums in whatever order the adders come."""
    num, rows = cell_P.numel(), rows_of(max(dims))
    if num:
        add_atomically[(triton.cdiv(num, rows),)](
            grads, grads.stride(0), inverse_P, cell_P, cell_P if weight_P is None else weight_P,
            tuple(block.contiguous() for block in blocks), num, WEIGHTED=weight_P is not None, **slices(firsts, dims),
            ROWS=rows,
        )  # fmt: skip
