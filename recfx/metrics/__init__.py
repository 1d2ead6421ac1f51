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
from recfx.metrics.defaults import metric_of
from recfx.metrics.regression import RegressionCounts, regression_metrics
from recfx.metrics.retrieval import RetrievalCounts, retrieval_metrics

__all__ = [
    "BinaryCounts",
    "Counts",
    "Metric",
    "RegressionCounts",
    "RetrievalCounts",
    "auc",
    "binary_metrics",
    "binary_values",
    "calibration",
    "gauc",
    "log_loss",
    "metric_of",
    "num_bad_labels",
    "num_nonfinite",
    "regression_metrics",
    "retrieval_metrics",
]
