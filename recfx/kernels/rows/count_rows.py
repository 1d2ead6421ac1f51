"""count_rows_: how many steps have touched each row."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE
from recfx.kernels.op import define_op

__all__ = ["count_rows_"]


def definition(counts: Tensor, counters: Tensor, unique_rows: Tensor, due: Tensor) -> None:
    """counts[unique_rows[:NUM_UNIQUE]] += 1, if `due`: once per optimiser step, however it was cut.

    Shapes:   counts i32 [R], counters as in `TableState`, unique_rows i32 [U], due bool [].
    """
    row = unique_rows[: int(counters[NUM_UNIQUE]) if due else 0].long()
    counts[row] += torch.ones_like(row, dtype=torch.int32)


count_rows_ = define_op(
    "count_rows_",
    definition=definition,
    cuda="rows.gpu.count_rows",
    fake=lambda *_: None,
)
