"""Metrics of tasks whose label is a number: sums inside the step, read on the host."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recfx.metrics.binary import Metric

__all__ = ["RegressionCounts", "regression_metrics"]


class RegressionCounts(NamedTuple):
    """What a phase has predicted so far."""

    sums: Tensor  # f64 [7]: samples, loss, label, prediction, squares of error, of label, samples that are not finite


def regression_metrics(link: Literal["identity", "exp"] = "identity") -> Metric:
    """Counts of predicted numbers.

    Values: loss; rmse, the root of the mean squared error; r2 = 1 - squared error / variance of labels; calibration,
    the sum of predictions over that of labels; num_samples, num_nonfinite. NaN as soon as one sample is not finite.

    Args:     link: "exp": the prediction is exp(logit), as with `recfx.losses.poisson`.
    """

    def init(device: torch.device | str = "cpu") -> RegressionCounts:
        return RegressionCounts(torch.zeros(7, dtype=torch.float64, device=device))

    def update_(
        counts: RegressionCounts, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor
    ) -> RegressionCounts:
        y, loss = label.double(), loss.double()
        prediction = logit.double().exp() if link == "exp" else logit.double()
        is_good = valid & prediction.isfinite() & loss.isfinite()
        parts = [torch.ones_like(y), loss, y, prediction, (prediction - y).square(), y.square()]
        counted = [torch.where(is_good, part, 0.0).sum() for part in parts]
        counted[0] = valid.sum().double()
        counts.sums.add_(torch.stack([*counted, (valid & ~is_good).sum().double()]))
        return counts

    return Metric(init, update_, regression_values)


def regression_values(counts: RegressionCounts) -> dict[str, float]:
    """See `regression_metrics`."""
    num, loss, label, prediction, error, squares, bad = counts.sums.tolist()
    usable = num and not bad
    variance = squares - label**2 / num if num else 0.0
    return {
        "loss": loss / num if usable else math.nan,
        "rmse": math.sqrt(error / num) if usable else math.nan,
        "r2": 1 - error / variance if usable and variance > 0 else math.nan,
        "calibration": prediction / label if usable and label else math.nan,
        "num_samples": num,
        "num_nonfinite": bad,
    }
