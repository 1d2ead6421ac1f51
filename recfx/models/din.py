"""DIN: the history of a user, summed with weights that the item in question gives each of its items.

    w_p = MLP(h_p, t, h_p - t, h_p * t),  u = sum over the history of w_p h_p,  logit = MLP(x, t, u)

with t the row of the item, h_p that of an item of the history, x the other inputs. The weights are not normalised. The
cost is that of the items there are, however unequal the lists. Ref: Zhou et al. 2018, arXiv:1706.06978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.layers import Norm, deep, dice, init_dice, init_mlp, init_prelu, linear, prelu
from recfx.models.inputs import Features, Result, with_stats
from recfx.ragged import is_there, segment_sum, spread
from recfx.types import Params, Ragged

__all__ = ["DINConfig", "attended", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class DINConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` other sparse ones of width `dim`; units of the attention
    and their activation, and layers of the MLP. "dice" keeps statistics, see `recfx.layers.dice`."""

    num_sparse: int = 0
    num_numeric: int = 0
    dim: int = 8
    attention: int = 16
    activation: Literal["prelu", "dice"] = "prelu"
    hidden: tuple[int, ...] = (64, 16)
    norm: Norm | None = None


def init(config: DINConfig, generator: torch.Generator) -> Result:
    """Dense parameters attention.0, attention.0.slope, attention.1 and dnn.<i>; statistics of Dice and batch norm."""
    params, _ = init_mlp("attention", [4 * config.dim, config.attention, 1], generator)
    of_dice: Stats = {}
    if config.activation == "dice":
        slope, of_dice = init_dice("attention.0", config.attention)
    else:
        slope = init_prelu("attention.0", config.attention)
    num_in = (config.num_sparse + 2) * config.dim + config.num_numeric
    dnn, stats = init_mlp("dnn", [num_in, *config.hidden, 1], generator, norm=config.norm)
    return with_stats({**params, **slope, **dnn}, of_dice | stats)


def forward(
    params: Params, emb: Mapping[str, Any], feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Result:
    """Logit f32 [B, 1]; with Dice or batch norm, (logit, statistics).

    Shapes:   emb["target"] f32 [B, 1, D], emb["history"] Ragged of f32 [P, D], which `combiner=None` gives; emb["emb"]
              f32 [B, F, D] and feats["numeric"] f32 [B, N] where there are such.
    """
    target = emb["target"][:, 0]
    user, of_dice = attended(params, emb["history"], target, context)
    parts = [target, user]
    num_in = len(params["dnn.0.weight"]) - 2 * target.shape[1]
    if num_in:
        others = emb["emb"].flatten(1) if "emb" in emb else target[:, :0]
        parts += [others] if others.shape[1] == num_in else [others, feats["numeric"]]
    logit, stats = deep(params, "dnn", torch.cat(parts, dim=1), context, dropout=dropout)
    return with_stats(logit, of_dice | stats)


def attended(params: Params, history: Ragged, target: Tensor, context: Context | None = None) -> tuple[Tensor, Stats]:
    """The weighted sum of each history, f32 [B, D], zeros for an empty one; the new statistics of Dice.

    Args:     target: f32 [B, D].
    """
    rows, offsets = history.values, history.offsets
    of_target = spread(target, offsets, len(rows))
    both = torch.cat([rows, of_target, rows - of_target, rows * of_target], dim=1)
    stats: Stats = {}
    hidden = linear(params, "attention.0", both)
    if "attention.0.slope" in params:
        hidden = prelu(params, "attention.0", hidden)
    else:
        hidden, stats = dice(params, "attention.0", hidden, is_there(offsets, len(rows))[:, None], context)
    return segment_sum(rows * linear(params, "attention.1", hidden), offsets), stats
