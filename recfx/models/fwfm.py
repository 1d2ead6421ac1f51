"""Field-weighted factorisation machine: logit = b + sum_f w_f b_f + sum over f < g of r_fg <v_f, v_g>.

r_fg is a weight for each pair of fields. Ref: Pan et al. 2018, arXiv:1806.03514.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.models.inputs import Embeddings, Features, fields, first_order, init_numeric
from recfx.types import Params

__all__ = ["FwFMConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class FwFMConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8


def init(config: FwFMConfig, generator: torch.Generator) -> Params:
    """Dense parameters: bias f32 [1], pairs f32 [F + N, F + N] above its diagonal, numeric_emb, numeric_bias."""
    num = config.num_sparse + config.num_numeric
    return {
        "bias": torch.zeros(1),
        "pairs": torch.ones(num, num).triu(1),
        **init_numeric(config.num_numeric, config.dim, generator),
    }


def forward(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """Logit f32 [B, 1] from emb["emb"] f32 [B, F, D], emb["bias"] f32 [B, F, 1] and feats["numeric"] f32 [B, N]."""
    fields_BFD = fields(params, emb, feats)
    mixed = params["pairs"].triu(1) @ fields_BFD
    return params["bias"] + first_order(params, emb, feats) + (fields_BFD * mixed).sum((1, 2))[:, None]
