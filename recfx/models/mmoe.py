"""MMoE: experts that all tasks share, mixed for each task by a gate.

    logit_t = MLP_t(sum over experts of softmax(G_t x)_e expert_e(x))

Ref: Ma et al. 2018, "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts", KDD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import init_linear, init_mlp, mlp
from recfx.models.inputs import Embeddings, Features, flat, tasks_in
from recfx.models.ple import experts, init_experts, mixed
from recfx.types import Params

__all__ = ["MMoEConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class MMoEConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; layers of each of the experts,
    and of each task."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    tasks: tuple[str, ...] = ("click", "buy")
    num_experts: int = 4
    expert: tuple[int, ...] = (64, 32)
    hidden: tuple[int, ...] = (16,)


def init(config: MMoEConfig, generator: torch.Generator) -> Params:
    """Dense parameters expert.<e>.<i>, gate.<task> f32 [in, E] and task.<name>.<i>."""
    num_in = config.num_sparse * config.dim + config.num_numeric
    params = init_experts("expert", num_in, config.expert, config.num_experts, generator)
    for task in config.tasks:
        params[f"gate.{task}"], _ = init_linear(num_in, config.num_experts, generator)
        params |= init_mlp(f"task.{task}", [config.expert[-1], *config.hidden, 1], generator)[0]
    return params


def forward(params: Params, emb: Embeddings, feats: Features) -> dict[str, Tensor]:
    """Logits f32 [B, 1] by task, from emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N]."""
    x = flat(emb, feats, len(params["expert.0.0.weight"]))
    shared = experts(params, "expert", x)
    return {task: mlp(params, f"task.{task}", mixed(params[f"gate.{task}"], x, shared)) for task in tasks_in(params)}
