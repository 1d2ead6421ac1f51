"""sum_adamw_rows_: add_row_grads_ and adamw_rows_ in one, for a step that is one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE
from recfx.kernels.op import define_op
from recfx.kernels.rows import adamw_rows, add_row_grads

__all__ = ["sum_adamw_rows_"]


def definition(
    rows: Tensor,
    counters: Tensor,
    unique_rows: Tensor,
    hyper: Tensor,
    inverse_P: Tensor,
    cell_P: Tensor,
    firsts: Sequence[int],
    dims: Sequence[int],
    blocks: Sequence[Tensor],
    weight_P: Tensor | None = None,
) -> None:
    """`adamw_update` on rows[unique_rows[:NUM_UNIQUE]] with the sums of their gradients; NUM_UNIQUE is then zero, STEP
    one more.

    The gradients never reach memory on a GPU: there this is one pass less over the step's rows, and two less over its
    gradients.

    Shapes:   rows f32 [R, 3, W], counters, unique_rows i32 [U] and hyper f64 [8] as in `adamw_rows_`; the others as in
              `add_row_grads_`, where the slices cover all W columns. All unique rows are of this batch, so
              NUM_UNIQUE is at most P.
    """
    grads = rows.new_zeros(int(counters[NUM_UNIQUE]), rows.shape[2])
    add_row_grads.definition(grads, inverse_P, cell_P, firsts, dims, blocks, weight_P)
    adamw_rows.definition(rows, grads, counters, unique_rows, hyper, torch.ones((), dtype=torch.bool))


sum_adamw_rows_ = define_op(
    "sum_adamw_rows_",
    definition=definition,
    cuda="rows.gpu.sum_adamw_rows",
    fake=lambda *_: None,
)
