"""Interactions of features: factorisation machines, cross layers, attention over fields."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recfx.layers.mlp import init_mlp, mlp
from recfx.layers.products import init_linear, sum_over_fields
from recfx.types import Params

__all__ = ["cross", "field_attention", "fm", "gated", "init_cross", "init_field_attention", "init_gate", "pairs"]


def fm(fields_BFD: Tensor) -> Tensor:
    """The sum over pairs of fields of their inner products, [B, F, D] -> [B, 1].

        sum over f < g of <v_f, v_g> = 1/2 sum_d ((sum_f v_fd)^2 - sum_f v_fd^2)

    Ref: Rendle 2010, "Factorization machines", ICDM.
    """
    squares_B = (fields_BFD * fields_BFD).sum((1, 2))[:, None]
    return 0.5 * (sum_over_fields(fields_BFD).square().sum(1, keepdim=True) - squares_B)


def pairs(fields_BFD: Tensor) -> Tensor:
    """The inner product of each pair of fields f > g, [B, F, D] -> [B, F (F - 1) / 2], by f and then g."""
    products = fields_BFD @ fields_BFD.transpose(1, 2)
    f, g = torch.tril_indices(fields_BFD.shape[1], fields_BFD.shape[1], -1, device=fields_BFD.device)
    return products[:, f, g]


def init_cross(
    name: str, size: int, num_layers: int, generator: torch.Generator, *, rank: int | None = None, experts: int = 4
) -> Params:
    """The parameters of `cross`.

    Args:     rank: of a low-rank mixture of `experts`; None: full matrices.
    Shapes:   full: <name>.<i>.weight f32 [n, n], <name>.<i>.bias f32 [n]. Low-rank: <name>.<i>.down f32 [E, n, r],
              .inner [E, r, r], .up [E, r, n], .gate [n, E], .bias [n].
    """
    params: Params = {}
    for i in range(num_layers):
        of_layer = f"{name}.{i}"
        if rank is None:
            params[f"{of_layer}.weight"], _ = init_linear(size, size, generator)
        else:
            for part, shape in {"down": (size, rank), "inner": (rank, rank), "up": (rank, size)}.items():
                bound = 1 / math.sqrt(shape[0])
                drawn = torch.empty(experts, *shape).uniform_(-bound, bound, generator=generator)
                params[f"{of_layer}.{part}"] = drawn
            params[f"{of_layer}.gate"], _ = init_linear(size, experts, generator)
        params[f"{of_layer}.bias"] = torch.zeros(size)
    return params


def cross(params: Params, name: str, x0: Tensor) -> Tensor:
    """The cross layers of DCN-v2, f32 [B, n] -> [B, n]. Ref: Wang et al. 2021, arXiv:2008.13535.

    full:      x' = x0 * (W x + b) + x
    low-rank:  x' = x0 * (sum_e softmax(G x)_e U_e tanh(C_e tanh(V_e x)) + b) + x
    """
    x, i = x0, 0
    while f"{name}.{i}.bias" in params:
        of_layer = f"{name}.{i}"
        bias = params[f"{of_layer}.bias"]
        if f"{of_layer}.weight" in params:
            mixed = x @ params[f"{of_layer}.weight"]
        else:
            inner = torch.tanh(torch.einsum("bn,enr->ber", x, params[f"{of_layer}.down"]))
            inner = torch.tanh(torch.einsum("ber,ers->bes", inner, params[f"{of_layer}.inner"]))
            gate = (x @ params[f"{of_layer}.gate"]).softmax(1)
            mixed = torch.einsum("ber,ern->bn", inner * gate[:, :, None], params[f"{of_layer}.up"])
        x, i = x0 * (mixed + bias) + x, i + 1
    return x


def init_field_attention(name: str, num_in: int, heads: int, width: int, generator: torch.Generator) -> Params:
    """The parameters of `field_attention`.

    Shapes:   <name>.query, .key and .value f32 [num_in, heads, width], <name>.residual f32 [num_in, heads * width].
    """
    params: Params = {}
    for part in ("query", "key", "value"):
        params[f"{name}.{part}"] = init_linear(num_in, heads * width, generator)[0].view(num_in, heads, width)
    params[f"{name}.residual"], _ = init_linear(num_in, heads * width, generator)
    return params


def field_attention(params: Params, name: str, fields_BFD: Tensor) -> Tensor:
    """Self-attention over the fields of a sample, [B, F, num_in] -> [B, F, heads * width].

        out_f = ReLU(concat over heads of sum_g softmax_g(<Q e_f, K e_g>) V e_g + R e_f)

    Ref: Song et al. 2019, arXiv:1810.11921; scores are not divided by the root of the width there.
    """
    query, key, value = (
        torch.einsum("bfd,dhw->bhfw", fields_BFD, params[f"{name}.{part}"]) for part in ("query", "key", "value")
    )
    weights = (query @ key.transpose(2, 3)).softmax(3)
    heads = (weights @ value).transpose(1, 2).flatten(2)
    return torch.relu(heads + fields_BFD @ params[f"{name}.residual"])


def init_gate(name: str, num_context: int, hidden: int, size: int, generator: torch.Generator) -> Params:
    """The parameters of `gated`: <name>.context f32 [1, num_context], and an MLP from it to `size`."""
    context = {f"{name}.context": torch.zeros(1, num_context)}
    return {**context, **init_mlp(name, [num_context, hidden, size], generator)[0]}


def gated(params: Params, name: str, x: Tensor) -> Tensor:
    """x * 2 sigmoid(MLP(context)), f32 [B, n]; x where there are no parameters of that name.

    Ref: Mao et al. 2023, arXiv:2304.00902.
    """
    if f"{name}.context" not in params:
        return x
    return x * 2 * torch.sigmoid(mlp(params, name, params[f"{name}.context"]))
