"""add_predictions_ on a GPU: one launch up to SAMPLES samples, and one more to add up the programs of a larger batch.

Sums are the same bytes from run to run: each program adds its samples up in a tree, and programs are added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.dense.gpu.all_finite import is_number

__all__ = ["add_predictions_"]

SAMPLES = 2048  # of a program
COLUMNS = 8  # room for the numbers of `sums`
ROWS = 128  # programs that are added up at once


@triton.jit
def count_bins(histogram, num_bins, logit, label, valid, logit_range):
    """Adds one for each valid sample. Those of the first and the last place of a program, which are all of them where
    a model predicts the same for every sample, are added at once: adds to one address wait for each other."""
    bin = tl.div_rn(logit + logit_range, logit_range * 2) * num_bins
    bin = tl.where(bin >= 0, tl.minimum(bin, num_bins - 1), 0.0)  # NaN: the lowest
    place = tl.where(label > 0.5, num_bins, 0) + bin.to(tl.int32)
    first = tl.min(tl.where(valid, place, 2 * num_bins), axis=0)
    last = tl.max(tl.where(valid, place, -1), axis=0)
    num_first = tl.sum((valid & (place == first)).to(tl.int32), axis=0).to(tl.int64)
    num_last = tl.sum((valid & (place == last)).to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_add(histogram + first, num_first, mask=num_first > 0, sem="relaxed")
    tl.atomic_add(histogram + last, num_last, mask=(num_last > 0) & (first < last), sem="relaxed")
    between = valid & (place > first) & (place < last)
    tl.atomic_add(histogram + place, tl.full(place.shape, 1, tl.int64), mask=between, sem="relaxed")


@triton.jit
def sum_of(numbers, valid):
    return tl.sum(tl.where(valid, numbers, 0.0).to(tl.float64), axis=0)


@triton.jit
def num_of(these, valid):
    return tl.sum((valid & these).to(tl.int32), axis=0).to(tl.float64)


@triton.jit
def add_samples(
    histogram, sums, partial_sums, num_bins, logits, labels, losses, valids, logit_range, num_samples,
    NUM_SUMS: tl.constexpr, ALONE: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    nth = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    within = nth < num_samples
    valid = tl.load(valids + nth, mask=within, other=0) != 0
    logit, label = tl.load(logits + nth, mask=within, other=0.0), tl.load(labels + nth, mask=within, other=0.0)
    loss = tl.load(losses + nth, mask=within, other=0.0)
    count_bins(histogram, num_bins, logit, label, valid, logit_range)

    column = tl.arange(0, COLUMNS)
    total = tl.where(column == 0, num_of(valid, valid), tl.where(column == 1, sum_of(label, valid), 0.0))
    total += tl.where(column == 2, sum_of(loss, valid), 0.0)
    total += tl.where(column == 3, sum_of(1.0 / (1.0 + tl.exp(-logit)), valid), 0.0)
    total += tl.where(column == 4, num_of(~(is_number(logit) & is_number(loss)), valid), 0.0)
    total += tl.where(column == 5, num_of(~((label >= 0.0) & (label <= 1.0)), valid), 0.0)
    if ALONE:
        tl.atomic_add(sums + column, total, mask=column < NUM_SUMS, sem="relaxed")  # nothing else adds: no order
    else:
        tl.store(partial_sums + tl.program_id(0) * COLUMNS + column, total)


@triton.jit
def add_partial_sums(sums, partial_sums, num, NUM_SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for begin in range(0, num, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        total += tl.sum(tl.load(partial_sums + row * COLUMNS + column[None, :], mask=row < num, other=0.0), axis=0)
    tl.atomic_add(sums + column, total, mask=column < NUM_SUMS, sem="relaxed")


def add_predictions_(
    histogram: Tensor, sums: Tensor, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor, logit_range: float
) -> None:
    """`recfx.kernels.dense.add_predictions.definition`."""
    num_samples = logit.numel()
    num_programs, num_sums = triton.cdiv(num_samples, SAMPLES), sums.numel()
    if num_programs == 0:
        return
    partial_sums = sums if num_programs == 1 else sums.new_empty(num_programs, COLUMNS)
    add_samples[(num_programs,)](
        histogram, sums, partial_sums, histogram.shape[1], logit, label, loss, valid, logit_range, num_samples,
        NUM_SUMS=num_sums, ALONE=num_programs == 1, SAMPLES=SAMPLES, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    if num_programs > 1:
        add_partial_sums[(1,)](sums, partial_sums, num_programs, NUM_SUMS=num_sums, ROWS=ROWS, COLUMNS=COLUMNS)
