"""Layers as pure functions of (params, name, x)."""

from recfx.layers.activations import dice, init_dice, init_prelu, prelu
from recfx.layers.interactions import (
    cross,
    field_attention,
    fm,
    gated,
    init_cross,
    init_field_attention,
    init_gate,
    pairs,
)
from recfx.layers.mlp import Norm, batch_norm, deep, init_mlp, init_norm, layer_norm, mlp, mlp_from_first, normed
from recfx.layers.products import (
    full_matmul,
    in_bf16,
    init_linear,
    linear,
    narrow_matmul,
    sum_over_fields,
    sums_are_loops,
)

__all__ = [
    "Norm",
    "batch_norm",
    "cross",
    "deep",
    "dice",
    "field_attention",
    "fm",
    "full_matmul",
    "gated",
    "in_bf16",
    "init_cross",
    "init_dice",
    "init_field_attention",
    "init_gate",
    "init_linear",
    "init_mlp",
    "init_norm",
    "init_prelu",
    "layer_norm",
    "linear",
    "mlp",
    "mlp_from_first",
    "narrow_matmul",
    "normed",
    "pairs",
    "prelu",
    "sum_over_fields",
    "sums_are_loops",
]
