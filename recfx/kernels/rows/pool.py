"""pool: rows gathered and summed per sample and lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.op import define_op
from recfx.kernels.rows.initial import initial_values

__all__ = ["LONG", "pool", "pool_lists"]

LONG = 2**16


def definition(
    rows: Tensor,
    row_P: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
    batch_size: int,
    init_keys: Tensor,
    unknown_params: Tensor | None,
    firsts: Sequence[int],
    dims: Sequence[int],
    weight_P: Tensor | None = None,
) -> list[Tensor]:
    """The sum of each list's rows, one block f32 [B, L, dims[s]] per slice of columns firsts[s] .. + dims[s].

    Sums are f32; of a sample with LONG ids or more f64, so that 2**24 ones and more are counted, but not on a GPU. With
    weights, a row is multiplied by its id's. An id without a row (row_P < 0) adds what `initial_values` makes of
    unknown_params, zeros without them. Padding adds nothing.

    Shapes:   rows f32 [R, 1 + slots, W], row_P i32 [P] as `find` gives it; the others as there; init_keys and
              unknown_params like init_keys and init_params of `find_or_insert_`; weight_P f32 [P].
    """
    valid = cell_P >= 0
    row, cell = row_P[valid].long(), cell_P[valid].long()
    vocabulary = vocabularies[cell % len(vocabularies)].long()
    values = torch.where((row >= 0)[:, None], rows[row.clamp(min=0), 0], 0)
    if unknown_params is not None:
        initial = initial_values(id_P[valid], init_keys[vocabulary], unknown_params[vocabulary])
        values = torch.where((row < 0)[:, None], initial, values)
    values = values if weight_P is None else values * weight_P[valid][:, None]
    sample = cell // len(vocabularies)
    is_long = torch.bincount(sample, minlength=batch_size)[sample] >= LONG
    zeros = rows.new_zeros(batch_size * len(vocabularies), rows.shape[2])
    long = zeros.double().index_add(0, cell[is_long], values[is_long].double()).float()
    pooled = zeros.index_add(0, cell[~is_long], values[~is_long]) + long
    pooled = pooled.view(batch_size, len(vocabularies), rows.shape[2])
    return [pooled[:, :, first : first + dim].contiguous() for first, dim in zip(firsts, dims, strict=True)]


def _fake(rows, row_P, id_P, cell_P, vocabularies, batch_size, init_keys, unknown_params, firsts, dims, weight_P=None):  # type: ignore[no-untyped-def]
    return [rows.new_empty(batch_size, len(vocabularies), dim) for dim in dims]


pool = define_op(
    "pool",
    definition=definition,
    cuda="rows.gpu.pool",
    fake=_fake,
)


def lists_definition(
    rows: Tensor,
    row_P: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    ends: Tensor,
    vocabularies: Tensor,
    batch_size: int,
    init_keys: Tensor,
    unknown_params: Tensor | None,
    firsts: Sequence[int],
    dims: Sequence[int],
) -> list[Tensor]:
    """`pool` where `order_ids_ends` gives the position at which each list ends, i32 [B * L]: one launch on a GPU.

    Cells are those of `order_ids_ends`, or -1 for an id that is padding.
    """
    return definition(rows, row_P, id_P, cell_P, vocabularies, batch_size, init_keys, unknown_params, firsts, dims)


def _lists_fake(rows, row_P, id_P, cell_P, ends, vocabularies, batch_size, init_keys, unknown_params, firsts, dims):  # type: ignore[no-untyped-def]
    return [rows.new_empty(batch_size, len(vocabularies), dim) for dim in dims]


pool_lists = define_op(
    "pool_lists",
    definition=lists_definition,
    on_cpu=False,
    cuda="rows.gpu.pool",
    fake=_lists_fake,
)
