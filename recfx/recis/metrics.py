"""The seed system's AUROC, to compare numbers with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recfx.checks import check_type

__all__ = ["auc_200", "threshold_auc"]


def threshold_auc(num_thresholds: int = 200) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The seed system's AUROC, to compare numbers with it: counts at fixed thresholds of the probability.

    Thresholds are -1e-7, i / (T - 1), 1 + 1e-7; a prediction above one counts as positive there. At click rates of a
    tenth of a percent all predictions fall between two thresholds, so prefer `auc`, the default.

    Returns:  init() -> i64 [2, T] and update(counts, probability f32 [B, 1], label f32 [B, 1]) -> counts, row 0 the
              false and row 1 the true positives per threshold.
    """
    inner = torch.arange(1, num_thresholds - 1, dtype=torch.float64) / (num_thresholds - 1)
    thresholds = torch.cat([torch.tensor([-1e-7]), inner, torch.tensor([1 + 1e-7])]).float()

    def update(counts: Tensor, probability: Tensor, label: Tensor) -> Tensor:
        above_BT = probability.reshape(-1, 1) > thresholds.to(probability.device)
        click_B = label.reshape(-1, 1) > 0.5
        return counts + torch.stack([(above_BT & ~click_B).sum(0), (above_BT & click_B).sum(0)])

    return lambda: torch.zeros(2, num_thresholds, dtype=torch.int64), update


def auc_200(counts: Tensor) -> float:
    """Trapezoid over (FP / (FP + TN + 1e-6), (TP + 1e-6) / (TP + FN + 1e-6)) of `threshold_auc`'s counts i64 [2, T]."""
    check_type("counts", counts, Tensor, "Those of `threshold_auc`.")
    false_positive, true_positive = counts.double()
    x = false_positive / (false_positive[0] + 1e-6)
    y = (true_positive + 1e-6) / (true_positive[0] + 1e-6)
    return float(((x[:-1] - x[1:]) * (y[:-1] + y[1:]) / 2).sum())
