"""pool: rows gathered and summed per sample and lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.initial import initial_values
from recfx.kernels.op import REFUSED, address, addresses, c_function, define_op, int64s, lookup_positions

__all__ = ["pool"]


def definition(
    rows: Tensor,
    row_P: Tensor,
    values: Tensor,
    offsets: Tensor,
    starts: Sequence[int],
    vocabularies: Tensor,
    init_keys: Tensor,
    init_params: Tensor,
    firsts: Sequence[int],
    dims: Sequence[int],
) -> list[Tensor]:
    """The sum of each list's weights, one block f32 [B, L, dims[s]] per slice of columns firsts[s] .. + dims[s].

    An UNKNOWN row adds zeros, a REFUSED one its initial value.

    Shapes:   rows f32 [R, 1 + slots, W], row_P i32 [P]; reading list as in `find`; init as in `find_or_insert_`.
    """
    position, sample, lookup = lookup_positions(offsets, starts)
    row, vocabulary = row_P[position].long(), vocabularies[lookup].long()
    weight = torch.where((row >= 0)[:, None], rows[row.clamp(min=0), 0], 0)
    initial = initial_values(values[position], init_keys[vocabulary], init_params[vocabulary])
    weight = torch.where((row == REFUSED)[:, None], initial, weight)
    cell = sample * len(starts) + lookup
    cells = rows.new_zeros((offsets.shape[1] - 1) * len(starts), rows.shape[2]).index_add(0, cell, weight)
    cells = cells.view(-1, len(starts), rows.shape[2])
    return [cells[:, :, first : first + dim].contiguous() for first, dim in zip(firsts, dims, strict=True)]


_pool = c_function("pool", "pii" + "ppp" + "pp" + "ii" + "ppi" + "ppp")


def _fake(rows, row_P, values, offsets, starts, vocabularies, init_keys, init_params, firsts, dims):  # type: ignore[no-untyped-def]
    return [rows.new_empty(offsets.shape[1] - 1, len(starts), dim) for dim in dims]


def _cpu(rows, row_P, values, offsets, starts, vocabularies, init_keys, init_params, firsts, dims):  # type: ignore[no-untyped-def]
    out = [rows.new_empty(offsets.shape[1] - 1, len(starts), dim) for dim in dims]
    _pool(
        address(rows),
        rows.shape[1],
        rows.shape[2],
        address(row_P),
        address(values),
        address(offsets),
        int64s(starts),
        address(vocabularies),
        len(starts),
        offsets.shape[1] - 1,
        address(init_keys),
        address(init_params),
        len(dims),
        int64s(firsts),
        int64s(dims),
        addresses(out),
    )
    return out


pool = define_op(
    "pool(Tensor rows, Tensor row_P, Tensor values, Tensor offsets, int[] starts, Tensor vocabularies,"
    " Tensor init_keys, Tensor init_params, int[] firsts, int[] dims) -> Tensor[]",
    definition=definition,
    cpu=_cpu,
    fake=_fake,
)
