"""Logistic regression: logit = b + sum_f b_f + sum_n w_n x_n.

b_f is the bias of the sparse feature's id, a table row of width 1, and x_n a numeric value. With FTRL for the
rows, the model of McMahan et al. 2013, "Ad click prediction: a view from the trenches", KDD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.models.inputs import Embeddings, Features, first_order, init_numeric
from recfx.types import Params

__all__ = ["LRConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class LRConfig:
    """Sizes: `num_numeric` numeric features."""

    num_numeric: int = 0


def init(config: LRConfig, generator: torch.Generator) -> Params:
    """Dense parameters: bias f32 [1], numeric_bias f32 [N, 1]."""
    return {"bias": torch.zeros(1), **init_numeric(config.num_numeric, None, generator)}


def forward(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """Logit f32 [B, 1] from emb["bias"] f32 [B, F, 1] and feats["numeric"] f32 [B, N]."""
    return first_order(params, emb, feats) + params["bias"]
