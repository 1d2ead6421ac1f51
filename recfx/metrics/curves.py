"""What the host computes from a histogram besides AUC: precision and recall, entropy, calibration per bin."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from recfx.checks import check_int, check_type
from recfx.metrics.counts import LOGIT_RANGE, OF_STATE, BinaryCounts, log_loss, num_nonfinite

__all__ = ["CalibrationBin", "calibration_bins", "ece", "normalised_entropy", "pr_auc"]

NUM_BINS = 20


def pr_auc(counts: BinaryCounts) -> float:
    """Area under precision by recall, as average precision. The click rate is that of random scores.

        sum over bins of the logit, from the highest, of (R_k - R_(k-1)) P_k

    where R_k and P_k are recall and precision of the samples of bins 1 to k. It is
    `sklearn.metrics.average_precision_score` of scores that are equal within a bin.

    NaN without a click, and as `auc`.
    """
    check_type("counts", counts, BinaryCounts, OF_STATE)
    negative, positive = counts.histogram.double().cpu().flip(1)
    clicks = positive.sum()
    if num_nonfinite(counts) or not clicks:
        return math.nan
    found = positive.cumsum(0)
    precision = found / (found + negative.cumsum(0)).clamp(min=1)
    return float((positive * precision).sum() / clicks)


def normalised_entropy(counts: BinaryCounts) -> float:
    """Log loss over that of predicting the click rate of these samples: below 1 is better than a constant.

        NE = log loss / -(c log c + (1 - c) log(1 - c)),  c = clicks / samples

    Of binary cross entropy; another loss is divided by the same entropy. NaN without both classes, and as `auc`.
    Ref: He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook", ADKDD.
    """
    check_type("counts", counts, BinaryCounts, OF_STATE)
    samples, clicks, *_ = counts.sums.tolist()
    rate = clicks / samples if samples else 0.0
    if not 0 < rate < 1:
        return math.nan
    return log_loss(counts) / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


class CalibrationBin(NamedTuple):
    """Samples whose predictions are next to each other."""

    num_samples: int
    predicted: float  # mean probability
    observed: float  # click rate


def calibration_bins(counts: BinaryCounts, num_bins: int = NUM_BINS) -> list[CalibrationBin]:
    """Mean prediction and click rate of samples in order of their prediction, in bins of equal numbers of samples.

    Samples in one bin of the logit stay together, so bins can be fewer or unequal. The probability of a sample is that
    of the middle of its logit bin: within 0.0001 with the default 2**16 bins. Empty as `auc` is NaN.

    Args:     num_bins: >= 1.
    """
    check_type("counts", counts, BinaryCounts, OF_STATE)
    check_int("num_bins", num_bins, 1)
    histogram = counts.histogram.cpu()
    each = histogram.sum(0)
    total = int(each.sum())
    if num_nonfinite(counts) or not total:
        return []
    num_logits = histogram.shape[1]
    middle = (torch.arange(num_logits, dtype=torch.float64) + 0.5) * (2 * LOGIT_RANGE / num_logits) - LOGIT_RANGE
    before = each.cumsum(0) - each
    # The bin of the sample in the middle of a logit bin: integers, so that no rounding decides.
    place = ((2 * before + each) * num_bins).div(2 * total, rounding_mode="floor").clamp(max=num_bins - 1)
    samples, clicks = (torch.zeros(num_bins, dtype=torch.int64).index_add(0, place, n) for n in (each, histogram[1]))
    predicted = torch.zeros(num_bins, dtype=torch.float64).index_add(0, place, middle.sigmoid() * each)
    return [
        CalibrationBin(n, p / n, c / n)
        for n, p, c in zip(samples.tolist(), predicted.tolist(), clicks.tolist(), strict=True)
        if n
    ]


def ece(counts: BinaryCounts, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: how far predictions and click rates are apart, over `calibration_bins`.

        sum over bins of (samples in the bin / samples) |predicted - observed|

    0 is calibrated. `calibration` can be 1 where low predictions are too low and high ones too high; this cannot be 0.
    NaN as `auc` of a logit that is not finite, and without a sample.

    Differs:  from Naeini et al. 2015: bins hold equal numbers of samples; of equal widths, the first of them would hold
              nearly all samples where clicks are rare.
    """
    bins = calibration_bins(counts, num_bins)
    total = sum(b.num_samples for b in bins)
    return sum(b.num_samples * abs(b.predicted - b.observed) for b in bins) / total if total else math.nan
