"""Losses per sample: of a sample by itself, or among the samples of its batch. The step masks padding and averages."""

from recfx.losses.frequencies import init_frequencies, update_frequencies
from recfx.losses.in_batch import Bpr, InBatchSoftmax, bpr, in_batch_softmax, item_ids
from recfx.losses.pointwise import bce_with_logits, focal, poisson, squared_error

__all__ = [
    "Bpr",
    "InBatchSoftmax",
    "bce_with_logits",
    "bpr",
    "focal",
    "in_batch_softmax",
    "init_frequencies",
    "item_ids",
    "poisson",
    "squared_error",
    "update_frequencies",
]
