"""Metrics that a step counts and the host reads: a metric is counts -> number."""

from recfx.metrics.binary import (
    BinaryCounts,
    Counts,
    Metric,
    auc,
    binary_metrics,
    binary_values,
    calibration,
    gauc,
    log_loss,
    num_bad_labels,
    num_nonfinite,
)

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
