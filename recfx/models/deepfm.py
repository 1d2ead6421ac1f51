"""DeepFM: first-order terms, pairwise products of embeddings, and an MLP over them, summed into one logit.

    logit = sum_f w_f b_f + 1/2 sum_d ((sum_f w_f E_fd)^2 - sum_f w_f^2 E_fd^2) + MLP(E)

with E, b the embeddings and biases of numeric features (parameters) and categorical ones (table rows), w the numeric
value or 1. Ref: Guo et al. 2017, arXiv:1703.04247.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recfx.layers import init_linear, mlp_from_first, narrow_matmul, sum_over_fields, sums_are_loops
from recfx.types import Params

__all__ = ["DeepFMConfig", "forward", "init"]


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig:
    """Sizes. `num_numeric` dense features, `num_sparse` sparse ones of width `dim`, MLP layers `hidden`."""

    num_numeric: int
    num_sparse: int
    dim: int = 8
    hidden: tuple[int, ...] = (64, 16)


def init(config: DeepFMConfig, generator: torch.Generator) -> Params:
    """Dense parameters.

    Shapes:   numeric_emb f32 [N, D] and numeric_bias f32 [N, 1] where there are numeric features; dnn.<i>.weight
              f32 [in, out], dnn.<i>.bias f32 [out].
    """
    params: Params = {}
    if config.num_numeric:
        params["numeric_emb"] = torch.randn(config.num_numeric, config.dim, generator=generator) * 0.001
        params["numeric_bias"] = torch.randn(config.num_numeric, 1, generator=generator) * 0.001
    sizes = [(config.num_numeric + config.num_sparse) * config.dim, *config.hidden, 1]
    for i, (num_in, num_out) in enumerate(itertools.pairwise(sizes)):
        params[f"dnn.{i}.weight"], params[f"dnn.{i}.bias"] = init_linear(num_in, num_out, generator)
    return params


def forward(params: Params, emb: Mapping[str, Tensor], feats: Mapping[str, Any]) -> Tensor:
    """Logit f32 [B, 1] from emb["emb"] f32 [B, F, D], emb["bias"] f32 [B, F, 1] and feats["numeric"] f32 [B, N].

    On a CPU every sum over fields is a matrix product or runs along contiguous memory: the textbook form reduces over a
    middle axis, which compilers turn into scalar loops. On CUDA they are plain sums, which fuse with neighbouring
    kernels. The numeric embeddings enter the MLP unscaled, the same for every sample, so their part of the first layer
    is a bias. Cost: one GEMM [B, F D] x [F D, H].
    """
    emb_BFD, weight, bias = emb["emb"], params["dnn.0.weight"], params["dnn.0.bias"]
    num_sparse = emb_BFD.shape[1] * emb_BFD.shape[2]
    has_numeric = "numeric_emb" in params
    numeric_weight, sparse_weight = weight.split([len(weight) - num_sparse, num_sparse])
    hidden_BH = emb_BFD.flatten(1) @ sparse_weight
    if has_numeric:
        numeric_BN = feats["numeric"]
        numeric_terms = numeric_by_sums if sums_are_loops(numeric_BN) else numeric_by_products
        numeric_first_B, numeric_sum_BD, numeric_squares_B = numeric_terms(params, numeric_BN)
    first_order = emb["bias"].sum(1) + numeric_first_B if has_numeric else emb["bias"].sum(1)

    # Squared before any reshape: one loop then adds its gradient to the product's, without copies of two matrices.
    sparse_squares_B = (emb_BFD * emb_BFD).sum((1, 2))[:, None]
    sum_BD = sum_over_fields(emb_BFD) + numeric_sum_BD if has_numeric else sum_over_fields(emb_BFD)
    twice_B = (sum_BD**2).sum(1, keepdim=True) - sparse_squares_B
    second_order = 0.5 * (twice_B - numeric_squares_B if has_numeric else twice_B)
    if has_numeric:
        # A sum, not a matrix product: one row is too little for a GEMM, and the loop fuses with its neighbours.
        bias = bias + (params["numeric_emb"].flatten()[:, None] * numeric_weight).sum(0)
    return first_order + second_order + mlp_from_first(params, "dnn", hidden_BH + bias)


def numeric_by_products(params: Params, numeric_BN: Tensor) -> Sequence[Tensor]:
    """Terms of the numeric features by one product: first order [B, 1], sums [B, D], and squares [B, 1], which depend
    on the squared values only."""
    numeric_emb, dim = params["numeric_emb"], params["numeric_emb"].shape[1]
    linear = torch.cat([params["numeric_bias"], numeric_emb], dim=1)
    squares = (numeric_emb**2).sum(1, keepdim=True)
    values = torch.cat([numeric_BN, numeric_BN**2], dim=1)
    return narrow_matmul(values, torch.block_diag(linear, squares)).split([1, dim, 1], dim=1)


def numeric_by_sums(params: Params, numeric_BN: Tensor) -> Sequence[Tensor]:
    """The same as sums, without a product."""
    numeric_emb = params["numeric_emb"]
    first_B = (numeric_BN * params["numeric_bias"][:, 0]).sum(1, keepdim=True)
    squares_B = (numeric_BN**2 * (numeric_emb**2).sum(1)).sum(1, keepdim=True)
    return first_B, (numeric_BN[:, :, None] * numeric_emb).sum(1), squares_B
