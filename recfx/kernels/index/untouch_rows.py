"""untouch_rows_: takes back that a batch which does not count has touched rows."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index.keep_trained import NO_NUMBER
from recfx.kernels.op import define_op

__all__ = ["untouch_rows_"]


def definition(
    seen: Tensor, row_P: Tensor, inverse_P: Tensor, num_before: Tensor, step: Tensor, counts: Tensor
) -> None:
    """Unless the batch counts, its rows that no batch before it in this step had touched were last seen at `step`.

    So are rows that this step only reads and does not train. The unique numbers, which are num_before and above, are
    then free: the caller sets num_unique back. Of static shape, so that a CUDA graph can hold it.

    Shapes:   seen i64 [R]: step << 32 | unique number; row_P, inverse_P i32 [P] as `find_or_insert` gives them;
              num_before i64 [], rows touched before this batch; step i64 [], steps taken; counts bool [].
    """
    row = row_P.clamp(min=0).long()
    is_read = (row_P >= 0) & (seen[row] == ((step + 1) << 32) + NO_NUMBER)
    newly = ~counts & ((inverse_P >= num_before) | is_read)
    newly = newly | ((row == 0) & (newly & (row == 0)).any())  # positions without a row write row 0's value
    seen[row] = torch.where(newly, step << 32, seen[row])


untouch_rows_ = define_op(
    "untouch_rows_(Tensor(a!) seen, Tensor row_P, Tensor inverse_P, Tensor num_before, Tensor step, Tensor counts)"
    " -> ()",
    definition=definition,
    cuda="index.gpu.keep_trained",
    fake=lambda *_: None,
)
