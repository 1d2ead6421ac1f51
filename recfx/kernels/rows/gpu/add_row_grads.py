"""add_row_grads_ on a GPU: positions in the order of their unique numbers, then a program per few unique rows.

A row with up to CHUNK occurrences has them added one by one, in order, as a CPU does. Of a row with more, all but the
last few are summed beforehand by separate programs, a chunk at a time, in a fixed tree; the chunks are added in
order, then the rest. Chunks begin where the row begins: a sum depends on the row's own occurrences, and on no race.

The atomic form needs no order; its sums differ from run to run in the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.counters import NUM_UNIQUE, STEP
from recfx.kernels.gpu.launch import at_once, programs, rows_of, slices
from recfx.kernels.gpu.occurrences import in_order
from recfx.kernels.gpu.runs import run_of

__all__ = ["add_row_grads_", "add_row_grads_atomic_", "chunk_sums", "sum_of_rows"]

CHUNK = 32
SUM_CHUNKS, ADD_ROWS = (7, 5, 3), (9, 6, 3)  # `launch.at_once`


@triton.jit
def gradients(
    block, cell_N, weight_N, nth, has, column, DIM: tl.constexpr, LOOKUPS: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Weighted gradients f32 [nth, column] of the sorted occurrences `nth`; zeros where not `has`. block: as of
    `places_of`.

    The mask is taken from the cells: Triton 3.6.0 cannot compile one that it would have to compute in two layouts.
    """
    cell = tl.load(cell_N + nth, mask=has, other=-1)
    if LOOKUPS == 0:
        at = cell.to(tl.int64) * DIM
    else:
        at = (cell // LOOKUPS).to(tl.int64) * block[1] + (cell % LOOKUPS).to(tl.int64) * block[2]
    value = tl.load(block[0] + at[:, None] + column, mask=(cell >= 0)[:, None] & (column < DIM), other=0.0)
    if WEIGHTED:
        value *= tl.load(weight_N + nth, mask=has, other=0.0)[:, None]
    return value


@triton.jit
def sum_chunk(
    partial, block, cell_N, weight_N, begin, WEIGHTED: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr,
    LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    nth = begin + tl.arange(0, CHUNK)
    value = gradients(block, cell_N, weight_N, nth, nth >= 0, column, DIM, LOOKUPS, WEIGHTED)
    tl.store(partial + FIRST + column, tl.sum(value, axis=0)[None, :], mask=column < DIM)


@triton.jit
def take_count(count, counters):
    """Moves the number of unique rows to `count`, before a launch whose programs all read it, and ends the step."""
    if tl.program_id(0) == 0:
        num = tl.load(counters + NUM_UNIQUE)
        tl.debug_barrier()  # every thread reads it, one clears it
        tl.store(count, num.to(tl.int32))
        tl.store(counters + NUM_UNIQUE, num * 0)
        tl.atomic_add(counters + STEP, num * 0 + 1)


@triton.jit
def sum_chunks(
    partial, number_N, cell_N, weight_N, begins, last_number, blocks, width, count, counters,
    WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr, DIMS: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, TAKES: tl.constexpr,
):  # fmt: skip
    """partial[c] of the chunk that begins in the c-th CHUNK of places, if one does: there is at most one."""
    if TAKES:
        take_count(count, counters)
    highest = tl.load(last_number)
    num = tl.load(begins + highest + 1, mask=highest >= 0, other=0)
    for c in range(tl.program_id(0), num // CHUNK, tl.num_programs(0)):
        last = c * CHUNK + CHUNK - 1
        number = tl.load(number_N + last)
        if number >= 0:
            row_begin = tl.load(begins + number)
            begin = row_begin + (last - row_begin) // CHUNK * CHUNK
            if begin + CHUNK < tl.load(begins + number + 1):  # the row goes on after the chunk
                for s in tl.static_range(len(FIRSTS)):
                    sum_chunk(
                        partial + (begin // CHUNK).to(tl.int64) * width, blocks[s], cell_N, weight_N, begin, WEIGHTED,
                        FIRSTS[s], DIMS[s], LOOKUPS[s], COLUMNS[s], CHUNK,
                    )  # fmt: skip


@triton.jit
def sum_of_rows(
    total, partial, block, cell_N, weight_N, width, begin, end, WEIGHTED: tl.constexpr, FIRST: tl.constexpr,
    DIM: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
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
        a = gradients(block, cell_N, weight_N, k, k < end, column, DIM, LOOKUPS, WEIGHTED)
        b = gradients(block, cell_N, weight_N, k + 1, k + 1 < end, column, DIM, LOOKUPS, WEIGHTED)
        c = gradients(block, cell_N, weight_N, k + 2, k + 2 < end, column, DIM, LOOKUPS, WEIGHTED)
        d = gradients(block, cell_N, weight_N, k + 3, k + 3 < end, column, DIM, LOOKUPS, WEIGHTED)
        total = total + a + b + c + d
    return total


@triton.jit
def add_slice(
    grads, stride, partial, block, cell_N, weight_N, width, unique, begin, end, WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr, DIM: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    at = grads + unique.to(tl.int64)[:, None] * stride + FIRST + column
    touched = (begin < end)[:, None] & (column < DIM)
    total = tl.load(at, mask=touched, other=0.0)
    total = sum_of_rows(
        total, partial, block, cell_N, weight_N, width, begin, end, WEIGHTED, FIRST, DIM, LOOKUPS, COLUMNS, CHUNK
    )
    tl.store(at, total, mask=touched)


@triton.jit
def add_rows(
    grads, stride, partial, cell_N, weight_N, begins, last_number, blocks, width, WEIGHTED: tl.constexpr,
    FIRSTS: tl.constexpr, DIMS: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    num_unique = tl.load(last_number) + 1
    for first in range(tl.program_id(0) * ROWS, num_unique, tl.num_programs(0) * ROWS):
        unique = first + tl.arange(0, ROWS)
        begin, end = run_of(begins, last_number, unique)
        for s in tl.static_range(len(FIRSTS)):
            add_slice(
                grads, stride, partial, blocks[s], cell_N, weight_N, width, unique, begin, end, WEIGHTED, FIRSTS[s],
                DIMS[s], LOOKUPS[s], COLUMNS[s], CHUNK,
            )  # fmt: skip


@triton.jit
def add_slice_atomically(
    grads, stride, block, cell_P, weight_P, unique, k, WEIGHTED: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr,
    LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    value = gradients(block, cell_P, weight_P, k, unique >= 0, column, DIM, LOOKUPS, WEIGHTED)
    at = grads + unique.to(tl.int64)[:, None] * stride + FIRST + column
    tl.atomic_add(at, value, mask=(unique >= 0)[:, None] & (column < DIM), sem="relaxed")


@triton.jit
def add_atomically(
    grads, stride, inverse_P, cell_P, weight_P, blocks, num, WEIGHTED: tl.constexpr, FIRSTS: tl.constexpr,
    DIMS: tl.constexpr, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = tl.load(cell_P + k, mask=k < num, other=-1) >= 0
    unique = tl.load(inverse_P + k, mask=valid, other=-1)
    for s in tl.static_range(len(FIRSTS)):
        add_slice_atomically(
            grads, stride, blocks[s], cell_P, weight_P, unique, k, WEIGHTED, FIRSTS[s], DIMS[s], LOOKUPS[s], COLUMNS[s]
        )


def places_of(blocks: Sequence[Tensor]) -> tuple[tuple[tuple[Tensor, int, int], ...], tuple[int, ...]]:
    """Of each block f32 [B, F, dim]: itself and its strides of samples and lookups; and F, or 0 of a contiguous one.

    The gradient of a sum over lookups is the same for all of them: autograd expands it, and it is not copied here.
    """
    read = [b if b.stride(2) == 1 or b.shape[2] == 1 else b.contiguous() for b in blocks]
    places = tuple((b, b.stride(0), b.stride(1)) for b in read)
    return places, tuple(0 if b.is_contiguous() else b.shape[1] for b in read)


def chunk_sums(
    inverse_P: Tensor, cell_P: Tensor, firsts: Sequence[int], dims: Sequence[int], blocks: Sequence[Tensor],
    weight_P: Tensor | None, width: int, most: int, counters: Tensor | None = None,
) -> tuple[tuple, dict, Tensor]:  # fmt: skip
    """What `sum_of_rows` and `run_of` read, chunks of frequent rows summed beforehand: arguments from `partial` to
    `width`, and static ones; of unique numbers less than `most`. And i32 [1], what NUM_UNIQUE was: it is then 0, and
    STEP is one more."""
    num, (places, lookups) = cell_P.numel(), places_of(blocks)
    number_N, *occurrences = in_order(inverse_P, cell_P, weight_P, most)
    partial, count = blocks[0].new_empty(num // CHUNK + 1, width), number_N.new_empty(1)
    static = {"WEIGHTED": weight_P is not None, **slices(firsts, dims), "LOOKUPS": lookups, "CHUNK": CHUNK}
    sum_chunks[programs(num, CHUNK, at_once(width, SUM_CHUNKS, len(dims)))](
        partial, number_N, *occurrences, places, width, count, count if counters is None else counters,
        TAKES=counters is not None, **static,
    )  # fmt: skip
    return (partial, *occurrences, places, width), static, count


def add_row_grads_(
    grads: Tensor, inverse_P: Tensor, cell_P: Tensor, firsts: Sequence[int], dims: Sequence[int],
    blocks: Sequence[Tensor], weight_P: Tensor | None = None,
) -> None:  # fmt: skip
    """`recfx.kernels.rows.add_row_grads.definition`; the same bytes from run to run."""
    num, rows = cell_P.numel(), rows_of(max(dims))
    if num:
        sources, static, _ = chunk_sums(inverse_P, cell_P, firsts, dims, blocks, weight_P, grads.shape[1], len(grads))
        grid = programs(num, rows, at_once(sum(dims), ADD_ROWS, len(dims)))
        add_rows[grid](grads, grads.stride(0), *sources, ROWS=rows, **static)


def add_row_grads_atomic_(
    grads: Tensor, inverse_P: Tensor, cell_P: Tensor, firsts: Sequence[int], dims: Sequence[int],
    blocks: Sequence[Tensor], weight_P: Tensor | None = None,
) -> None:  # fmt: skip
    """`recfx.kernels.rows.add_row_grads.definition`, the sums in whatever order the adders come."""
    num, rows, (places, lookups) = cell_P.numel(), rows_of(max(dims)), places_of(blocks)
    if num:
        add_atomically[(triton.cdiv(num, rows),)](
            grads, grads.stride(0), inverse_P, cell_P, cell_P if weight_P is None else weight_P,
            places, num, WEIGHTED=weight_P is not None, **slices(firsts, dims), LOOKUPS=lookups, ROWS=rows,
        )  # fmt: skip
