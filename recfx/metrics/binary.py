"""Streaming metrics of binary predictions: integer histograms inside the step, read on the host when logging."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.checks import check_type
from recfx.kernels.dense import add_predictions

__all__ = [
    "BinaryCounts",
    "Counts",
    "Metric",
    "auc",
    "binary_metrics",
    "binary_values",
    "calibration",
    "gauc",
    "log_loss",
    "num_bad_labels",
    "num_nonfinite",
]

LOGIT_RANGE = 20.0
OF_STATE = "Those of a training state are state.metrics."


class BinaryCounts(NamedTuple):
    """What a phase has predicted so far."""

    histogram: Tensor  # i64 [2, bins], samples by label and logit bin
    sums: Tensor  # f64 [6]: samples, clicks, loss in nats, predicted clicks, samples whose logit or loss is not finite,
    #               samples whose label is not in [0, 1]; [5], without the last, of a step that does not check labels


Counts = Any  # a NamedTuple of tensors whose sums over batches and ranks are those of all samples


class Metric(NamedTuple):
    """What a step counts of a task's outputs, and how a training run reads it.

    init:       (device="cpu") -> counts, all zero: a NamedTuple of tensors, which are added over batches and ranks.
    update_:    (counts, logit f32 [B, 1], label f32 [B, 1], loss f32 [B, 1], valid bool [B, 1]) -> the same counts,
                with the valid samples added. Of a batch loss: the dict of outputs, and the features in place of labels.
    values:     (counts) -> numbers by name, on the host; "log_loss" or "loss" is the mean loss. None: those of
                `binary_values`.
    """

    init: Callable[..., Counts]
    update_: Callable[[Counts, Any, Any, Tensor, Tensor], Counts]
    values: Callable[[Counts], dict[str, float]] | None = None

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


def gauc(group: Tensor, score: Tensor, label: Tensor) -> float:
    """Mean of the AUCs of groups, of a user's samples each, weighted by their sizes; pairs of equal score as half.

    Of predictions collected on the host, in any order, from any number of batches and workers. Groups of one class are
    left out. NaN without a group of two classes, and where a score is not finite.

    Shapes:   i64, f32 and label of N elements each; a click is a label above 0.5.
    Raises:   ValueError when one has more elements than another; TypeError on groups of floats.
    Example:  >>> gauc(torch.tensor([1, 1, 2, 2, 2]), torch.tensor([0.1, 0.9, 0.5, 0.5, 0.7]),
              ...      torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
              0.85
    """
    for name, value in (("group", group), ("score", score), ("label", label)):
        check_type(name, value, Tensor, "Use torch.tensor.")
    group, score, label = group.flatten(), score.flatten(), label.flatten()
    if not len(group) == len(score) == len(label):
        sizes = [len(group), len(score), len(label)]
        raise ValueError(f"group, score, label: got {sizes} elements, expected as many of each.")
    if group.is_floating_point():
        raise TypeError(f"group: got {group.dtype}, expected integers. float32 merges ids above 2**24.")
    if not bool(score.isfinite().all()):
        return math.nan
    order = score.argsort()
    order = order[group[order].argsort(stable=True)]
    group, score, click = group[order], score[order], (label[order] > 0.5).double()
    in_group, in_tie = torch.zeros_like(group), torch.zeros_like(group)
    in_group[1:] = (group[1:] != group[:-1]).cumsum(0)
    in_tie[1:] = ((group[1:] != group[:-1]) | (score[1:] != score[:-1])).cumsum(0)

    def sums(values: Tensor, of: Tensor) -> Tensor:
        return torch.bincount(of, weights=values)[of]  # of the sample's group or tie

    negative, in_same_tie = 1 - click, sums(1 - click, in_tie)
    positives, negatives = sums(click, in_group), sums(negative, in_group)
    first_of_tie = torch.searchsorted(in_tie, in_tie)
    first_of_group = torch.searchsorted(in_group, in_group)
    before = negative.cumsum(0) - negative
    below = before[first_of_tie] - before[first_of_group]
    counted = (positives > 0) & (negatives > 0)
    wins = click * (below + in_same_tie / 2)
    auc_by_size = (wins / (positives * negatives) * (positives + negatives))[counted].sum()
    return float(auc_by_size / counted.sum())


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


def binary_values(counts: BinaryCounts) -> dict[str, float]:
    """AUC, log loss, calibration and number of samples, and how many samples were not finite."""
    return {
        "auc": auc(counts),
        "log_loss": log_loss(counts),
        "calibration": calibration(counts),
        "num_samples": float(counts.sums[0]),
        "num_nonfinite": float(num_nonfinite(counts)),
    }


def num_nonfinite(counts: BinaryCounts) -> int:
    """Samples whose logit or loss was NaN or infinite."""
    return int(counts.sums[4])


def num_bad_labels(counts: BinaryCounts) -> int:
    """Samples whose label was below 0, above 1 or NaN. 0 where labels are not checked, see `recfx.step.train_step`."""
    check_type("counts", counts, BinaryCounts, OF_STATE)
    return int(counts.sums[5]) if counts.sums.numel() > 5 else 0
