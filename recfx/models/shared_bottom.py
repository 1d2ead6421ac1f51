"""Shared bottom: one MLP for all tasks, and an MLP for each task on what it gives.

    logit_t = MLP_t(ReLU(MLP(x)))

Ref: Caruana 1997, "Multitask learning", Machine Learning 28.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import init_mlp, mlp
from recfx.models.inputs import Embeddings, Features, flat, tasks_in
from recfx.types import Params

__all__ = ["SharedBottomConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class SharedBottomConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; layers that are shared, and of
    each task."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    tasks: tuple[str, ...] = ("click", "buy")
    shared: tuple[int, ...] = (64, 32)
    hidden: tuple[int, ...] = (16,)


def init(config: SharedBottomConfig, generator: torch.Generator) -> Params:
    """Dense parameters shared.<i> and task.<name>.<i>, see `recfx.layers.init_mlp`."""
    num_in = config.num_sparse * config.dim + config.num_numeric
    params, _ = init_mlp("shared", [num_in, *config.shared], generator)
    for task in config.tasks:
        params |= init_mlp(f"task.{task}", [config.shared[-1], *config.hidden, 1], generator)[0]
    return params


def forward(params: Params, emb: Embeddings, feats: Features) -> dict[str, Tensor]:
    """Logits f32 [B, 1] by task, from emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N]."""
    x = torch.relu(mlp(params, "shared", flat(emb, feats, len(params["shared.0.weight"]))))
    return {task: mlp(params, f"task.{task}", x) for task in tasks_in(params)}
