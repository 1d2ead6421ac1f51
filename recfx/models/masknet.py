"""MaskNet: blocks whose input is multiplied by a mask that the sample's own embeddings give.

    mask_l = W2 ReLU(W1 v + b1) + b2;  block_l(x) = ReLU(LayerNorm(W (mask_l * x)))
    parallel: logit = MLP(block_1(LN v), block_2(LN v), ...);  serial: logit = w block_L(... block_1(LN v)) + b

v are the embeddings end to end, LN their layer norm field by field. Ref: Wang et al. 2021, arXiv:2102.07619.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recfx.layers import init_linear, init_mlp, layer_norm, linear, mlp
from recfx.models.inputs import Embeddings, Features, fields, init_numeric
from recfx.types import Params

__all__ = ["MaskNetConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class MaskNetConfig:
    """Sizes: `num_numeric` numeric features, `num_sparse` sparse ones of width `dim`; `num_blocks` blocks of `width`,
    masks through `reduction` times as many units as they have outputs; MLP layers `hidden` of the parallel form."""

    num_sparse: int
    num_numeric: int = 0
    dim: int = 8
    num_blocks: int = 2
    width: int = 64
    reduction: float = 0.5
    parallel: bool = True
    hidden: tuple[int, ...] = (64,)


def init(config: MaskNetConfig, generator: torch.Generator) -> Params:
    """Dense parameters numeric_emb, norm, block.<i>.mask.0, .mask.1, .dense, .norm, and dnn.<i> (parallel) or out.0."""
    num_in = (config.num_sparse + config.num_numeric) * config.dim
    params = init_numeric(config.num_numeric, config.dim, generator, bias=False)
    params |= {"norm.scale": torch.ones(config.dim), "norm.shift": torch.zeros(config.dim)}
    num_masked = num_in
    for i in range(config.num_blocks):
        mask, _ = init_mlp(
            f"block.{i}.mask", [num_in, max(1, int(num_masked * config.reduction)), num_masked], generator
        )
        weight, bias = init_linear(num_masked, config.width, generator)
        params |= {**mask, f"block.{i}.dense.weight": weight, f"block.{i}.dense.bias": bias}
        params |= {
            f"block.{i}.norm.scale": torch.ones(config.width),
            f"block.{i}.norm.shift": torch.zeros(config.width),
        }
        num_masked = num_in if config.parallel else config.width
    name, sizes = "out", [config.width, 1]
    if config.parallel:
        name, sizes = "dnn", [config.num_blocks * config.width, *config.hidden, 1]
    return {**params, **init_mlp(name, sizes, generator)[0]}


def forward(params: Params, emb: Embeddings, feats: Features) -> Tensor:
    """Logit f32 [B, 1] from emb["emb"] f32 [B, F, D] and feats["numeric"] f32 [B, N]."""
    fields_BFD = fields(params, emb, feats)
    v, x = fields_BFD.flatten(1), layer_norm(params, "norm", fields_BFD).flatten(1)
    if "out.0.weight" in params:
        for i in range(_num_blocks(params)):
            x = _block(params, f"block.{i}", v, x)
        return mlp(params, "out", x)
    blocks = [_block(params, f"block.{i}", v, x) for i in range(_num_blocks(params))]
    return mlp(params, "dnn", torch.cat(blocks, dim=1))


def _num_blocks(params: Params) -> int:
    return sum(name.endswith(".dense.weight") for name in params)


def _block(params: Params, name: str, v: Tensor, x: Tensor) -> Tensor:
    masked = mlp(params, f"{name}.mask", v) * x
    return torch.relu(layer_norm(params, f"{name}.norm", linear(params, f"{name}.dense", masked)))
