"""Ops on numbers: dense f32 [B, d] or Ragged f32, and boundaries fitted on the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recfx.features.columns import ColumnT, on_values
from recfx.features.lists import select_dense
from recfx.types import Ragged

__all__ = [
    "bucketize",
    "clip",
    "fill_missing",
    "log1p",
    "min_max",
    "quantile_boundaries",
    "signed_log1p",
    "standardize",
]

Statistic = float | Tensor


def log1p(x: ColumnT) -> ColumnT:
    """log(1 + max(x, 0)), for counts that span orders of magnitude.

    Shapes:   f32 [B, d], Ragged f32 or a dict of them -> the same.
    Example:  >>> log1p(torch.tensor([[-3.0, 0.0]])).tolist()
              [[0.0, 0.0]]
    """
    return on_values(x, lambda v: torch.log1p(v.clamp(min=0)))


def signed_log1p(x: ColumnT) -> ColumnT:
    """sign(x) log(1 + |x|), for numbers of both signs that span orders of magnitude.

    Shapes:   f32 [B, d], Ragged f32 or a dict of them -> the same.
    Example:  >>> signed_log1p(torch.tensor([[-1.0, 0.0, 1.0]])).tolist()
              [[-0.6931471824645996, 0.0, 0.6931471824645996]]
    """
    return on_values(x, lambda v: torch.sign(v) * torch.log1p(v.abs()))


def clip(x: ColumnT, low: float, high: float) -> ColumnT:
    """min(max(x, low), high). NaN stays NaN.

    Example:  >>> clip(torch.tensor([[-2.0], [0.5]]), 0, 1).tolist()
              [[0.0], [0.5]]
    """
    return on_values(x, lambda v: v.clamp(low, high))


def standardize(x: ColumnT, mean: Statistic, std: Statistic) -> ColumnT:
    """(x - mean) / std with given statistics: numbers, or one per column [d]. A std of 0 counts as 1.

    Example:  >>> standardize(torch.tensor([[5.0, 3.0]]), torch.tensor([3.0, 3.0]), torch.tensor([2.0, 0.0])).tolist()
              [[1.0, 0.0]]
    """
    _check_statistics(x, mean, std)
    return on_values(x, lambda v: (v - mean) / _or_one(std))


def min_max(x: ColumnT, low: Statistic, high: Statistic) -> ColumnT:
    """(x - low) / (high - low) with given statistics: low becomes 0 and high 1; values outside stay outside.

    When low = high the divisor is 1.
    """
    _check_statistics(x, low, high)
    return on_values(x, lambda v: (v - low) / _or_one(high - low))


def _check_statistics(x: Any, *statistics: Statistic) -> None:
    if not isinstance(x, Tensor) and any(isinstance(s, Tensor) and s.ndim for s in statistics):
        raise TypeError(f"x: got {type(x).__name__}, expected Tensor [B, d] for statistics per column.")


def _or_one(divisor: Statistic) -> Statistic:
    return torch.where(divisor == 0, 1.0, divisor) if isinstance(divisor, Tensor) else divisor or 1.0


def fill_missing(column: Tensor | Ragged | list[Ragged], value: Statistic, dim: int = 1) -> tuple[Tensor, Tensor]:
    """`select_dense` with `value` where a number is absent or NaN; and f32 1 at these places, 0 elsewhere.

    Args:     value: a number, or one per column of the result.
    Shapes:   f32 [B, d], f32 [B, d], with d as of `select_dense`.
    Example:  >>> x, missing = fill_missing(torch.tensor([[3.0], [float("nan")]]), value=-1.0)
              >>> x.tolist(), missing.tolist()
              ([[3.0], [-1.0]], [[0.0], [1.0]])
    """
    x = select_dense(column, dim, fill=float("nan"))
    missing = x.isnan()
    return torch.where(missing, value, x), missing.float()


def bucketize(x: ColumnT, boundaries: Sequence[float] | Tensor) -> ColumnT:
    """The index of the first boundary strictly greater than the value: an id from 0 to the number of boundaries.

    Args:     boundaries: rising numbers; or a tensor [d, boundaries], a row per column of a dense x. Shorter rows end
              in infinity.
    Shapes:   f32 [B, d] or Ragged f32 -> the same in i64. NaN and +inf get the highest id.
    Cost:     one comparison per boundary, fused with neighbouring ops.
    Raises:   ValueError when given numbers do not rise.
    Example:  >>> bucketize(torch.tensor([[17.999], [18.0], [65.0], [float("nan")]]), [18, 25, 35, 45, 55, 65]).T
              tensor([[0, 1, 6, 6]])
    """
    if not isinstance(boundaries, Tensor) and not all(a < b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"boundaries: got {list(boundaries)}, expected rising numbers.")

    def index(v: Tensor) -> Tensor:
        bounds = torch.as_tensor(boundaries, dtype=v.dtype, device=v.device)
        return (~(v[..., None] < bounds)).sum(-1)

    return on_values(x, index)


def quantile_boundaries(values: Tensor | np.ndarray | Sequence[float], num_buckets: int) -> list[float]:
    """Boundaries for `bucketize` that cut these values into buckets of about equal size. Runs on the host.

    Equal quantiles merge, so skewed counts give fewer than num_buckets - 1 boundaries. NaN is ignored. Boundaries are
    float32 numbers, like the values they are compared with.

    Raises:   ValueError when num_buckets is below 1 or all values are NaN.
    Example:  >>> quantile_boundaries([1.0, 2.0, 3.0, 4.0], 2)
              [2.5]
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    numbers = numbers[~np.isnan(numbers)]
    if num_buckets < 1:
        raise ValueError(f"num_buckets: got {num_buckets}, expected at least 1.")
    if len(numbers) == 0:
        raise ValueError("values: got only NaN, expected numbers to fit boundaries to.")
    quantiles = np.quantile(numbers, np.arange(1, num_buckets) / num_buckets)
    return np.unique(quantiles.astype(np.float32)).tolist()
