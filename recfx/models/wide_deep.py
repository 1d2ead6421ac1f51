"""Wide & Deep: logit = b_wide + MLP(embeddings and numeric values), with b_wide the sum of first-order terms.

Crossed features belong to emb["bias"], see `recfx.features.cross`. Ref: Cheng et al. 2016, arXiv:1606.07792.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recfx.context import Context
from recfx.layers import Norm, deep, init_mlp
from recfx.models.inputs import Embeddings, Features, Result, first_order, flat, init_numeric, with_stats
from recfx.types import Params

__all__ = ["WideDeepConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class WideDeepConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`, MLP layers `hidden`."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    hidden: tuple[int, ...] = (64, 16)
    norm: Norm | None = None


def init(config: WideDeepConfig, generator: torch.Generator) -> Result:
    """Dense parameters numeric_bias f32 [N, 1] and dnn.<i>, see `recfx.layers.init_mlp`; statistics of batch norm."""
    num_in = config.num_sparse * config.dim + config.num_numeric
    dnn, stats = init_mlp("dnn", [num_in, *config.hidden, 1], generator, norm=config.norm)
    return with_stats({**init_numeric(config.num_numeric, None, generator), **dnn}, stats)


def forward(
    params: Params, emb: Embeddings, feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Result:
    """Logit f32 [B, 1]; with batch norm, (logit, statistics).

    Shapes:   emb["emb"] f32 [B, F, D], emb["bias"] f32 [B, F', 1] and feats["numeric"] f32 [B, N].
    """
    x = flat(emb, feats, len(params["dnn.0.weight"]))
    logit, stats = deep(params, "dnn", x, context, dropout=dropout)
    return with_stats(first_order(params, emb, feats) + logit, stats)
