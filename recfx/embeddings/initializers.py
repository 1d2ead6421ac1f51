"""Initial weights of new rows: each depends only on (seed, table name, column, id)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

__all__ = [
    "Initializer",
    "InitializerOf",
    "column_key",
    "constant",
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "truncated_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
]


class Initializer(NamedTuple):
    """Distribution of a new weight: loc + scale * q(x), x uniform in (-1, 1).

    cover 0: q is the identity; otherwise the quantile function of the normal's central share `cover`.
    """

    loc: float
    scale: float
    cover: float


def constant(value: float) -> Initializer:
    """Every new weight is `value`."""
    return Initializer(value, 0.0, 0.0)


def uniform(low: float, high: float) -> Initializer:
    """Uniform in (low, high).

    Raises:   ValueError when high is below low.
    Example:  >>> uniform(-0.5, 0.5)
              Initializer(loc=0.0, scale=0.5, cover=0.0)
    """
    if not low <= high:
        raise ValueError(f"high: got {high}, expected at least low, which is {low}.")
    return Initializer((low + high) / 2, (high - low) / 2, 0.0)


def normal(std: float, mean: float = 0.0) -> Initializer:
    """Normal with the given standard deviation and mean.

    Raises:   ValueError when std is below 0.
    """
    if not std >= 0:
        raise ValueError(f"std: got {std}, expected >= 0.")
    return Initializer(mean, std, 1.0)


def truncated_normal(std: float, mean: float = 0.0, bound: float = 2.0) -> Initializer:
    """Normal cut at `bound` standard deviations on both sides, by inversion: no weight is outside.

    Differs:  from torch.nn.init.trunc_normal_, whose bounds are absolute: 2 there is 2000 of these at std 0.001.
    Raises:   ValueError when std is below 0 or bound is not above 0.
    Example:  >>> truncated_normal(0.001).scale
              0.001
    """
    if not std >= 0:
        raise ValueError(f"std: got {std}, expected >= 0.")
    if not bound > 0:
        raise ValueError(f"bound: got {bound}, expected > 0. It is the number of standard deviations that are kept.")
    return Initializer(mean, std, math.erf(bound / math.sqrt(2)))


InitializerOf = Callable[[int], Initializer]  # dim -> Initializer


def xavier_uniform(gain: float = 1.0) -> InitializerOf:
    """torch.nn.init.xavier_uniform_ of a row [1, dim]: uniform in +-gain sqrt(6 / (dim + 1)).

    Example:  >>> xavier_uniform()(5).scale
              1.0
    """
    return lambda dim: uniform(-gain * math.sqrt(6 / (dim + 1)), gain * math.sqrt(6 / (dim + 1)))


def xavier_normal(gain: float = 1.0) -> InitializerOf:
    """torch.nn.init.xavier_normal_ of a row [1, dim]: normal, standard deviation gain sqrt(2 / (dim + 1))."""
    return lambda dim: normal(gain * math.sqrt(2 / (dim + 1)))


def kaiming_uniform(gain: float = math.sqrt(2)) -> InitializerOf:
    """torch.nn.init.kaiming_uniform_ of a row [1, dim]: uniform in +-gain sqrt(3 / dim). The default gain is ReLU's."""
    return lambda dim: uniform(-gain * math.sqrt(3 / dim), gain * math.sqrt(3 / dim))


def kaiming_normal(gain: float = math.sqrt(2)) -> InitializerOf:
    """torch.nn.init.kaiming_normal_ of a row [1, dim]: normal, standard deviation gain / sqrt(dim)."""
    return lambda dim: normal(gain / math.sqrt(dim))


def column_key(seed: int, name: str, column: int) -> int:
    """Signed 64-bit key of one column of a logical table: the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/{name}/{column}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
