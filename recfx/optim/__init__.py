"""Optimisers as functions: of dense parameters (`adamw`), and of the rows that a step touched (`sparse_adamw`)."""

from recfx.optim.adagrad_family import AdagradState, adagrad, sparse_adagrad, sparse_rowwise_adagrad
from recfx.optim.adam_family import (
    AdamState,
    adam,
    adam_recis,
    adamw,
    adamw_recis,
    adamw_tf,
    sparse_adam,
    sparse_adam_recis,
    sparse_adamw,
    sparse_adamw_recis,
    sparse_adamw_tf,
)
from recfx.optim.building import DenseOptimizer, Rate, Schedule, SparseOptimizer
from recfx.optim.clipping import clip_global_norm, clip_value, sparse_clip_row_norm, sparse_clip_value
from recfx.optim.from_torch import sparse_optimizer
from recfx.optim.ftrl_proximal import sparse_ftrl
from recfx.optim.gradient_descent import SgdState, sgd, sparse_sgd

__all__ = [
    "AdagradState",
    "AdamState",
    "DenseOptimizer",
    "Rate",
    "Schedule",
    "SgdState",
    "SparseOptimizer",
    "adagrad",
    "adam",
    "adam_recis",
    "adamw",
    "adamw_recis",
    "adamw_tf",
    "clip_global_norm",
    "clip_value",
    "sgd",
    "sparse_adagrad",
    "sparse_adam",
    "sparse_adam_recis",
    "sparse_adamw",
    "sparse_adamw_recis",
    "sparse_adamw_tf",
    "sparse_clip_row_norm",
    "sparse_clip_value",
    "sparse_ftrl",
    "sparse_optimizer",
    "sparse_rowwise_adagrad",
    "sparse_sgd",
]
