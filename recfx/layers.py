"""Layers as pure functions of (params, x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recfx.types import Params

__all__ = ["init_linear", "linear", "mlp"]


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
    for i in range(num_hidden):
        x = torch.relu(linear(params, f"{name}.{i}", x))
    return linear(params, f"{name}.{num_hidden}", x)
