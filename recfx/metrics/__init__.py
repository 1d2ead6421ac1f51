"""Metrics that a step counts and the host reads: a metric is counts -> number."""

from recfx.metrics.binary import Counts, Metric, binary_metrics, binary_values
from recfx.metrics.counts import BinaryCounts, auc, calibration, log_loss, num_bad_labels, num_nonfinite
from recfx.metrics.curves import CalibrationBin, calibration_bins, ece, normalised_entropy, pr_auc
from recfx.metrics.defaults import metric_of
from recfx.metrics.grouped import GroupedAuc, gauc
from recfx.metrics.regression import RegressionCounts, regression_metrics
from recfx.metrics.retrieval import RetrievalCounts, retrieval_metrics
from recfx.metrics.slices import SlicedCounts, sliced_metrics

__all__ = [
    "BinaryCounts",
    "CalibrationBin",
    "Counts",
    "GroupedAuc",
    "Metric",
    "RegressionCounts",
    "RetrievalCounts",
    "SlicedCounts",
    "auc",
    "binary_metrics",
    "binary_values",
    "calibration",
    "calibration_bins",
    "ece",
    "gauc",
    "log_loss",
    "metric_of",
    "normalised_entropy",
    "num_bad_labels",
    "num_nonfinite",
    "pr_auc",
    "regression_metrics",
    "retrieval_metrics",
    "sliced_metrics",
]
