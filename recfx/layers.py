"""Layers as pure functions of (params, x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recfx.types import Params

__all__ = ["init_linear", "linear", "mlp", "mlp_from_first"]


def init_linear(num_in: int, num_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight [num_in, num_out] and bias [num_out], uniform in +-1/sqrt(num_in) as torch.nn.Linear draws them."""
    bound = 1 / math.sqrt(num_in)
    weight = torch.empty(num_in, num_out).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(num_out).uniform_(-bound, bound, generator=generator)


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x @ W + b with W = params['<name>.weight'] [num_in, num_out], b = params['<name>.bias']."""
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def mlp(params: Params, name: str, x: Tensor, *, num_hidden: int) -> Tensor:
    """ReLU layers '<name>.0' ... and a last linear one without."""
    return mlp_from_first(params, name, linear(params, f"{name}.0", x), num_hidden=num_hidden)


def mlp_from_first(params: Params, name: str, x: Tensor, *, num_hidden: int) -> Tensor:
    """`mlp` whose first linear layer has been computed already: x is its output [B, num_out of '<name>.0']."""
    for i in range(1, num_hidden + 1):
        x = linear(params, f"{name}.{i}", torch.relu(x))
    return x
