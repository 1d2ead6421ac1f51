"""Streaming metrics of binary predictions: integer histograms inside the step, read on the host when logging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.kernels.dense import add_predictions
from recfx.metrics.counts import LOGIT_RANGE, BinaryCounts, auc, calibration, log_loss, num_nonfinite
from recfx.metrics.curves import ece, normalised_entropy, pr_auc

__all__ = ["Counts", "Metric", "binary_metrics", "binary_values"]

Counts = Any  # a NamedTuple of tensors whose sums over batches and ranks are those of all samples


class Metric(NamedTuple):
    """What a step counts of a task's outputs, and how a training run reads it.

    init:       (device="cpu") -> counts, all zero: a NamedTuple of tensors, which are added over batches and ranks.
    update_:    (counts, logit f32 [B, 1], label f32 [B, 1], loss f32 [B, 1], valid bool [B, 1]) -> the same counts,
                with the valid samples added. Of a batch loss: the dict of outputs, and the features in place of labels.
    values:     (counts) -> numbers by name, on the host; "log_loss" or "loss" is the mean loss. None: those of
                `binary_values`.
    by:         name of a feature i64 [B, 1], or Ragged with one id each, whose values `update_` takes as a sixth
                argument, i64 [B]; None: it takes five.
    """

    init: Callable[..., Counts]
    update_: Callable[..., Counts]
    values: Callable[[Counts], dict[str, float]] | None = None
    by: str | None = None

    def read(self, counts: Counts) -> dict[str, float]:
        """The numbers that counts stand for, by name."""
        return (self.values or binary_values)(counts)


def binary_metrics(num_bins: int = 2**16) -> Metric:
    """Counts of predictions over `num_bins` equal bins of the logit in (-20, 20), and the sums of loss and clicks.

    A logit bin is 0.0006 wide by default, so AUC from it is right at any click rate where scores spread over more than
    a few bins; counts are integers and exact up to 2**63.
    """

    def init(device: torch.device | str = "cpu") -> BinaryCounts:
        histogram = torch.zeros(2, num_bins, dtype=torch.int64, device=device)
        return BinaryCounts(histogram, torch.zeros(6, dtype=torch.float64, device=device))

    def update_(counts: BinaryCounts, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor) -> BinaryCounts:
        numbers = (t.float().contiguous() for t in (logit, label, loss))
        add_predictions.add_predictions_(*counts, *numbers, valid.contiguous(), LOGIT_RANGE)
        return counts

    return Metric(init, update_)


def binary_values(counts: BinaryCounts) -> dict[str, float]:
    """AUC, log loss and calibration; area under precision by recall, normalised entropy and expected calibration error;
    number of samples, and how many were not finite."""
    counts = BinaryCounts(*(t.cpu() for t in counts))  # read once
    return {
        "auc": auc(counts),
        "log_loss": log_loss(counts),
        "calibration": calibration(counts),
        "pr_auc": pr_auc(counts),
        "normalised_entropy": normalised_entropy(counts),
        "ece": ece(counts),
        "num_samples": float(counts.sums[0]),
        "num_nonfinite": float(num_nonfinite(counts)),
    }
