"""Activations with parameters: PReLU and Dice."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.types import Params

__all__ = ["dice", "init_activation", "prelu"]


def init_activation(name: str, size: int) -> Params:
    """The parameters of `prelu` and `dice`: <name>.slope f32 [size]."""
    return {f"{name}.slope": torch.full((size,), 0.25)}


def prelu(params: Params, name: str, x: Tensor) -> Tensor:
    """x where it is positive, else slope * x, by channel. Ref: He et al. 2015, arXiv:1502.01852."""
    return torch.where(x > 0, x, params[f"{name}.slope"] * x)


def dice(params: Params, name: str, x: Tensor, there: Tensor) -> Tensor:
    """p x + (1 - p) slope x, p = sigmoid((x - mean) / sqrt(var + 1e-8)) by channel. Ref: Zhou et al. 2018,
    arXiv:1706.06978.

    Mean and variance are those of the rows that are there, in training and evaluation: nothing is kept of them.

    Shapes:   x f32 [P, n], there bool [P, 1].
    """
    num = there.sum().clamp(min=1)
    mean = torch.where(there, x, 0.0).sum(0) / num
    var = torch.where(there, x - mean, 0.0).square().sum(0) / num
    share = torch.sigmoid((x - mean) * torch.rsqrt(var + 1e-8))
    return x * (share + (1 - share) * params[f"{name}.slope"])
