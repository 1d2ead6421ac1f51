"""AutoInt: layers of self-attention over the fields, and a linear layer; optionally an MLP next to them.

    logit = w (attention layers of the fields) + b + MLP(fields)

Numeric values are fields too: the value times an embedding. Ref: Song et al. 2019, arXiv:1810.11921.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recfx.context import Context
from recfx.layers import Norm, deep, field_attention, init_field_attention, init_linear, init_mlp, linear
from recfx.models.inputs import Embeddings, Features, Result, fields, init_numeric, with_stats
from recfx.types import Params

__all__ = ["AutoIntConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class AutoIntConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; `num_layers` of attention with
    `heads` heads of `width`; MLP layers `hidden`, () for none."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    num_layers: int = 2
    heads: int = 2
    width: int = 8
    hidden: tuple[int, ...] = ()
    norm: Norm | None = None


def init(config: AutoIntConfig, generator: torch.Generator) -> Result:
    """Dense parameters numeric_emb f32 [N, D], attention.<i>, out and dnn.<i>, see `recfx.layers`."""
    num_fields = config.num_sparse + config.num_numeric
    params = init_numeric(config.num_numeric, config.dim, generator, bias=False)
    width = config.dim
    for i in range(config.num_layers):
        params |= init_field_attention(f"attention.{i}", width, config.heads, config.width, generator)
        width = config.heads * config.width
    params["out.weight"], params["out.bias"] = init_linear(num_fields * width, 1, generator)
    if not config.hidden:
        return params
    dnn, stats = init_mlp("dnn", [num_fields * config.dim, *config.hidden, 1], generator, norm=config.norm)
    return with_stats({**params, **dnn}, stats)


def forward(
    params: Params, emb: Embeddings, feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Result:
    """Logit f32 [B, 1]; with batch norm, (logit, statistics).

    Shapes:   emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N].
    """
    x = fields_BFD = fields(params, emb, feats)
    i = 0
    while f"attention.{i}.query" in params:
        x, i = field_attention(params, f"attention.{i}", x), i + 1
    logit = linear(params, "out", x.flatten(1))
    if "dnn.0.weight" not in params:
        return logit
    beside, stats = deep(params, "dnn", fields_BFD.flatten(1), context, dropout=dropout)
    return with_stats(logit + beside, stats)
