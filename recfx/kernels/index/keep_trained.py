"""keep_trained_: the rows that no training lookup touched leave the step's unique rows."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE, STEP
from recfx.kernels.op import UNKNOWN, define_op

__all__ = ["keep_trained_"]

NO_NUMBER = 2**32 - 1  # low half of `seen` of a row that the step touched and does not update


def definition(
    seen: Tensor,
    unique_rows: Tensor,
    counters: Tensor,
    num_before: Tensor,
    inverse_P: Tensor,
    cell_P: Tensor,
    trains: Tensor,
) -> Tensor:
    """After `find_or_insert_`: of the rows that it gave numbers, those with an occurrence that trains keep their order
    and are numbered from num_before again; the others count as seen, and are no longer among the step's rows.

    Shapes:   seen i64 [R], unique_rows i32 [U], counters as in `TableState`, num_before i64 or i32 [] (NUM_UNIQUE
              before `find_or_insert_`), inverse_P and cell_P i32 [P], trains bool [L], of each cell of a sample.
    Returns:  inverse_P i32 [P], -1 for occurrences that do not train.
    Writes:   seen, unique_rows, the counter NUM_UNIQUE.
    Cost:     a few passes over the positions, 5 launches on a GPU; never syncs.
    """
    num = inverse_P.numel()
    if num == 0:
        return inverse_P.clone()
    before, n = num_before.long(), torch.arange(num, device=seen.device)
    trained = (cell_P >= 0) & (inverse_P >= 0) & trains[cell_P % len(trains)]
    nth = inverse_P.long() - before  # among those that are new in this batch
    is_new = nth >= 0
    spare = torch.where(trained & is_new, nth, num)
    is_kept = torch.zeros(num + 1, dtype=torch.int64, device=seen.device).scatter(0, spare, 1)[:num]
    number = before + torch.cumsum(is_kept, 0) - 1

    exists = n < counters[NUM_UNIQUE] - before
    row = torch.where(exists, unique_rows[(before + n).clamp(max=unique_rows.numel() - 1)].long(), 0)
    now = ((counters[STEP] + 1) << 32) | torch.where(is_kept == 1, number, NO_NUMBER)
    # Written as differences, 0 where there is nothing to write: all shapes are fixed, and no place is written twice.
    seen.index_add_(0, row, torch.where(exists, now - seen[row], 0))
    to = torch.where(is_kept == 1, number, 0)
    moved = torch.where(is_kept == 1, row.int() - unique_rows[to], 0)
    unique_rows.index_add_(0, to, moved)
    counters[NUM_UNIQUE] = before + is_kept.sum()
    renumbered = torch.where(is_new, number[nth.clamp(min=0)], inverse_P.long())
    return torch.where(trained, renumbered, UNKNOWN).int()


keep_trained_ = define_op(
    "keep_trained_",
    definition=definition,
    cuda="index.gpu.keep_trained",
    fake=lambda seen, unique_rows, counters, num_before, inverse_P, cell_P, trains: torch.empty_like(inverse_P),
)
