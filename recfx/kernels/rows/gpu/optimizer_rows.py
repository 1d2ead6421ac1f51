"""The row optimisers on a GPU: one walk over a step's unique rows, one formula each.

A formula is called with a tile of rows: addresses of the weights in column 0, scaled gradients, decay and rate. It
reads and writes the weights and, after them, its slots. Weights may be read where `covers`, up to a multiple of 4.

Of a tile of fewer items than threads, several threads hold a copy each, which each reads for itself and one of them
writes. So where a tile may be small a barrier comes before a slot is written from which something is computed later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.counters import NUM_UNIQUE, STEP
from recfx.kernels.gpu.launch import at_once, columns_of, cover_of, programs, rows_of

__all__ = [
    "adagrad_rows_",
    "adamw_rows_",
    "adamw_rows_by_column_",
    "ftrl_rows_",
    "rowwise_adagrad_rows_",
    "sgd_rows_",
]


@triton.jit
def scalar(hyper, nth):
    return tl.load(hyper + nth).to(tl.float32)


@triton.jit
def sgd(at, column, within, covers, g, decay, rate, own, width, DIMS: tl.constexpr):
    w = tl.load(at + column, mask=covers, other=0.0)
    tl.store(at + column, decay * w - rate * g, mask=within)


@triton.jit
def adagrad(at, column, within, covers, g, decay, rate, own, width, DIMS: tl.constexpr):
    w = tl.load(at + column, mask=covers, other=0.0)
    g += decay * w
    sum = tl.load(at + width + column, mask=within, other=0.0) + g * g
    tl.store(at + width + column, sum, mask=within)
    root = tl.sqrt_rn(scalar(own, 0) + sum) + scalar(own, 1)
    tl.store(at + column, w - tl.div_rn(rate * g, root), mask=within)


@triton.jit
def rowwise_adagrad(at, column, within, covers, g, decay, rate, own, width, DIMS: tl.constexpr):
    w = tl.load(at + column, mask=covers, other=0.0)
    g += decay * w
    root = tl.full(g.shape, 1.0, tl.float32)
    has = tl.max(within.to(tl.int32), axis=1)[:, None] > 0
    first = 0
    for t in tl.static_range(len(DIMS)):
        mine = (column >= first) & (column < first + DIMS[t])
        sum = tl.load(at + width + t, mask=has, other=0.0)
        sum += tl.sum(tl.where(within & mine, g * g, 0.0), axis=1)[:, None] / DIMS[t]
        tl.debug_barrier()
        tl.store(at + width + t, sum, mask=has)
        root = tl.where(mine, tl.sqrt_rn(scalar(own, 0) + sum) + scalar(own, 1), root)
        first += DIMS[t]
    tl.store(at + column, w - tl.div_rn(rate * g, root), mask=within)


@triton.jit
def adamw_tile(at, column, within, covers, g, decay, rate, own, eps, width):
    m = scalar(own, 0) * tl.load(at + width + column, mask=within, other=0.0) + scalar(own, 1) * g
    v = scalar(own, 2) * tl.load(at + 2 * width + column, mask=within, other=0.0) + scalar(own, 3) * g * g
    tl.debug_barrier()
    tl.store(at + width + column, m, mask=within)
    tl.store(at + 2 * width + column, v, mask=within)
    w = decay * tl.load(at + column, mask=covers, other=0.0)
    tl.store(at + column, w - tl.div_rn(rate * m, tl.sqrt_rn(v) + eps), mask=within)


@triton.jit
def adamw(at, column, within, covers, g, decay, rate, own, width, DIMS: tl.constexpr):
    """hyper: decay, b1, c1, b2, c2, alpha, eps, scale."""
    adamw_tile(at, column, within, covers, g, decay, rate, own, scalar(own, 5), width)


@triton.jit
def adamw_by_column(at, column, within, covers, g, decay, rate, own, width, DIMS: tl.constexpr):
    """hyper: decay, alpha, scale, b1, c1, b2, c2, eps."""
    adamw_tile(at, column, within, covers, g, decay, rate, own, scalar(own, 4), width)


@triton.jit
def ftrl(at, column, within, covers, g, decay, rate, own, width, DIMS: tl.constexpr):
    w = tl.load(at + column, mask=covers, other=0.0)
    z = tl.load(at + width + column, mask=within, other=0.0)
    n = tl.load(at + 2 * width + column, mask=within, other=0.0)
    beta = scalar(own, 0)
    before = tl.where((z == 0.0) & (n == 0.0), 0.0, beta + tl.sqrt_rn(n))
    n += g * g
    now = beta + tl.sqrt_rn(n)
    z += rate * g - (now - before) * w
    beyond = tl.maximum(tl.abs(z) - rate * scalar(own, 1), 0.0)
    learns = (tl.where(rate > 0.0, now, 0.0) > 0.0) & within
    divisor = tl.where(learns, now + rate * decay, 1.0)
    tl.store(at + column, tl.div_rn(tl.where(z > 0.0, -beyond, beyond), divisor), mask=learns)
    tl.store(at + width + column, z, mask=within)
    tl.store(at + 2 * width + column, n, mask=within)


@triton.jit
def end_step(counters, is_due):
    """Where due, NUM_UNIQUE is 0 and STEP one more, by the last program that comes here. The upper half of NUM_UNIQUE
    counts the programs meanwhile, and is 0 afterwards."""
    tl.debug_barrier()  # every thread has read NUM_UNIQUE
    before = tl.atomic_add(counters + NUM_UNIQUE, 1 << 32)
    if before >> 32 == tl.num_programs(0) - 1:
        tl.atomic_xchg(counters + NUM_UNIQUE, tl.where(is_due, 0, before & 0xFFFFFFFF))
        tl.atomic_add(counters + STEP, is_due.to(tl.int64))


@triton.jit
def update_rows(
    rows, grads, counters, unique_rows, row_vocabularies, hyper, due, rates, row_stride, grad_stride, width,
    DECAY: tl.constexpr, RATE: tl.constexpr, SCALE: tl.constexpr, OWN: tl.constexpr, FORMULA: tl.constexpr,
    DIMS: tl.constexpr, HAS_RATES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COVER: tl.constexpr,
):  # fmt: skip
    is_due = tl.load(due)
    num = tl.where(is_due, tl.load(counters + NUM_UNIQUE, volatile=True).to(tl.int32), 0)
    column = tl.arange(0, COLUMNS)[None, :]
    for first in range(tl.program_id(0) * ROWS, num, tl.num_programs(0) * ROWS):
        unique = first + tl.arange(0, ROWS)[:, None]
        within, covers = (unique < num) & (column < width), (unique < num) & (column < COVER)
        row = tl.load(unique_rows + unique, mask=unique < num, other=0)
        of_unique = grads + unique.to(tl.int64) * grad_stride + column
        g = tl.load(of_unique, mask=covers, other=0.0) * scalar(hyper, SCALE)
        decay, rate = scalar(hyper, DECAY), scalar(hyper, RATE)
        if HAS_RATES:
            vocabulary = tl.load(row_vocabularies + row, mask=unique < num, other=0)
            decay = tl.load(rates + vocabulary * 2 * width + column, mask=within, other=0.0)
            rate = tl.load(rates + (vocabulary * 2 + 1) * width + column, mask=within, other=0.0)
        FORMULA(rows + row.to(tl.int64) * row_stride, column, within, covers, g, decay, rate, hyper + OWN, width, DIMS)
        tl.debug_barrier()  # the threads that read a gradient need not be those that clear it
        tl.store(of_unique, tl.zeros_like(g), mask=covers)
    end_step(counters, is_due)


AT_ONCE = {  # `launch.at_once`
    sgd: (10, 10, 8), adagrad: (8, 5, 4), rowwise_adagrad: (7, 6, 5), adamw: (9, 5, 4), adamw_by_column: (8, 4, 3),
    ftrl: (4, 3, 3),
}  # fmt: skip


def update(
    formula: Callable, rows: Tensor, grads: Tensor, counters: Tensor, unique_rows: Tensor, row_vocabularies: Tensor,
    hyper: Tensor, due: Tensor, dims: Sequence[int], rates: Tensor | None, places: tuple[int, int, int, int],
) -> None:  # fmt: skip
    """`places`: in `hyper`, of decay, rate, scale and the formula's own scalars."""
    width = grads.shape[1]
    decay, rate, scale, own = places
    update_rows[programs(unique_rows.numel(), rows_of(width), at_once(width, AT_ONCE[formula]))](
        rows, grads, counters, unique_rows, row_vocabularies, hyper, due, hyper if rates is None else rates,
        rows.stride(0), grads.stride(0), width, DECAY=decay, RATE=rate, SCALE=scale, OWN=own, FORMULA=formula,
        DIMS=tuple(dims), HAS_RATES=rates is not None, ROWS=rows_of(width), COLUMNS=columns_of(width),
        COVER=cover_of(width, rows.stride(0), grads.stride(0)),
    )  # fmt: skip


def adamw_rows_(rows: Tensor, grads: Tensor, counters: Tensor, unique_rows: Tensor, hyper: Tensor, due: Tensor) -> None:
    """`recfx.kernels.rows.adamw_rows.definition`."""
    update(adamw, rows, grads, counters, unique_rows, unique_rows, hyper, due, (), None, (0, 5, 7, 1))


def operator(formula: Callable) -> Callable[..., None]:
    def update_(
        rows: Tensor, grads: Tensor, counters: Tensor, unique_rows: Tensor, row_vocabularies: Tensor, hyper: Tensor,
        due: Tensor, dims: Sequence[int], rates: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The definition of that name in `recfx.kernels.rows.optimizer_rows`."""
        of_rows = counters, unique_rows, row_vocabularies
        update(formula, rows, grads, *of_rows, hyper, due, dims, rates, (0, 1, 2, 3))

    return update_


sgd_rows_, adagrad_rows_, rowwise_adagrad_rows_ = operator(sgd), operator(adagrad), operator(rowwise_adagrad)
adamw_rows_by_column_, ftrl_rows_ = operator(adamw_by_column), operator(ftrl)
