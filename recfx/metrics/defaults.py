"""What is counted of a task that does not say it."""

from __future__ import annotations

from typing import Any

from recfx.losses import Bpr, InBatchSoftmax, poisson, squared_error
from recfx.metrics.binary import Metric, binary_metrics
from recfx.metrics.regression import regression_metrics
from recfx.metrics.retrieval import retrieval_metrics

__all__ = ["metric_of"]


def metric_of(loss: Any) -> Metric:
    """The metrics that fit a loss: of numbers, of retrieval in the batch, or else of clicks.

    Args:     loss: of `recfx.losses`, or a user's: that has `recfx.metrics.binary_metrics`.
    """
    if loss is squared_error or loss is poisson:
        return regression_metrics("exp" if loss is poisson else "identity")
    if isinstance(loss, Bpr | InBatchSoftmax):
        return retrieval_metrics(item=loss.item)
    return binary_metrics()
