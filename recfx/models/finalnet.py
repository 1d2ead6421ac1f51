"""FinalNet: blocks of factorised interaction layers, each of which doubles the degree of the polynomial.

    layer(x) = ReLU(norm(h + (W1 x + b1) * h)), h = W2 x + b2
    logit = mean over blocks of w_k block_k(gate_k * x) + b_k

With two blocks, each has gates as FinalMLP has, and the logit is their mean. The paper also trains each block on the
prediction of the mean; that loss is not part of `forward`. Ref: Zhu et al. 2023, "FINAL: factorized interaction layer
for CTR prediction", SIGIR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.layers import Norm, gated, init_gate, init_linear, init_norm, linear, normed
from recfx.models.inputs import Embeddings, Features, Result, flat, with_stats
from recfx.types import Params

__all__ = ["FinalNetConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class FinalNetConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; layers of each block; `gate`
    units of the gates' MLP, from a context of `context` numbers, 0: no gates."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    blocks: tuple[tuple[int, ...], ...] = ((64, 32), (64, 32))
    gate: int = 32
    context: int = 8
    norm: Norm | None = "layer"


def init(config: FinalNetConfig, generator: torch.Generator) -> Result:
    """Dense parameters block.<k>.<i> of [in, 2 out] with .layer_norm or .batch_norm, gate.<k>, out.<k>; statistics of
    batch norm."""
    num_in = config.num_sparse * config.dim + config.num_numeric
    params: Params = {}
    stats: Stats = {}
    for k, hidden in enumerate(config.blocks):
        size = num_in
        for i, out in enumerate(hidden):
            of_layer = f"block.{k}.{i}"
            params[f"{of_layer}.weight"], params[f"{of_layer}.bias"] = init_linear(size, 2 * out, generator)
            if config.norm:
                of_norm, kept = init_norm(of_layer, out, config.norm)
                params, stats = params | of_norm, stats | kept
            size = out
        if config.gate and len(config.blocks) > 1:
            params |= init_gate(f"gate.{k}", config.context, config.gate, num_in, generator)
        params[f"out.{k}.weight"], params[f"out.{k}.bias"] = init_linear(size, 1, generator)
    return with_stats(params, stats)


def forward(
    params: Params, emb: Embeddings, feats: Features, context: Context | None = None, *, dropout: float = 0.0
) -> Result:
    """Logit f32 [B, 1]; with batch norm, (logit, statistics).

    Shapes:   emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N].
    """
    x = flat(emb, feats, len(params["block.0.0.weight"]))
    logits: list[Tensor] = []
    stats: Stats = {}
    while f"out.{len(logits)}.weight" in params:
        i, k = 0, len(logits)
        of_block = gated(params, f"gate.{k}", x)
        while f"block.{k}.{i}.weight" in params:
            of_block, new = _layer(params, f"block.{k}.{i}", of_block, context, dropout)
            stats, i = stats | new, i + 1
        logits.append(linear(params, f"out.{k}", of_block))
    return with_stats(torch.stack(logits).mean(0) if len(logits) > 1 else logits[0], stats)


def _layer(params: Params, name: str, x: Tensor, context: Context | None, dropout: float) -> tuple[Tensor, Stats]:
    first, second = linear(params, name, x).chunk(2, dim=1)
    x, stats = normed(params, name, second + first * second, context)
    x = torch.relu(x)
    return x if context is None else context.dropout(x, dropout, f"{name}.dropout"), stats
