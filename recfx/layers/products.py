"""Products of matrices and sums over fields, in the form that is fast on the device; linear layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from recfx.types import Params

__all__ = [
    "full_matmul",
    "in_bf16",
    "init_linear",
    "linear",
    "narrow_matmul",
    "sum_over_fields",
    "sums_are_loops",
]

Forward = Callable[..., Any]

LANES = 16  # floats of the widest vector registers
LOOPS_ON = ("cuda",)  # devices on which a compiled sum over any axis fuses with neighbouring loops


def init_linear(num_in: int, num_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight [num_in, num_out] and bias [num_out], uniform in +-1/sqrt(num_in) as torch.nn.Linear draws them."""
    bound = 1 / math.sqrt(num_in)
    weight = torch.empty(num_in, num_out).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(num_out).uniform_(-bound, bound, generator=generator)


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x @ W + b with W = params['<name>.weight'] [num_in, num_out], b = params['<name>.bias'].

    A single output, such as a logit, is f32 under `in_bf16` too: eight bits would tie scores, and it is not a GEMM.
    """
    weight = params[f"{name}.weight"]
    bias = params[f"{name}.bias"]
    if weight.shape[1] > 1:
        return x @ weight + bias
    if sums_are_loops(x):
        return (x.to(weight.dtype) * weight[:, 0]).sum(-1, keepdim=True) + bias
    return full_matmul(x, weight) + bias


def in_bf16(forward: Forward) -> Forward:
    """`forward` with its matrix products, and those of its gradients, in bf16. The result and the gradients are f32.

    It uses torch.autocast: parameters stay f32 and are rounded for each product, which sums in f32 and rounds its
    result. `full_matmul` is not affected.

    Args:     forward: (params, embeddings by group, features, ...) -> a tensor or tensors by name, or a tuple that
              begins with them.
    Example:  >>> params = {"fc.weight": torch.full((3, 2), 1.01), "fc.bias": torch.zeros(2)}
              >>> forward = lambda params, emb, feats: linear(params, "fc", feats)
              >>> forward(params, {}, torch.ones(1, 3)), in_bf16(forward)(params, {}, torch.ones(1, 3))
              (tensor([[3.0300, 3.0300]]), tensor([[3.0312, 3.0312]]))
    """

    @functools.wraps(forward)
    def run(params: Params, emb: Any, *others: Any) -> Any:
        device = tree_leaves((params, emb))[0].device.type
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            result = forward(params, emb, *others)
            first, *stats = result if isinstance(result, tuple) else (result,)
            first = tree_map(Tensor.float, first)
            return (first, *stats) if stats else first

    return run


def full_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight in the dtype of weight, also under `in_bf16`: for products too narrow to gain from bf16."""
    x = x.to(weight.dtype)
    if not torch.is_autocast_enabled(x.device.type):  # a graph that enters autocast is traced again in every process
        return x @ weight
    with torch.autocast(x.device.type, enabled=False):
        return x @ weight


def sums_are_loops(x: Tensor) -> bool:
    """Whether small products are faster as sums than as matrix products on the device of `x`.

    On a CPU a GEMM of few columns is faster than a sum along a middle axis. On CUDA it needs a launch, and another for
    the layout of its inputs.
    """
    return x.device.type in LOOPS_ON


def sum_over_fields(emb_BFD: Tensor) -> Tensor:
    """The sum [B, D] of embeddings [B, F, D], on a CPU by loops over at least 16 contiguous numbers.

    Adding rows of 8 numbers compiles there to scalar loops, 30 times slower. So groups of fields of 16 numbers are
    added first, and a small product with stacked identity matrices adds the fields that are left side by side.
    """
    if sums_are_loops(emb_BFD):
        return emb_BFD.sum(1)
    num_samples, num_fields, dim = emb_BFD.shape
    together = LANES // math.gcd(LANES, dim)
    whole = num_fields - num_fields % together
    sums = emb_BFD[:, :whole].reshape(num_samples, whole // together, together * dim).sum(1)
    if whole < num_fields:
        sums = torch.cat([sums, emb_BFD[:, whole:].flatten(1)], dim=1)
    identities = torch.eye(dim, device=sums.device, dtype=sums.dtype).repeat(sums.shape[1] // dim, 1)
    return full_matmul(sums, identities)


def narrow_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight of few columns, padded to a full vector register: 16 columns are 3 times as fast as 10 on a CPU."""
    num_columns = weight.shape[1]
    return full_matmul(x, F.pad(weight, (0, -num_columns % LANES)))[:, :num_columns]
