"""Multi-layer perceptrons, with dropout and with batch or layer norm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.layers.products import init_linear, linear
from recfx.types import Params

__all__ = ["Norm", "batch_norm", "deep", "init_mlp", "init_norm", "layer_norm", "mlp", "mlp_from_first", "normed"]

Norm = Literal["layer", "batch"]
EPS, MOMENTUM = 1e-5, 0.1


def init_mlp(
    name: str, sizes: Sequence[int], generator: torch.Generator, *, norm: Norm | None = None
) -> tuple[Params, Stats]:
    """The parameters of `mlp` and `deep`, and the statistics that batch norm keeps.

    Args:     sizes: of the input, each layer and the output.  norm: of what each hidden layer gives before its ReLU.
    Shapes:   <name>.<i>.weight f32 [in, out], <name>.<i>.bias f32 [out]; with a norm <name>.<i>.layer_norm or
              .batch_norm, .scale and .shift f32 [out]; in the statistics <name>.<i>.batch_norm.mean and .var f32 [out].
    """
    params: Params = {}
    stats: Stats = {}
    for i, (num_in, num_out) in enumerate(itertools.pairwise(sizes)):
        params[f"{name}.{i}.weight"], params[f"{name}.{i}.bias"] = init_linear(num_in, num_out, generator)
        if norm is not None and i < len(sizes) - 2:
            of_norm, kept = init_norm(f"{name}.{i}", num_out, norm)
            params, stats = params | of_norm, stats | kept
    return params, stats


def init_norm(name: str, size: int, norm: Norm) -> tuple[Params, Stats]:
    """The parameters of `normed`, and the statistics that batch norm keeps."""
    of_norm = f"{name}.{norm}_norm"
    params = {f"{of_norm}.scale": torch.ones(size), f"{of_norm}.shift": torch.zeros(size)}
    if norm == "layer":
        return params, {}
    return params, {f"{of_norm}.mean": torch.zeros(size), f"{of_norm}.var": torch.ones(size)}


def mlp(params: Params, name: str, x: Tensor, *, num_hidden: int | None = None) -> Tensor:
    """Layers '<name>.0' ... with ReLU, then a linear one: f32 [B, num_in] -> [B, num_out].

    Args:     num_hidden: layers with ReLU; None: all but the last one of that name.
    """
    return mlp_from_first(params, name, linear(params, f"{name}.0", x), num_hidden=num_hidden)


def mlp_from_first(params: Params, name: str, x: Tensor, *, num_hidden: int | None = None) -> Tensor:
    """`mlp` whose first linear layer has been computed already: x is its output [B, num_out of '<name>.0']."""
    num_hidden = num_layers(params, name) - 1 if num_hidden is None else num_hidden
    for i in range(1, num_hidden + 1):
        x = linear(params, f"{name}.{i}", torch.relu(x))
    return x


def deep(
    params: Params, name: str, x: Tensor, context: Context | None = None, *, dropout: float = 0.0
) -> tuple[Tensor, Stats]:
    """`mlp` with the norms that its parameters have, and dropout after each ReLU.

    Args:     context: of `forward`; None: as in evaluation.
              dropout: probability that an output of a hidden layer is 0, in training.
    Returns:  f32 [B, num_out], and the new statistics of its batch norms.
    Raises:   ValueError without a context where the parameters have a batch norm.
    """
    stats: Stats = {}
    last = num_layers(params, name) - 1
    for i in range(last):
        of_layer = f"{name}.{i}"
        x, new = normed(params, of_layer, linear(params, of_layer, x), context)
        stats |= new
        x = torch.relu(x)
        x = x if context is None else context.dropout(x, dropout, f"{of_layer}.dropout")
    return linear(params, f"{name}.{last}", x), stats


def num_layers(params: Params, name: str) -> int:
    """Linear layers '<name>.0', '<name>.1' ..."""
    return next(i for i in itertools.count() if f"{name}.{i}.weight" not in params)


def normed(params: Params, name: str, x: Tensor, context: Context | None) -> tuple[Tensor, Stats]:
    """x through the norm that the parameters have for that name, or as it is; the new statistics."""
    if f"{name}.layer_norm.scale" in params:
        return layer_norm(params, f"{name}.layer_norm", x), {}
    if f"{name}.batch_norm.scale" not in params:
        return x, {}
    if context is None:
        raise ValueError(
            f"context: got None, expected the context of the step. '{name}.batch_norm' keeps statistics there. Give it "
            "as the fourth argument of forward."
        )
    return batch_norm(params, f"{name}.batch_norm", x, context)


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) * scale + shift over the last axis. Ref: Ba et al. 2016, arXiv:1607.06450."""
    scale, shift = params[f"{name}.scale"], params[f"{name}.shift"]
    return torch.nn.functional.layer_norm(x, scale.shape, scale, shift, EPS)


def batch_norm(params: Params, name: str, x: Tensor, context: Context) -> tuple[Tensor, Stats]:
    """(x - mean) / sqrt(var + 1e-5) * scale + shift over the batch. Ref: Ioffe, Szegedy 2015, arXiv:1502.03167.

    In training mean and variance are those of the real samples of the micro-batch; otherwise what training kept,
    new = 0.9 old + 0.1 of the batch, with the unbiased variance. On several ranks each normalises its own samples.

    Shapes:   x f32 [B, n].
    Returns:  f32 [B, n], and the new <name>.mean and <name>.var.
    """
    mean, var = context.stats[f"{name}.mean"], context.stats[f"{name}.var"]
    stats = {f"{name}.mean": mean, f"{name}.var": var}
    if context.training:
        kept, num = torch.where(context.valid, x, 0.0), context.valid.sum().clamp(min=1)
        of_batch = kept.sum(0) / num
        squares = torch.where(context.valid, x - of_batch, 0.0).square().sum(0)
        unbiased = squares / (num - 1).clamp(min=1)
        stats = {
            f"{name}.mean": torch.lerp(mean, of_batch.detach(), MOMENTUM),
            f"{name}.var": torch.lerp(var, unbiased.detach(), MOMENTUM),
        }
        mean, var = of_batch, squares / num
    y = (x - mean) * torch.rsqrt(var + EPS) * params[f"{name}.scale"] + params[f"{name}.shift"]
    return y, stats
