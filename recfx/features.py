"""Feature ops: pure functions on dense tensors [B, d] and Ragged lists. Nothing is written to its input."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.types import Ragged

__all__ = ["log1p", "select_dense", "select_ragged"]


def select_dense(column: Tensor | Ragged, dim: int = 1) -> Tensor:
    """The first `dim` numbers of each sample, missing ones as 0.

    Shapes:   Ragged f32 or Tensor [B, >= dim] -> f32 [B, dim].
    Example:  >>> select_dense(Ragged(torch.tensor([5.0, 7.0]), torch.tensor([0, 1, 1, 2]).int())).tolist()
              [[5.0], [0.0], [7.0]]
    """
    if isinstance(column, Tensor):
        return column[:, :dim]
    first, last = column.offsets[:-1, None].long(), column.offsets[1:, None]
    place = first + torch.arange(dim, device=first.device)
    values = column.values if column.values.numel() else column.values.new_zeros(1)
    value = values[place.clamp(max=values.numel() - 1)]
    return torch.where(place < last, value, 0.0)


def select_ragged(column: Ragged) -> Ragged:
    """The column as it is, for an embedding to read.

    Raises:   TypeError when the column is dense.
    """
    if not isinstance(column, Ragged):
        raise TypeError(f"column: got {type(column).__name__}, expected Ragged. Declare it varlen in the reader.")
    return column


def log1p(x: Tensor) -> Tensor:
    """log(1 + max(x, 0)): tames counts that span six orders of magnitude."""
    return torch.log1p(x.clamp(min=0))
