"""PLE: levels of experts, some of a task and some shared, mixed by gates between the levels.

    x_t' = sum over the task's experts and the shared ones of softmax(G_t x_t)_e expert_e(x),  logit_t = MLP_t(x_t)

A task's expert reads x_t, a shared one reads x_s, which a gate of all experts gives the next level. Ref: Tang et al.
2020, "Progressive layered extraction", RecSys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import init_linear, init_mlp, mlp
from recfx.models.inputs import Embeddings, Features, flat, tasks_in
from recfx.types import Params

__all__ = ["PLEConfig", "experts", "forward", "init", "init_experts", "mixed"]

SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class PLEConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; `num_levels` levels, each with
    `num_shared` shared experts and `num_own` of each task; layers of each of the experts, and of each task.

    Raises:   ValueError when a task is called "shared".
    """

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    tasks: tuple[str, ...] = ("click", "buy")
    num_levels: int = 2
    num_shared: int = 2
    num_own: int = 2
    expert: tuple[int, ...] = (64, 32)
    hidden: tuple[int, ...] = (16,)

    def __post_init__(self) -> None:
        if SHARED in self.tasks:
            raise ValueError(f"tasks: got '{SHARED}', expected another name. That is the name of the shared experts.")


def init(config: PLEConfig, generator: torch.Generator) -> Params:
    """Dense parameters level.<l>.<task or shared>.<e>.<i>, level.<l>.gate.<task or shared> and task.<name>.<i>."""
    size = config.num_sparse * config.dim + config.num_numeric
    num_all = config.num_shared + config.num_own * len(config.tasks)
    params: Params = {}
    for level in range(config.num_levels):
        name, is_last = f"level.{level}", level == config.num_levels - 1
        params |= init_experts(f"{name}.{SHARED}", size, config.expert, config.num_shared, generator)
        for task in config.tasks:
            params |= init_experts(f"{name}.{task}", size, config.expert, config.num_own, generator)
            params[f"{name}.gate.{task}"], _ = init_linear(size, config.num_own + config.num_shared, generator)
        if not is_last:
            params[f"{name}.gate.{SHARED}"], _ = init_linear(size, num_all, generator)
        size = config.expert[-1]
    for task in config.tasks:
        params |= init_mlp(f"task.{task}", [size, *config.hidden, 1], generator)[0]
    return params


def forward(params: Params, emb: Embeddings, feats: Features) -> dict[str, Tensor]:
    """Logits f32 [B, 1] by task, from emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N]."""
    tasks = tasks_in(params)
    x = flat(emb, feats, len(params[f"level.0.{SHARED}.0.0.weight"]))
    inputs = dict.fromkeys([*tasks, SHARED], x)
    level = 0
    while (name := f"level.{level}") and f"{name}.gate.{tasks[0]}" in params:
        found = {of: experts(params, f"{name}.{of}", inputs[of]) for of in inputs}
        new = {
            task: mixed(params[f"{name}.gate.{task}"], inputs[task], [*found[task], *found[SHARED]]) for task in tasks
        }
        if f"{name}.gate.{SHARED}" in params:
            all_of = [e for of in found.values() for e in of]
            new[SHARED] = mixed(params[f"{name}.gate.{SHARED}"], inputs[SHARED], all_of)
        inputs, level = new, level + 1
    return {task: mlp(params, f"task.{task}", inputs[task]) for task in tasks}


def init_experts(name: str, num_in: int, hidden: Sequence[int], num: int, generator: torch.Generator) -> Params:
    """The parameters of `num` MLPs, <name>.<e>.<i>."""
    params: Params = {}
    for e in range(num):
        params |= init_mlp(f"{name}.{e}", [num_in, *hidden], generator)[0]
    return params


def experts(params: Params, name: str, x: Tensor) -> list[Tensor]:
    """What each expert gives, f32 [B, n]; its last layer has a ReLU too."""
    found: list[Tensor] = []
    while f"{name}.{len(found)}.0.weight" in params:
        found.append(torch.relu(mlp(params, f"{name}.{len(found)}", x)))
    return found


def mixed(gate: Tensor, x: Tensor, of: Sequence[Tensor]) -> Tensor:
    """The sum of experts, weighted by the softmax of a gate f32 [in, E] of x f32 [B, in]."""
    weights = (x @ gate).softmax(1)
    return (torch.stack(list(of), dim=1) * weights[:, :, None]).sum(1)
