"""order_ids: the ids of all lookups of a table as one list in the table's order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["check_offsets", "order_ids", "order_ids_at", "order_ids_ends", "uses_ends"]


def check_offsets(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> None:
    """Raises RuntimeError when a lookup's ids would be read outside their tensor.

    The same in ops.cpp. A Triton kernel, which cannot raise, reads padding there.
    """
    num_lists = offsets[0].numel() - 1
    for lookup, (value, offset) in enumerate(zip(values, offsets, strict=True)):
        if offset.numel() != num_lists + 1:
            raise RuntimeError(
                f"offsets of lookup {lookup}: got {offset.numel()} numbers, expected {num_lists + 1}, as many as of "
                "lookup 0. Lookups are of the same samples."
            )
        least = torch.cat([offset.new_zeros(1), offset[:-1]])
        wrong = torch.nonzero((offset < least) | (offset > value.numel()))[:, 0].tolist()
        if wrong:
            raise RuntimeError(
                f"offsets of lookup {lookup}: got {int(offset[wrong[0]])} at place {wrong[0]}, expected "
                f"{int(least[wrong[0]])} to {value.numel()}: offsets never fall and end within the values. Ids would "
                "be read outside their tensor. Make Ragged features with recfx.types.pack, or correct these offsets."
            )


def definition(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids in the order (sample, lookup, place in the list), and where each belongs.

    Shapes:   values[l] i64 [capacity of lookup l], offsets[l] i32 [B + 1]
              -> id_P i64 [P], cell_P i32 [P], P the sum of capacities; cell = sample * L + lookup.
              Padding follows the last id: id 0, cell -1.
    Raises:   RuntimeError when offsets fall, begin below 0 or end beyond the values; on a GPU, where a kernel cannot
              raise, those ids are padding.
    """
    check_offsets(values, offsets)
    id, cell = [], []
    for lookup, (value, offset) in enumerate(zip(values, offsets, strict=True)):
        place = torch.arange(int(offset[0]), int(offset[-1]), device=value.device)
        sample = torch.bucketize(place, offset[1:].long(), right=True)
        id.append(value[place])
        cell.append(sample * len(values) + lookup)
    cell_in_order, order = torch.sort(torch.cat(cell), stable=True)
    num_positions = sum(v.numel() for v in values)
    id_P = values[0].new_zeros(num_positions)
    cell_P = offsets[0].new_full((num_positions,), -1)
    id_P[: len(order)], cell_P[: len(order)] = torch.cat(id)[order], cell_in_order.int()
    return id_P, cell_P


def _fake(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    num_positions = sum(v.numel() for v in values)
    return values[0].new_empty(num_positions), offsets[0].new_empty(num_positions)


order_ids = define_op(
    "order_ids",
    definition=definition,
    fake=_fake,
    cuda="lists.gpu.order_lists",
)


def uses_ends(device: torch.device) -> bool:
    """Whether `pool_lists` is the faster one there: on a CPU `pool` finds the lists while it reads the cells."""
    return device.type == "cuda"


def ends_definition(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`order_ids`, and at which position each list ends: i32 [B * L], by cell."""
    id_P, cell_P = definition(values, offsets)
    ends = torch.stack([offset.diff() for offset in offsets], dim=1).flatten().cumsum(0, dtype=torch.int32)
    return id_P, cell_P, ends


def _ends_fake(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake(values, offsets), offsets[0].new_empty((offsets[0].numel() - 1) * len(offsets))


order_ids_ends = define_op(
    "order_ids_ends",
    definition=ends_definition,
    on_cpu=False,
    fake=_ends_fake,
    cuda="lists.gpu.order_lists",
)


def _at_definition(
    values: Sequence[Tensor], offsets: Sequence[Tensor], places: Sequence[int], num_samples: int
) -> tuple[Tensor, Tensor]:
    """`order_ids` of lists that are parts of a few tensors, as the columns of a packed batch are.

    A view of each would be the same, but costs the host 0.7 us to make, and there are two per column.

    Args:     places: five numbers per lookup: which of `values`, its first item there, its capacity; which of
              `offsets`, its first item there.
    """
    parts = [places[i : i + 5] for i in range(0, len(places), 5)]
    return definition(
        [values[v][first : first + capacity] for v, first, capacity, _, _ in parts],
        [offsets[o][first : first + num_samples + 1] for _, _, _, o, first in parts],
    )


def _at_fake(
    values: Sequence[Tensor], offsets: Sequence[Tensor], places: Sequence[int], num_samples: int
) -> tuple[Tensor, Tensor]:
    num_positions = sum(places[2::5])
    return values[0].new_empty(num_positions), offsets[0].new_empty(num_positions)


order_ids_at = define_op(
    "order_ids_at",
    definition=_at_definition,
    fake=_at_fake,
)
