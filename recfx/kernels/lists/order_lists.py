"""order_lists: as order_ids, for lists that are tiled or weighted. list_sums: the sum of each list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.lists.order_ids import check_offsets
from recfx.kernels.lists.take_lists import list_of
from recfx.kernels.op import define_op

__all__ = ["list_sums", "order_lists"]


def definition(
    values: Sequence[Tensor], offsets: Sequence[Tensor], weights: Sequence[Tensor | None], lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in the order (sample, lookup, place in the list), where each belongs, and its weight.

    A lookup of length 0 is one cell of its sample: all its ids belong there. One of length n is n cells: the first n
    ids have one each, the others are left out.

    Shapes:   values[l] i64 [capacity of lookup l], offsets[l] i32 [B + 1], weights[l] f32 like values[l] or None
              -> id_P i64 [P], cell_P i32 [P], weight_P f32 [P], P the sum of capacities; a weight is 1 without weights.
              Padding follows the last id: id 0, cell -1, weight 0.
    Raises:   as `order_ids`; RuntimeError when a lookup has not one weight for each id.
    """
    check_offsets(values, offsets)
    for lookup, (value, weight) in enumerate(zip(values, weights, strict=True)):
        if weight is not None and weight.numel() != value.numel():
            raise RuntimeError(
                f"weights of lookup {lookup}: got {weight.numel()}, expected {value.numel()}, one for each id."
            )
    num_cells = sum(max(length, 1) for length in lengths)
    ids, cells, kept_weights, first = [], [], [], 0
    for value, offset, weight, length in zip(values, offsets, weights, lengths, strict=True):
        sample = list_of(offset, value.numel())
        place = torch.arange(value.numel(), device=value.device)
        real = (place >= offset[0]) & (place < offset[-1])
        in_list = place - offset.long()[sample]
        kept = real & (in_list < length) if length else real
        cell = sample * num_cells + first + (in_list if length else 0)
        ids.append(value[kept])
        cells.append(cell[kept])
        kept_weights.append(value.new_ones(len(ids[-1]), dtype=torch.float32) if weight is None else weight[kept])
        first += max(length, 1)
    cell_in_order, order = torch.sort(torch.cat(cells), stable=True)
    id_P, cell_P, weight_P = (t.zero_() for t in _fake(values, offsets, weights, lengths))
    id_P[: len(order)], weight_P[: len(order)] = torch.cat(ids)[order], torch.cat(kept_weights)[order]
    cell_P.fill_(-1)[: len(order)] = cell_in_order.int()
    return id_P, cell_P, weight_P


def _fake(values, offsets, weights, lengths):  # type: ignore[no-untyped-def]
    num_positions = sum(v.numel() for v in values)
    weight_P = values[0].new_empty(num_positions, dtype=torch.float32)
    return values[0].new_empty(num_positions), offsets[0].new_empty(num_positions), weight_P


order_lists = define_op(
    "order_lists",
    definition=definition,
    cuda="lists.gpu.order_lists",
    fake=_fake,
)


def list_sums_definition(values: Tensor, offsets: Tensor) -> Tensor:
    """The sum of values[offsets[l] : offsets[l + 1]], in order and in f64: a list of 2**24 ones and more is counted.

    Shapes:   f32 [capacity], i32 [B + 1] -> f32 [B].
    """
    num_lists, numbers = offsets.numel() - 1, values.double()
    sums = numbers.new_zeros(num_lists + 1).index_add(0, list_of(offsets, values.numel()), numbers)
    return sums[:num_lists].float()


def _list_sums_fake(values, offsets):  # type: ignore[no-untyped-def]
    return values.new_empty(offsets.numel() - 1)


list_sums = define_op(
    "list_sums",
    definition=list_sums_definition,
    cuda="lists.gpu.order_lists",
    fake=_list_sums_fake,
)
