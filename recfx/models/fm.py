"""Factorisation machine: logit = b + sum_f w_f b_f + sum over f < g of w_f w_g <v_f, v_g>.

v_f, b_f are rows of sparse features (w_f = 1) or parameters of numeric ones (w_f their value). Ref: Rendle 2010,
"Factorization machines", ICDM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import fm
from recfx.models.inputs import Embeddings, Features, fields, first_order, init_numeric
from recfx.types import Params

__all__ = ["FMConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class FMConfig:
    """Sizes: `num_numeric` numeric features, embeddings of width `dim`."""

    num_numeric: int = 0
    dim: int = 8


def init(config: FMConfig, generator: torch.Generator) -> Params:
    """Dense parameters: bias f32 [1], numeric_emb f32 [N, D], numeric_bias f32 [N, 1]."""
    return {"bias": torch.zeros(1), **init_numeric(config.num_numeric, config.dim, generator)}


def forward(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """Logit f32 [B, 1] from emb["emb"] f32 [B, F, D], emb["bias"] f32 [B, F, 1] and feats["numeric"] f32 [B, N]."""
    return params["bias"] + first_order(params, emb, feats) + fm(fields(params, emb, feats))
