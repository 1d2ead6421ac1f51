"""pool: rows gathered and summed per sample and lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.initial import initial_values
from recfx.kernels.op import REFUSED, define_op

__all__ = ["pool"]


def definition(
    rows: Tensor,
    row_P: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
    batch_size: int,
    init_keys: Tensor,
    init_params: Tensor,
    firsts: Sequence[int],
    dims: Sequence[int],
) -> list[Tensor]:
    """The sum of each list's weights, one block f32 [B, L, dims[s]] per slice of columns firsts[s] .. + dims[s].

    An UNKNOWN row adds zeros, a REFUSED one its initial value.

    Shapes:   rows f32 [R, 1 + slots, W], row_P i32 [P]; id_P, cell_P, vocabularies as in `find`; init as in
              `find_or_insert_`.
    """
    valid = cell_P >= 0
    row, cell = row_P[valid].long(), cell_P[valid].long()
    vocabulary = vocabularies[cell % len(vocabularies)].long()
    weight = torch.where((row >= 0)[:, None], rows[row.clamp(min=0), 0], 0)
    initial = initial_values(id_P[valid], init_keys[vocabulary], init_params[vocabulary])
    weight = torch.where((row == REFUSED)[:, None], initial, weight)
    pooled = rows.new_zeros(batch_size * len(vocabularies), rows.shape[2]).index_add(0, cell, weight)
    pooled = pooled.view(batch_size, len(vocabularies), rows.shape[2])
    return [pooled[:, :, first : first + dim].contiguous() for first, dim in zip(firsts, dims, strict=True)]


def _fake(rows, row_P, id_P, cell_P, vocabularies, batch_size, init_keys, init_params, firsts, dims):  # type: ignore[no-untyped-def]
    return [rows.new_empty(batch_size, len(vocabularies), dim) for dim in dims]


pool = define_op(
    "pool(Tensor rows, Tensor row_P, Tensor id_P, Tensor cell_P, Tensor vocabularies, int batch_size,"
    " Tensor init_keys, Tensor init_params, int[] firsts, int[] dims) -> Tensor[]",
    definition=definition,
    fake=_fake,
)
