"""What models make of their inputs: embeddings of sparse features and numeric values, as fields or end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recfx.context import Stats
from recfx.types import Params

__all__ = [
    "Embeddings",
    "Features",
    "Result",
    "fields",
    "first_order",
    "flat",
    "init_numeric",
    "tasks_in",
    "with_stats",
]

Embeddings = Mapping[str, Tensor]
Features = Mapping[str, Any]
Result = Any  # what it is without statistics; else with them, as a pair
STD = 0.001


def init_numeric(num_numeric: int, dim: int | None, generator: torch.Generator, *, bias: bool = True) -> Params:
    """Parameters of numeric features; none where there are none.

    Args:     dim: of their embeddings; None: no embeddings.  bias: whether they have a first-order weight.
    Shapes:   numeric_emb f32 [N, D], numeric_bias f32 [N, 1].
    """
    params: Params = {}
    if num_numeric and dim is not None:
        params["numeric_emb"] = torch.randn(num_numeric, dim, generator=generator) * STD
    if num_numeric and bias:
        params["numeric_bias"] = torch.randn(num_numeric, 1, generator=generator) * STD
    return params


def first_order(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """[B, 1]: the sum of emb["bias"] f32 [B, F, 1] and of each numeric value times its weight."""
    total = emb["bias"].sum(1)
    return total + feats["numeric"] @ params["numeric_bias"] if "numeric_bias" in params else total


def fields(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """[B, F + N, D]: emb["emb"] f32 [B, F, D], then each numeric value times its embedding."""
    if "numeric_emb" not in params:
        return emb["emb"]
    return torch.cat([emb["emb"], feats["numeric"][:, :, None] * params["numeric_emb"]], dim=1)


def flat(emb: Embeddings, feats: Features, num_in: int) -> Tensor:
    """[B, num_in]: emb["emb"] end to end, then the numeric values where num_in has room for them.

    Args:     num_in: F D, or F D + N.
    """
    embedded = emb["emb"].flatten(1)
    return embedded if embedded.shape[1] == num_in else torch.cat([embedded, feats["numeric"]], dim=1)


def with_stats(result: Any, stats: Stats) -> Result:
    """(result, stats), or the result alone where a model has no statistics."""
    return (result, stats) if stats else result


def tasks_in(params: Params) -> list[str]:
    """The tasks that have parameters task.<name>.<i>, in their order."""
    return list(
        dict.fromkeys(name.removeprefix("task.").rsplit(".", 2)[0] for name in params if name.startswith("task."))
    )
