"""FinalMLP: two MLPs over the inputs, each through its gates, fused by a bilinear form in parts.

    gate_k = 2 sigmoid(MLP(c_k));  o_k = MLP_k(gate_k * x);  logit = b + w_1 o_1 + w_2 o_2 + sum_h o_1h W_h o_2h

c_k is a parameter, o_kh the h-th part of o_k. Ref: Mao et al. 2023, arXiv:2304.00902.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.layers import Norm, deep, gated, init_gate, init_linear, init_mlp
from recfx.models.inputs import Embeddings, Features, Result, flat, with_stats
from recfx.types import Params

__all__ = ["FinalMLPConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class FinalMLPConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; layers of the two MLPs, whose
    last ones `heads` divides; `gate` units of the gates' MLP, from a context of `context` numbers; 0: no gates."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    first: tuple[int, ...] = (64, 32)
    second: tuple[int, ...] = (64, 32)
    heads: int = 4
    gate: int = 32
    context: int = 8
    norm: Norm | None = None


def init(config: FinalMLPConfig, generator: torch.Generator) -> Result:
    """Dense parameters first.<i>, second.<i>, gate.<k>.<i>, gate.<k>.context, fuse.<k> f32 [n_k, 1], fuse.bilinear
    f32 [heads, n_1 / heads, n_2 / heads], bias f32 [1]; statistics of batch norm.

    Raises:   ValueError when the last layers are not multiples of heads.
    """
    num_in = config.num_sparse * config.dim + config.num_numeric
    params: Params = {"bias": torch.zeros(1)}
    stats: Stats = {}
    for name, hidden in (("first", config.first), ("second", config.second)):
        if not hidden or hidden[-1] % config.heads:
            raise ValueError(
                f"{name}: got {hidden}, expected a last layer that heads={config.heads} divides. It is fused in parts."
            )
        of_stream, of_norms = init_mlp(name, [num_in, *hidden], generator, norm=config.norm)
        params |= {**of_stream, f"fuse.{name}": init_linear(hidden[-1], 1, generator)[0]}
        stats |= of_norms
        if config.gate:
            params |= init_gate(f"gate.{name}", config.context, config.gate, num_in, generator)
    parts = config.first[-1] // config.heads, config.second[-1] // config.heads
    bilinear = [init_linear(*parts, generator)[0] for _ in range(config.heads)]
    return with_stats({**params, "fuse.bilinear": torch.stack(bilinear)}, stats)


def forward(
    params: Params, emb: Embeddings, feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Result:
    """Logit f32 [B, 1]; with batch norm, (logit, statistics).

    Shapes:   emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N].
    """
    x = flat(emb, feats, len(params["first.0.weight"]))
    outputs: list[Tensor] = []
    stats: Stats = {}
    for name in ("first", "second"):
        output, new = deep(params, name, gated(params, f"gate.{name}", x), context, dropout=dropout)
        outputs.append(torch.relu(output))
        stats |= new
    first, second = outputs
    bilinear = params["fuse.bilinear"]
    heads = len(bilinear)
    mixed = torch.einsum("bhi,hij->bhj", first.unflatten(1, (heads, -1)), bilinear)
    fused = (mixed * second.unflatten(1, (heads, -1))).sum((1, 2))[:, None]
    return with_stats(params["bias"] + first @ params["fuse.first"] + second @ params["fuse.second"] + fused, stats)
