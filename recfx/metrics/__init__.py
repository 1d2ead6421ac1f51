"""Metrics that a step counts and the host reads: a metric is counts -> number."""

from recfx.metrics.binary import (
    BinaryCounts,
    Metric,
    auc,
    binary_metrics,
    calibration,
    gauc,
    log_loss,
    num_bad_labels,
    num_nonfinite,
)

__all__ = [
    "BinaryCounts",
    "Metric",
    "auc",
    "binary_metrics",
    "calibration",
    "gauc",
    "log_loss",
    "num_bad_labels",
    "num_nonfinite",
]
