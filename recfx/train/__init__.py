"""The loop around a step: epochs, logging, evaluation, checkpoints, signals, and errors on labels and NaN."""

from recfx.train.evaluation import evaluate, read_metrics, reset_metrics_
from recfx.train.labels import check_labels
from recfx.train.loop import train
from recfx.train.nonfinite import check_finite
from recfx.train.output import check_output
from recfx.train.progress import Event, Progress, Reader, TrainConfig

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
