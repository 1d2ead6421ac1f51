"""ESMM: clicks, and purchases after a click, trained on all impressions.

    p(click) = sigmoid(a),  p(buy) = p(click) p(buy | click) = sigmoid(a) sigmoid(b),  a, b = two MLPs of x

The logit of p(buy) is -log(exp(-a) + exp(-b) + exp(-a - b)), so that `bce_with_logits` trains it. Ref: Ma et al. 2018,
arXiv:1804.07931.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import init_mlp, mlp
from recfx.models.inputs import Embeddings, Features, flat
from recfx.types import Params

__all__ = ["ESMMConfig", "forward", "init", "logit_of_product"]


@dataclass(frozen=True, kw_only=True)
class ESMMConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; layers of the two MLPs."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    hidden: tuple[int, ...] = (64, 16)


def init(config: ESMMConfig, generator: torch.Generator) -> Params:
    """Dense parameters click.<i> and after_click.<i>, see `recfx.layers.init_mlp`."""
    num_in = config.num_sparse * config.dim + config.num_numeric
    first, _ = init_mlp("click", [num_in, *config.hidden, 1], generator)
    return {**first, **init_mlp("after_click", [num_in, *config.hidden, 1], generator)[0]}


def forward(params: Params, emb: Embeddings, feats: Features) -> dict[str, Tensor]:
    """Logits f32 [B, 1] of "click" and "buy", from emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N]."""
    x = flat(emb, feats, len(params["click.0.weight"]))
    click = mlp(params, "click", x)
    return {"click": click, "buy": logit_of_product(click, mlp(params, "after_click", x))}


def logit_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) sigmoid(b), also far from 0.

    Example:  >>> torch.sigmoid(logit_of_product(torch.tensor(0.0), torch.tensor(0.0)))
              tensor(0.2500)
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), dim=0)
