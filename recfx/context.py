"""What a model's `forward` may use besides its parameters, embeddings and features."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recfx.kernels.hashing import GOLDEN, mix, shift_right
from recfx.types import Params

__all__ = ["Context", "Stats", "with_context"]

Stats = dict[str, Tensor]
BITS = 24  # of a random number: what an f32 holds exactly


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """The fourth argument of a `forward` that takes one.

    Random numbers are a function of the step's seed, the number of the optimiser step, the number of the sample in
    that step and `name`. So they do not depend on how a step is cut into micro-batches, and a resumed run draws the
    same ones. Two calls with one name give the same numbers: use a different name for each.

    Args:     training: True in `update_`, False in `evaluate_` and `predict`. Fixed when a step is captured.
              valid: bool [B, 1], the samples that are not padding.
              stats: tensors that are not trained, such as running means. `forward` may return new ones as
              `(logit, stats)`; only training keeps them.
              seed: of the random numbers.  step: i64 [], number of the optimiser step.
              sample: i64 [B], number of each sample in the optimiser step.
    Example:  >>> context = Context(training=True, valid=torch.ones(2, 1, dtype=torch.bool), stats={}, seed=0,
              ...                   step=torch.tensor(1), sample=torch.arange(2))
              >>> context.dropout(torch.ones(2, 4), 0.5, "hidden")
              tensor([[2., 0., 0., 0.],
                      [0., 0., 0., 2.]])
    """

    training: bool
    valid: Tensor
    stats: Stats
    seed: int = field(repr=False)
    step: Tensor = field(repr=False)
    sample: Tensor = field(repr=False)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """f32 [B, *shape], uniform in [0, 1), multiples of 2**-24."""
        of_sample = mix(mix(self.step * GOLDEN ^ _key_of(self.seed, name)) + self.sample * GOLDEN)
        place = torch.arange(1, math.prod(shape) + 1, device=self.sample.device) * GOLDEN
        bits = shift_right(mix(of_sample[:, None] ^ place), 64 - BITS)
        return (bits.float() * 2.0**-BITS).reshape(-1, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """f32 [B, *shape], standard normal."""
        centred = 2 * self.uniform(name, *shape) + (2.0**-BITS - 1)  # in (-1, 1)
        return math.sqrt(2) * torch.erfinv(centred)

    def dropout(self, x: Tensor, p: float, name: str) -> Tensor:
        """x [B, ...] with each element zero with probability p and the others divided by 1 - p; x outside training.

        Raises:   ValueError when p is not in [0, 1).
        """
        if not 0 <= p < 1:
            raise ValueError(f"p: got {p}, expected 0 <= p < 1, the share of elements that become zero.")
        if not self.training or p == 0:
            return x
        return torch.where(self.uniform(name, *x.shape[1:]) >= p, x / (1 - p), 0.0)


@torch.compiler.assume_constant_result
def _key_of(seed: int, name: str) -> int:
    """Signed 64-bit key of a name: the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/random/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


Forward = Callable[[Params, Any, Any, Context], tuple[Tensor, Stats]]


def with_context(forward: Callable[..., Any]) -> Forward:
    """`forward` as a function of (params, embeddings, features, context) that returns (logit, stats).

    The context is passed on when `forward` has a fourth positional parameter without a default.
    """
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(forward).parameters.values()
    takes_context = sum(p.kind in kinds and p.default is p.empty for p in parameters) > 3

    def run(params: Params, emb: Any, feats: Any, context: Context) -> tuple[Tensor, Stats]:
        result = forward(params, emb, feats, context) if takes_context else forward(params, emb, feats)
        if not isinstance(result, tuple):
            return result, context.stats
        if len(result) != 2 or not isinstance(result[1], dict):
            kinds = ", ".join(type(part).__name__ for part in result)
            raise TypeError(f"forward: got a tuple ({kinds}), expected the logit or (logit, stats), stats a dict.")
        logit, stats = result
        _check_stats(context.stats, stats)
        return logit, {name: stats[name].detach() for name in context.stats}

    return run


def _check_stats(before: Stats, after: Stats) -> None:
    """Other names, shapes or dtypes could not be kept in the state."""

    def described(stats: Stats) -> dict[str, str]:
        return {name: f"{t.dtype} {list(t.shape)}" for name, t in stats.items()}

    if described(before) != described(after):
        raise ValueError(
            f"forward: got stats {described(after)}, expected {described(before)}, those given to "
            "`step.init(params, stats=...)`. Their shapes stay the same during training."
        )
