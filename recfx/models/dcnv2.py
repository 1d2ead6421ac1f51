"""DCN-v2: cross layers and an MLP, both over all inputs end to end, and a linear layer over the two.

    x_0 = embeddings, numeric values;  x_(l+1) = x_0 * (W_l x_l + b_l) + x_l;  logit = w (x_L, MLP(x_0)) + b

With a rank, W_l is a mixture of low-rank matrices, see `recfx.layers.cross`. Ref: Wang et al. 2021, arXiv:2008.13535.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recfx.context import Context, Stats
from recfx.layers import Norm, cross, deep, init_cross, init_linear, init_mlp, linear
from recfx.models.inputs import Embeddings, Features, Result, flat, with_stats
from recfx.types import Params

__all__ = ["DCNv2Config", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class DCNv2Config:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`, `num_cross` cross layers, MLP
    layers `hidden`, of which the last one is joined with the cross layers.

    Args:     rank: of the low-rank mixture of `experts`; None: full matrices.
    """

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    num_cross: int = 3
    rank: int | None = None
    experts: int = 4
    hidden: tuple[int, ...] = (64, 16)
    norm: Norm | None = None


def init(config: DCNv2Config, generator: torch.Generator) -> Result:
    """Dense parameters cross.<i>, dnn.<i> and out, see `recfx.layers`; statistics of batch norm."""
    num_in = config.num_sparse * config.dim + config.num_numeric
    params = init_cross("cross", num_in, config.num_cross, generator, rank=config.rank, experts=config.experts)
    dnn, stats = init_mlp("dnn", [num_in, *config.hidden], generator, norm=config.norm)
    num_joined = num_in + config.hidden[-1] if config.hidden else num_in
    params["out.weight"], params["out.bias"] = init_linear(num_joined, 1, generator)
    return with_stats({**params, **dnn}, stats)


def forward(
    params: Params, emb: Embeddings, feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Result:
    """Logit f32 [B, 1]; with batch norm, (logit, statistics).

    Shapes:   emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N].
    """
    x = flat(emb, feats, len(params["cross.0.bias"]))
    stats: Stats = {}
    parts = [cross(params, "cross", x)]
    if "dnn.0.weight" in params:
        hidden, stats = deep(params, "dnn", x, context, dropout=dropout)
        parts.append(torch.relu(hidden))
    return with_stats(linear(params, "out", torch.cat(parts, dim=1)), stats)
