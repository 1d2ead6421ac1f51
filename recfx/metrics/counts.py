"""What is counted of binary predictions, and the numbers that are read from it on the host."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from recfx.checks import check_type

__all__ = ["BinaryCounts", "auc", "calibration", "log_loss", "num_bad_labels", "num_nonfinite"]

LOGIT_RANGE = 20.0
OF_STATE = "Those of a training state are state.metrics."


class BinaryCounts(NamedTuple):
    """What a phase has predicted so far."""

    histogram: Tensor  # i64 [2, bins], samples by label and logit bin
    sums: Tensor  # f64 [6]: samples, clicks, loss in nats, predicted clicks, samples whose logit or loss is not finite,
    #               samples whose label is not in [0, 1]; [5], without the last, of a step that does not check labels


def auc(counts: BinaryCounts) -> float:
    """Area under the ROC curve: the share of (click, no click) pairs in the right order, pairs of one bin as half.

    NaN while only one class has been seen, and as soon as one logit or loss was not finite: see `num_nonfinite`.
    """
    check_type("counts", counts, BinaryCounts, OF_STATE)
    if num_nonfinite(counts):
        return math.nan
    negative, positive = counts.histogram.double().cpu()
    below = negative.cumsum(0) - negative
    pairs = negative.sum() * positive.sum()
    return float((positive * (below + negative / 2)).sum() / pairs)


def log_loss(counts: BinaryCounts) -> float:
    """Mean loss per sample, in nats for binary cross entropy. NaN without a sample, and as `auc`."""
    check_type("counts", counts, BinaryCounts, OF_STATE)
    samples, _, loss, *_ = counts.sums.tolist()
    return loss / samples if samples and not num_nonfinite(counts) else math.nan


def calibration(counts: BinaryCounts) -> float:
    """Predicted clicks per observed click: 1 is calibrated. NaN without a click, and as `auc`."""
    check_type("counts", counts, BinaryCounts, OF_STATE)
    _, clicks, _, predicted, *_ = counts.sums.tolist()
    return predicted / clicks if clicks and not num_nonfinite(counts) else math.nan


def num_nonfinite(counts: BinaryCounts) -> int:
    """Samples whose logit or loss was NaN or infinite."""
    return int(counts.sums[4])


def num_bad_labels(counts: BinaryCounts) -> int:
    """Samples whose label was below 0, above 1 or NaN. 0 where labels are not checked, see `recfx.step.train_step`."""
    check_type("counts", counts, BinaryCounts, OF_STATE)
    return int(counts.sums[5]) if counts.sums.numel() > 5 else 0
