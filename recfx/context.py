"""What a model's `forward` may use besides its parameters, embeddings and features."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recfx.checks import check_type, signature_of
from recfx.kernels.index.hashing import GOLDEN, mix, shift_right
from recfx.kernels.op import constant_result
from recfx.types import Params

__all__ = ["Context", "Stats", "with_context"]

Stats = dict[str, Tensor]
BITS = 24  # of a random number: what an f32 holds exactly
NAMES = ("context", "ctx")  # of a parameter that is given the context though it has a default


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """The fourth argument of a `forward` that takes one.

    A function, or the `forward` of a Module, takes one when its fourth positional parameter has no default or is called
    `context` or `ctx`. A fourth parameter with a default and another name keeps its default. A wrapper of `*args`
    is given three arguments; with `functools.wraps`, what it wraps decides.

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

        Raises:   ValueError when p is not in [0, 1), or the first axis of x is not the batch's.
        """
        if not 0 <= p < 1:
            raise ValueError(f"p: got {p}, expected 0 <= p < 1, the share of elements that become zero.")
        batch_size = self.sample.shape[0]
        if x.dim() == 0 or x.shape[0] != batch_size:
            raise ValueError(
                f"x: got {list(x.shape)}, expected [{batch_size}, ...], a row for each sample. Each sample draws its "
                "own numbers. Expand or reshape x to that first axis."
            )
        if not self.training or p == 0:
            return x
        return torch.where(self.uniform(name, *x.shape[1:]) >= p, x / (1 - p), 0.0)


@constant_result
def _key_of(seed: int, name: str) -> int:
    """Signed 64-bit key of a name: the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/random/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


Forward = Callable[[Params, Any, Any, Context], tuple[Tensor, Stats]]


def with_context(forward: Callable[..., Any]) -> Forward:
    """`forward` as a function of (params, embeddings, features, context) that returns (logit, stats).

    See `Context` for when `forward` is given one.

    Raises:   TypeError when a parameter for the context is not the fourth, and so would never be given one.
    """
    takes_context = _takes_context(forward)

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


def _takes_context(forward: Callable[..., Any]) -> bool:
    signature = signature_of(forward)
    if signature is None:
        return False
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    filled = forward.keywords if isinstance(forward, functools.partial) else {}
    for p in parameters:
        if p.name in NAMES and p.kind is not p.VAR_POSITIONAL and p not in positional[:4] and p.name not in filled:
            raise TypeError(
                f"forward: got {signature}, expected '{p.name}' as the fourth positional parameter. The context is "
                "given as the fourth argument. Write (params, emb, feats, context)."
            )
    return len(positional) > 3 and (positional[3].default is positional[3].empty or positional[3].name in NAMES)


def _check_stats(before: Stats, after: Stats) -> None:
    """Other names, shapes or dtypes could not be kept in the state."""
    if before.keys() != after.keys():
        missing, more = [n for n in before if n not in after], [n for n in after if n not in before]
        differ = " and ".join([f"without {missing}"] * bool(missing) + [f"with {more}"] * bool(more))
        raise ValueError(
            f"forward: got stats {differ}, expected {list(before)}, the names given to `step.init(params, stats=...)`. "
            "Return these names."
        )
    for name, old in before.items():
        new = after[name]
        check_type(f"forward: stats '{name}'", new, Tensor, "Return a tensor for each name.")
        if new.dtype != old.dtype:
            why = ' Under precision="bf16" products are bf16.' * (new.dtype == torch.bfloat16)
            cast = ".float()" if old.dtype == torch.float32 else f".to({old.dtype})"
            raise ValueError(
                f"forward: got {new.dtype} for stats '{name}', expected {old.dtype}, as given to "
                f"`step.init(params, stats=...)`. A statistic keeps its dtype.{why} Return its {cast}."
            )
        if new.shape != old.shape:
            raise ValueError(
                f"forward: got {list(new.shape)} for stats '{name}', expected {list(old.shape)}, as given to "
                "`step.init(params, stats=...)`. A statistic keeps its shape. Reduce it, or give that shape to init."
            )
