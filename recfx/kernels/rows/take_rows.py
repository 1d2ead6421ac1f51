"""take_rows_: the weights of rows, as a message to the ranks that asked for them."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["take_rows_"]


def definition(message: Tensor, first: int, rows: Tensor, row_M: Tensor, width: int) -> None:
    """message[rank, first:] = the weights of its rows in `row_M`, one after the other, then a status for each of them.

    The status is 0, or the negative row, whose weights are 0.

    Shapes:   message f32 [ranks, K], rows f32 [R, 1 + slots, W], row_M i32 [ranks * capacity], by rank.
    Writes:   message, capacity * width weights and capacity statuses of each rank.
    """
    is_row = row_M >= 0
    weights = torch.where(is_row[:, None], rows[row_M.clamp(min=0), 0, :width], 0.0)
    status = torch.where(is_row, 0, row_M).float()
    block = torch.cat([t.reshape(message.shape[0], -1) for t in (weights, status)], 1)
    message[:, first : first + block.shape[1]] = block


take_rows_ = define_op("take_rows_", definition=definition, fake=lambda *_: None)
