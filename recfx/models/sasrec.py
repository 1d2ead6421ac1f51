"""SASRec: causal self-attention over the last items of a history; what comes next is near its last output.

    x = rows + positions;  x = x + attention(LN x),  x = x + W2 ReLU(W1 LN x) in each layer;  logit = <LN x_last, t>

Position p sees the positions up to p. The cost grows with the square of `length`, which is declared: longer lists lose
their first items. Ref: Kang, McAuley 2018, arXiv:1808.09781.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recfx.context import Context
from recfx.layers import init_linear, init_norm, layer_norm, linear
from recfx.models.inputs import Features
from recfx.ragged import last
from recfx.types import Params, Ragged

__all__ = ["SASRecConfig", "encode", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """Sizes: embeddings of width `dim`, of the last `length` items; `num_layers` layers with `heads` heads and `hidden`
    units.

    Raises:   ValueError when heads does not divide dim.
    """

    dim: int = 32
    length: int = 50
    num_layers: int = 2
    heads: int = 2
    hidden: int = 64

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}, expected a multiple of heads={self.heads}. Each head has a part.")


def init(config: SASRecConfig, generator: torch.Generator) -> Params:
    """Dense parameters positions f32 [length, D], and for each layer <l>.attention.query, .key, .value f32
    [D, heads, D / heads], <l>.out, <l>.up, <l>.down and norms."""
    dim = config.dim
    params = {"positions": torch.randn(config.length, dim, generator=generator) * 0.02}
    for i in range(config.num_layers):
        for part in ("query", "key", "value"):
            weight, _ = init_linear(dim, dim, generator)
            params[f"layer.{i}.attention.{part}"] = weight.view(dim, config.heads, dim // config.heads)
        for part, (n, m) in {"out": (dim, dim), "up": (dim, config.hidden), "down": (config.hidden, dim)}.items():
            name = f"layer.{i}.{part}"
            params[f"{name}.weight"], params[f"{name}.bias"] = init_linear(n, m, generator)
        params |= init_norm(f"layer.{i}.attention", dim, "layer")[0] | init_norm(f"layer.{i}.up", dim, "layer")[0]
    return {**params, **init_norm("last", dim, "layer")[0]}


def forward(
    params: Params, emb: Mapping[str, Any], feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Logit f32 [B, 1] of the item emb["target"] f32 [B, 1, D] after emb["history"], Ragged of f32 [P, D]."""
    encoded, there = encode(params, emb["history"], context, dropout=dropout)
    at = (there.sum(1) - 1).clamp(min=0)
    of_last = encoded.gather(1, at[:, None, None].expand(-1, 1, encoded.shape[2]))[:, 0]
    of_last = torch.where(there.any(1, keepdim=True), of_last, 0.0)
    return (of_last * emb["target"][:, 0]).sum(1, keepdim=True)


def encode(
    params: Params, history: Ragged, context: Context | None = None, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What each of the last items stands for after those before it.

    Returns:  f32 [B, length, D], and which places hold an item, bool [B, length]: the first ones.
    """
    rows, there = last(history, len(params["positions"]))
    x = torch.where(there[:, :, None], rows * math.sqrt(rows.shape[2]) + params["positions"], 0.0)
    x = _dropped(x, dropout, "positions", context)
    i = 0
    while f"layer.{i}.out.weight" in params:
        name = f"layer.{i}"
        x = x + _dropped(_attention(params, name, layer_norm(params, f"{name}.attention.layer_norm", x), there),
                         dropout, f"{name}.attention", context)  # fmt: skip
        inner = torch.relu(linear(params, f"{name}.up", layer_norm(params, f"{name}.up.layer_norm", x)))
        x = x + _dropped(linear(params, f"{name}.down", inner), dropout, f"{name}.down", context)
        i += 1
    return layer_norm(params, "last.layer_norm", x), there


def _attention(params: Params, name: str, x: Tensor, there: Tensor) -> Tensor:
    """Each place attends to the places up to it that hold an item."""
    query, key, value = (
        torch.einsum("bnd,dhw->bhnw", x, params[f"{name}.attention.{part}"]) for part in ("query", "key", "value")
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    places = torch.arange(x.shape[1], device=x.device)
    may = (places <= places[:, None]) & there[:, None, None, :]
    weights = scores.masked_fill(~may, -1e9).softmax(3)  # not -inf: a place of padding sees nothing
    return linear(params, f"{name}.out", (weights @ value).transpose(1, 2).flatten(2))


def _dropped(x: Tensor, dropout: float, name: str, context: Context | None) -> Tensor:
    return x if context is None else context.dropout(x, dropout, name)
