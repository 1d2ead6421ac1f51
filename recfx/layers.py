"""Layers as pure functions of (params, x)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recfx.types import Params

__all__ = ["full_matmul", "in_bf16", "init_linear", "linear", "mlp", "mlp_from_first", "sums_are_loops"]

Forward = Callable[..., Any]

LOOPS_ON = ("cuda",)  # devices on which a compiled sum joins the loops next to it, over whatever axis it runs


def init_linear(num_in: int, num_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight [num_in, num_out] and bias [num_out], uniform in +-1/sqrt(num_in) as torch.nn.Linear draws them."""
    bound = 1 / math.sqrt(num_in)
    weight = torch.empty(num_in, num_out).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(num_out).uniform_(-bound, bound, generator=generator)


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x @ W + b with W = params['<name>.weight'] [num_in, num_out], b = params['<name>.bias'].

    A single output, such as a logit, is f32 under `in_bf16` too: eight bits would tie scores, and it is no GEMM.
    """
    weight = params[f"{name}.weight"]
    bias = params[f"{name}.bias"]
    if weight.shape[1] > 1:
        return x @ weight + bias
    if sums_are_loops(x):
        return (x.to(weight.dtype) * weight[:, 0]).sum(-1, keepdim=True) + bias
    return full_matmul(x, weight) + bias


def mlp(params: Params, name: str, x: Tensor, *, num_hidden: int) -> Tensor:
    """`num_hidden` ReLU layers '<name>.0' ... and a last linear one without: f32 [B, num_in] -> [B, num_out]."""
    return mlp_from_first(params, name, linear(params, f"{name}.0", x), num_hidden=num_hidden)


def mlp_from_first(params: Params, name: str, x: Tensor, *, num_hidden: int) -> Tensor:
    """`mlp` whose first linear layer has been computed already: x is its output [B, num_out of '<name>.0']."""
    for i in range(1, num_hidden + 1):
        x = linear(params, f"{name}.{i}", torch.relu(x))
    return x


def in_bf16(forward: Forward) -> Forward:
    """`forward` with its products of matrices, and those of its gradients, in bf16; the result and gradients are f32.

    By torch.autocast: parameters stay f32 and are rounded where they are multiplied, sums are kept in f32 and their
    results rounded. `full_matmul` is left alone.

    Args:     forward: (params, embeddings by group, features, ...) -> logit, or a tuple that begins with it.
    Example:  >>> params = {"fc.weight": torch.full((3, 2), 1.01), "fc.bias": torch.zeros(2)}
              >>> forward = lambda params, emb, feats: linear(params, "fc", feats)
              >>> forward(params, {}, torch.ones(1, 3)), in_bf16(forward)(params, {}, torch.ones(1, 3))
              (tensor([[3.0300, 3.0300]]), tensor([[3.0312, 3.0312]]))
    """

    @functools.wraps(forward)
    def run(params: Params, emb: Any, *others: Any) -> Any:
        device = next(iter((*params.values(), *emb.values()))).device.type
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            result = forward(params, emb, *others)
            return (result[0].float(), *result[1:]) if isinstance(result, tuple) else result.float()

    return run


def full_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight in the dtype of weight, under `in_bf16` too: for products too narrow to gain by bf16."""
    x = x.to(weight.dtype)
    if not torch.is_autocast_enabled(x.device.type):  # a graph that enters autocast is traced anew in every process
        return x @ weight
    with torch.autocast(x.device.type, enabled=False):
        return x @ weight


def sums_are_loops(x: Tensor) -> bool:
    """Whether sums of small products are better written as sums than as products of matrices where `x` is.

    On a CPU a GEMM of few columns beats a sum that runs along an axis in the middle. On CUDA it is a launch, and so are
    the shapes that it wants.
    """
    return x.device.type in LOOPS_ON
