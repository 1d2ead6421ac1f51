"""take_lists: part of each list, copied end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["list_of", "take_lists"]


def list_of(offsets: Tensor, capacity: int) -> Tensor:
    """i64 [capacity]: the list that each place belongs to; number of lists after the last one."""
    place = torch.arange(capacity, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), place, right=True)


def definition(
    values: Sequence[Tensor], first: Sequence[Tensor], length: Sequence[Tensor], capacity: Sequence[int]
) -> list[Tensor]:
    """List l of column c becomes values[c][first[c][l] : first[c][l] + length[c][l]].

    Shapes:   values[c] [any], first[c] and length[c] i32 [lists]. Lists may overlap and be in any order.
    Returns:  for each column values [capacity[c]], 0 after the last list, and offsets i32 [lists + 1]. Lists
              beyond the capacity are cut: the caller knows that there are none.
    """
    out = []
    for v, f, n, size in zip(values, first, length, capacity, strict=True):
        ends = n.long().cumsum(0).clamp(max=size).int()
        offsets = torch.cat([ends.new_zeros(1), ends])
        owner = list_of(offsets, size)
        place = torch.arange(size, device=v.device)
        is_value, owner = owner < len(n), owner.clamp(max=max(len(n) - 1, 0))
        if size and len(n) and v.numel():
            source = torch.where(is_value, f.long()[owner] + place - offsets.long()[owner], 0)
            out += [torch.where(is_value, v[source], 0), offsets]
        else:
            out += [v.new_zeros(size), offsets]
    return out


def _fake(values, first, length, capacity):  # type: ignore[no-untyped-def]
    pairs = zip(values, first, capacity, strict=True)
    return [t for v, f, size in pairs for t in (v.new_empty(size), f.new_empty(f.shape[0] + 1))]


take_lists = define_op(
    "take_lists",
    definition=definition,
    cuda="lists.gpu.take_lists",
    fake=_fake,
)
