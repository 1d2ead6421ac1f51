"""DLRM: an MLP of the numeric values, its inner products with the embeddings and theirs with each other, an MLP.

    z = MLP_bottom(numeric);  logit = MLP_top(z, <v_f, v_g> for each pair of z and the embeddings)

Ref: Naumov et al. 2019, arXiv:1906.00091.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import init_mlp, mlp, pairs
from recfx.models.inputs import Embeddings, Features
from recfx.types import Params

__all__ = ["DLRMConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`, layers of the two MLPs."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    bottom: tuple[int, ...] = (32,)
    top: tuple[int, ...] = (64, 16)


def init(config: DLRMConfig, generator: torch.Generator) -> Params:
    """Dense parameters bottom.<i> where there are numeric features, and top.<i>, see `recfx.layers.init_mlp`."""
    params: Params = {}
    num = config.num_sparse
    if config.num_numeric:
        params, _ = init_mlp("bottom", [config.num_numeric, *config.bottom, config.dim], generator)
        num += 1
    num_in = num * (num - 1) // 2 + (config.dim if config.num_numeric else 0)
    return {**params, **init_mlp("top", [num_in, *config.top, 1], generator)[0]}


def forward(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """Logit f32 [B, 1] from emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N]."""
    if "bottom.0.weight" not in params:
        return mlp(params, "top", pairs(emb["emb"]))
    bottom = torch.relu(mlp(params, "bottom", feats["numeric"]))
    products = pairs(torch.cat([bottom[:, None], emb["emb"]], dim=1))
    return mlp(params, "top", torch.cat([bottom, products], dim=1))
