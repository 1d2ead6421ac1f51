"""The loop around a step: epochs, logging, evaluation, checkpoints, signals, and what it finds when numbers are bad."""

from recfx.train.loop import (
    Event,
    Progress,
    Reader,
    TrainConfig,
    check_finite,
    check_labels,
    check_output,
    evaluate,
    read_metrics,
    reset_metrics_,
    train,
)

__all__ = [
    "Event",
    "Progress",
    "Reader",
    "TrainConfig",
    "check_finite",
    "check_labels",
    "check_output",
    "evaluate",
    "read_metrics",
    "reset_metrics_",
    "train",
]
