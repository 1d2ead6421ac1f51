"""untouch_rows_: takes back that a batch which does not count has touched rows."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE, STEP
from recfx.kernels.index.keep_trained import NO_NUMBER
from recfx.kernels.op import define_op

__all__ = ["untouch_rows_"]


def definition(
    seen: Tensor, counters: Tensor, row_P: Tensor, inverse_P: Tensor, num_before: Tensor, counts: Tensor
) -> None:
    """Unless the batch counts, rows that it was the first to touch in this step were last seen at the step before.

    So were rows that this step only reads and does not train. The counter NUM_UNIQUE is num_before again, which frees
    the batch's unique numbers. All shapes are static, so that a CUDA graph can hold it.

    Shapes:   seen i64 [R]: step << 32 | unique number; counters as in `TableState`; row_P, inverse_P i32 [P] as
              `find_or_insert_` returns them; num_before i64 [], rows touched before this batch; counts bool [].
    """
    step = counters[STEP]
    row = row_P.clamp(min=0).long()
    is_read = (row_P >= 0) & (seen[row] == ((step + 1) << 32) + NO_NUMBER)
    newly = ~counts & ((inverse_P >= num_before) | is_read)
    newly = newly | ((row == 0) & (newly & (row == 0)).any())  # positions without a row write row 0's value
    seen[row] = torch.where(newly, step << 32, seen[row])
    counters[NUM_UNIQUE] = torch.where(counts, counters[NUM_UNIQUE], num_before)


untouch_rows_ = define_op(
    "untouch_rows_",
    definition=definition,
    cuda="index.gpu.keep_trained",
    fake=lambda *_: None,
)
