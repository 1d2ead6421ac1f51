"""add_predictions_: a batch's predictions counted by label and logit bin, with the sums of loss and clicks."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["add_predictions_"]


def definition(
    histogram: Tensor, sums: Tensor, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor, logit_range: float
) -> None:
    """Adds one to the bin of each valid sample, and to `sums` the samples, clicks, losses, predicted clicks, the
    samples whose logit or loss is not finite and, where there is a sixth number, those whose label is not in [0, 1].

    Bins are equal parts of (-logit_range, logit_range); what lies outside belongs to the outermost ones, NaN to the
    lowest.

    Shapes:   histogram i64 [2, bins], row 1 for clicks; sums f64 [5] or [6]; logit, label, loss f32 and valid bool
              [B, 1].
    """
    num_bins = histogram.shape[1]
    unit = (logit + logit_range) / (2 * logit_range)
    bin_B = (unit * num_bins).clamp(0, num_bins - 1).long().clamp(min=0).flatten()  # NaN becomes a negative integer
    is_click = (label > 0.5).long().flatten()
    histogram.index_put_((is_click, bin_B), valid.long().flatten(), accumulate=True)
    is_bad = ~(logit.isfinite() & loss.isfinite())
    terms = [valid, label, loss, logit.sigmoid(), is_bad, label != label.clamp(0, 1)]  # of NaN: true
    columns = torch.cat(terms[: sums.numel()], dim=1)
    sums.add_(torch.where(valid, columns, 0).sum(0, dtype=torch.float64))


add_predictions_ = define_op(
    "add_predictions_",
    definition=definition,
    cuda="dense.gpu.add_predictions",
    fake=lambda *_: None,
)
