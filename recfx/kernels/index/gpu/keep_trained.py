"""keep_trained_ and untouch_rows_ on a GPU: which rows are among the step's after all.

mark_trained  of each new unique number, whether an occurrence trains; the rows by number are copied
sum_kept      those that are kept are summed up (`scan.py`), which ranks them
renumber      rows, `seen` and occurrences get the new numbers
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels import op
from recfx.kernels.gpu.counters import NUM_UNIQUE, STEP
from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS
from recfx.kernels.gpu.scan import num_counters, store_sums, sum_of_all, sum_up_to, sums_of
from recfx.kernels.index import keep_trained

__all__ = ["keep_trained_", "untouch_rows_"]

NO_NUMBER, UNKNOWN = tl.constexpr(keep_trained.NO_NUMBER), tl.constexpr(op.UNKNOWN)


@triton.jit
def is_trained(inverse, cell_P, trains, num_cells, k, within):
    cell = tl.load(cell_P + k, mask=within, other=-1)
    real = (cell >= 0) & (inverse >= 0)
    return real & (tl.load(trains + tl.maximum(cell, 0) % num_cells, mask=real, other=0) != 0)


@triton.jit
def mark_trained(
    kept, rows, unique_rows, counters, num_before, inverse_P, cell_P, trains, num_cells, num_positions,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within, before = k < num_positions, tl.load(num_before)
    inverse = tl.load(inverse_P + k, mask=within, other=-1)
    trained = is_trained(inverse, cell_P, trains, num_cells, k, within)
    tl.store(kept + (inverse - before), tl.full([BLOCK], 1, tl.int32), mask=trained & (inverse >= before))
    exists = within & (k < tl.load(counters + NUM_UNIQUE) - before)
    tl.store(rows + k, tl.load(unique_rows + before + k, mask=exists, other=-1), mask=within)


@triton.jit
def sum_kept(sums_P, sums, done, kept, num_positions, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_kept = tl.load(kept + k, mask=k < num_positions, other=0) > 0
    store_sums(sums_P, sums, done, k, is_kept.to(tl.int32), k < num_positions)


@triton.jit
def renumber(
    out_P, seen, unique_rows, counters, rows, ranks, num_before, inverse_P, cell_P, trains, num_cells, num_positions,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of new number n, position n of the batch takes care: there are no more of them than positions."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within, before = k < num_positions, tl.load(num_before)
    row, rank = tl.load(rows + k, mask=within, other=-1), sum_up_to(ranks, k, within, BLOCK)
    kept = rank > sum_up_to(ranks, k - 1, within & (k > 0), BLOCK)
    number = before + rank - 1
    now = ((tl.load(counters + STEP) + 1) << 32) | tl.where(kept, number, NO_NUMBER)
    tl.store(seen + row, now, mask=row >= 0)
    tl.store(unique_rows + number, row, mask=(row >= 0) & kept)

    inverse = tl.load(inverse_P + k, mask=within, other=-1)
    trained = is_trained(inverse, cell_P, trains, num_cells, k, within)
    is_new = trained & (inverse >= before)
    new_number = before + sum_up_to(ranks, inverse - before, is_new, BLOCK) - 1
    out = tl.where(is_new, new_number, tl.where(trained, inverse, UNKNOWN))
    tl.store(out_P + k, out.to(tl.int32), mask=within)
    total = before + sum_of_all(ranks[1], ranks[2])
    tl.store(counters + NUM_UNIQUE + k * 0, tl.zeros([BLOCK], tl.int64) + total, mask=k == 0)


@triton.jit
def untouch(seen, counters, row_P, inverse_P, num_before, counts, num_positions, BLOCK: tl.constexpr):
    """Lanes with the same row write the same; what they read meanwhile is the row's old number or what is written."""
    if tl.load(counts) == 0:
        k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(row_P + k, mask=k < num_positions, other=-1)
        last = tl.zeros([BLOCK], tl.int64) + (tl.load(counters + STEP) << 32)
        newly = (row >= 0) & (tl.load(inverse_P + k, mask=row >= 0, other=-1) >= tl.load(num_before))
        others = (row >= 0) & ~newly
        before = tl.atomic_add(seen + row, tl.zeros([BLOCK], tl.int64), mask=others, sem="relaxed")
        newly |= others & (before == last + (1 << 32) + NO_NUMBER)
        tl.atomic_xchg(seen + row, last, mask=newly, sem="relaxed")
        if tl.program_id(0) == 0:
            tl.store(counters + NUM_UNIQUE, tl.load(num_before))


def keep_trained_(
    seen: Tensor, unique_rows: Tensor, counters: Tensor, num_before: Tensor, inverse_P: Tensor, cell_P: Tensor,
    trains: Tensor,
) -> Tensor:  # fmt: skip
    """`recfx.kernels.index.keep_trained.definition`."""
    num, out_P = inverse_P.numel(), torch.empty_like(inverse_P)
    if num == 0:
        return out_P
    rows, sums_P = torch.empty_like(inverse_P), torch.empty_like(inverse_P)
    occurrences = inverse_P, cell_P, trains, len(trains), num
    grid, block = (triton.cdiv(num, BLOCK),), {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    kept, done = inverse_P.new_full((num + num_counters(*grid),), -1).split([num, num_counters(*grid)])
    sums = sums_of(seen, *grid)
    mark_trained[grid](kept, rows, unique_rows, counters, num_before, *occurrences, **block)
    sum_kept[grid](sums_P, sums, done, kept, num, **block)
    ranks = sums_P, sums, *grid
    renumber[grid](out_P, seen, unique_rows, counters, rows, ranks, num_before, *occurrences, **block)
    return out_P


def untouch_rows_(
    seen: Tensor, counters: Tensor, row_P: Tensor, inverse_P: Tensor, num_before: Tensor, counts: Tensor
) -> None:
    """`recfx.kernels.index.untouch_rows.definition`."""
    num = row_P.numel()
    if num:
        untouch[(triton.cdiv(num, BLOCK),)](
            seen, counters, row_P, inverse_P, num_before, counts, num, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
