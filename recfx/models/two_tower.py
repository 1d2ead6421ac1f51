"""Two towers: an MLP of the query and an MLP of the item, both of length 1, for `recfx.losses.in_batch_softmax`.

    query = MLP_q(fields of the query) / |.|,  item = MLP_i(fields of the item) / |.|,  score = <query, item>

Ref: Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from recfx.layers import init_mlp, mlp
from recfx.models.inputs import Embeddings, Features
from recfx.types import Params

__all__ = ["TwoTowerConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Sizes: sparse features of width `dim` of the query and of the item, `num_numeric` numeric ones of the query;
    layers of the towers, and the width of what they give."""

    num_query: int
    num_item: int
    num_numeric: int = 0
    dim: int = 8
    hidden: tuple[int, ...] = (64,)
    width: int = 32


def init(config: TwoTowerConfig, generator: torch.Generator) -> Params:
    """Dense parameters query.<i> and item.<i>, see `recfx.layers.init_mlp`."""
    num_in = config.num_query * config.dim + config.num_numeric
    query, _ = init_mlp("query", [num_in, *config.hidden, config.width], generator)
    return {**query, **init_mlp("item", [config.num_item * config.dim, *config.hidden, config.width], generator)[0]}


def forward(params: Params, emb: Embeddings, feats: Features) -> dict[str, Tensor]:
    """{"query": f32 [B, width], "item": f32 [B, width]} from emb["query"] f32 [B, F, D], emb["item"] f32 [B, F', D] and
    feats["numeric"] f32 [B, N]."""
    x = emb["query"].flatten(1)
    x = x if x.shape[1] == len(params["query.0.weight"]) else torch.cat([x, feats["numeric"]], dim=1)
    query, item = mlp(params, "query", x), mlp(params, "item", emb["item"].flatten(1))
    return {"query": normalize(query, dim=1), "item": normalize(item, dim=1)}
