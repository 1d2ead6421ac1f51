"""A user's own combiner, on the rows of each sample's list."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.checks import said
from recfx.embeddings import Combiner, Lookup
from recfx.types import Ragged

__all__ = ["combined"]


def combined(combiner: Combiner, rows: Tensor, ids: Ragged, lookup: Lookup) -> Tensor:
    """What the combiner makes of each list's first rows, which are already multiplied by the ids' weights.

    Shapes:   rows f32 [B, length, D] -> f32 [B, 1, D].
    Raises:   TypeError when it returns something that is not a tensor, ValueError on another dtype or shape.
    """
    # A combiner may write into what it is given; a graph drops the copy.
    made = combiner.function(rows.clone(), _is_there(ids, combiner.length, lookup.padding_id))
    expected = rows.dtype, [rows.shape[0], rows.shape[2]]
    if not isinstance(made, Tensor) or (made.dtype, list(made.shape)) != expected:
        error = ValueError if isinstance(made, Tensor) else TypeError
        raise error(
            f"feature '{lookup.feature}', {combiner}: got {said(made)} returned, expected a tensor {expected[0]} "
            f"{expected[1]}, [B, D]. Each sample's list becomes one row. Reduce dim 1 of the rows."
        )
    return made[:, None]


def _is_there(ids: Ragged, length: int, padding_id: int | None) -> Tensor:
    """bool [B, length]: places of each list that hold an id, other than padding."""
    place = torch.arange(length, device=ids.offsets.device)
    begin, end = ids.offsets[:-1, None].long(), ids.offsets[1:, None].long()
    is_there = begin + place < end
    if padding_id is None or ids.values.numel() == 0:
        return is_there
    at = (begin + place).clamp(max=ids.values.numel() - 1)
    return is_there & (ids.values[at] != padding_id)
