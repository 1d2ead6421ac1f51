"""add_predictions_: a batch's predictions counted by label and logit bin, with the sums of loss and clicks."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["add_predictions_"]


def definition(
    histogram: Tensor, sums: Tensor, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor, logit_range: float
) -> None:
    """Adds one to the bin of each valid sample, and to `sums` the samples, clicks, losses, predicted clicks, and the
    samples whose logit or loss is not finite.

    Bins are equal parts of (-logit_range, logit_range); what lies outside belongs to the outermost ones, NaN to the
    lowest.

    Shapes:   histogram i64 [2, bins], row 1 for clicks; sums f64 [5]; logit, label, loss f32 and valid bool [B, 1].
    """
    num_bins = histogram.shape[1]
    unit = (logit + logit_range) / (2 * logit_range)
    bin_B = (unit * num_bins).clamp(0, num_bins - 1).long().clamp(min=0).flatten()  # NaN becomes a negative integer
    is_click = (label > 0.5).long().flatten()
    histogram.index_put_((is_click, bin_B), valid.long().flatten(), accumulate=True)
    numbers = [torch.where(valid, t, 0) for t in (label, loss, logit.sigmoid())]
    terms = [valid, *numbers, valid & ~(logit.isfinite() & loss.isfinite())]
    sums.add_(torch.stack([t.double().sum() for t in terms]))


add_predictions_ = define_op(
    "add_predictions_(Tensor(a!) histogram, Tensor(b!) sums, Tensor logit, Tensor label, Tensor loss, Tensor valid,"
    " float logit_range) -> ()",
    definition=definition,
    fake=lambda *_: None,
)
