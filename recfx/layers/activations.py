"""Activations with parameters: PReLU and Dice."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.layers.mlp import MOMENTUM
from recfx.types import Params

__all__ = ["dice", "init_dice", "init_prelu", "prelu"]

EPS = 1e-8


def init_prelu(name: str, size: int) -> Params:
    """The parameters of `prelu`: <name>.slope f32 [size]."""
    return {f"{name}.slope": torch.full((size,), 0.25)}


def prelu(params: Params, name: str, x: Tensor) -> Tensor:
    """x where it is positive, else slope * x, by channel. Ref: He et al. 2015, arXiv:1502.01852."""
    return torch.where(x > 0, x, params[f"{name}.slope"] * x)


def init_dice(name: str, size: int) -> tuple[Params, Stats]:
    """The parameters of `dice`, <name>.dice.slope f32 [size], and its statistics, <name>.dice.mean and .var f32 [size].

    Example:  >>> params, stats = init_dice("hidden", 3)
              >>> list(params), list(stats)
              (['hidden.dice.slope'], ['hidden.dice.mean', 'hidden.dice.var'])
    """
    of_dice = f"{name}.dice"
    return {f"{of_dice}.slope": torch.zeros(size)}, {
        f"{of_dice}.mean": torch.zeros(size),
        f"{of_dice}.var": torch.ones(size),
    }


def dice(params: Params, name: str, x: Tensor, there: Tensor, context: Context | None) -> tuple[Tensor, Stats]:
    """p x + (1 - p) slope x, p = sigmoid((x - mean) / sqrt(var + 1e-8)), by channel. Ref: Zhou et al. 2018,
    arXiv:1706.06978.

    In training mean and variance are those of the micro-batch's rows that are there; otherwise what training kept,
    new = 0.9 old + 0.1 of the batch, with the unbiased variance. So a prediction does not depend on the other samples.

    Shapes:   x f32 [P, n], there bool [P, 1].
    Returns:  f32 [P, n], and the new <name>.dice.mean and <name>.dice.var.
    Raises:   ValueError without a context.
    """
    of_dice = f"{name}.dice"
    if context is None:
        raise ValueError(
            f"context: got None, expected the context of the step. '{of_dice}' keeps statistics there. Give it as the "
            "fourth argument of forward."
        )
    mean, var = context.stats[f"{of_dice}.mean"], context.stats[f"{of_dice}.var"]
    stats = {f"{of_dice}.mean": mean, f"{of_dice}.var": var}
    if context.training:
        num = there.sum()
        of_batch = torch.where(there, x, 0.0).sum(0) / num.clamp(min=1)
        squares = torch.where(there, x - of_batch, 0.0).square().sum(0)
        rate = MOMENTUM * (num > 0).to(mean.dtype)  # a micro-batch without rows leaves them as they are
        stats = {
            f"{of_dice}.mean": torch.lerp(mean, of_batch.detach(), rate),
            f"{of_dice}.var": torch.lerp(var, (squares / (num - 1).clamp(min=1)).detach(), rate),
        }
        mean, var = of_batch, squares / num.clamp(min=1)
    share = torch.sigmoid((x - mean) * torch.rsqrt(var + EPS))
    return x * (share + (1 - share) * params[f"{of_dice}.slope"]), stats
