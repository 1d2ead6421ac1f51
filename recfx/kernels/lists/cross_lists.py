"""cross_lists: the pairs of distinct ids of two ragged features, hashed."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.lists.string_hash import MURMUR, murmur_end, murmur_word
from recfx.kernels.lists.take_lists import list_of
from recfx.kernels.op import define_op

__all__ = ["cross_lists", "hash_pair"]


def hash_pair(x: Tensor, y: Tensor) -> Tensor:
    """MurmurHash64A with seed 0 of the 16 bytes of x and y, little-endian."""
    hash = torch.full_like(x, 16) * MURMUR
    return murmur_end(murmur_word(murmur_word(hash, x), y))


def definition(
    x: Tensor,
    x_offsets: Tensor,
    x_weights: Tensor | None,
    y: Tensor,
    y_offsets: Tensor,
    y_weights: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per sample, in the order of first occurrence, for each distinct x, for each distinct y: `hash_pair(x, y)`.

    A pair's weight is the product of the weights at the first occurrences, 1 where a side has none.

    Shapes:   x i64 [any], x_offsets i32 [B + 1], x_weights f32 [any]; y the same with the same B.
    Returns:  values i64 [capacity], weights f32 [capacity], offsets i32 [B + 1], overflow i64 []: how many pairs found
              no room. The pairs kept are the first ones in order; 0 follows the last.
    """
    x, x_weights, num_x, x_first = _distinct(x, x_offsets, x_weights)
    y, y_weights, num_y, y_first = _distinct(y, y_offsets, y_weights)
    total = (num_x * num_y).cumsum(0)
    ends = total.clamp(max=capacity).int()
    offsets = torch.cat([ends.new_zeros(1), ends])
    overflow = total[-1] - offsets[-1] if len(total) else total.new_zeros(())
    if not (capacity and len(total) and x.numel() and y.numel()):
        return x.new_zeros(capacity), x_weights.new_zeros(capacity), offsets, overflow
    owner = list_of(offsets, capacity)
    is_pair, owner = owner < len(total), owner.clamp(max=len(total) - 1)
    nth, columns = torch.arange(capacity, device=x.device) - offsets.long()[owner], num_y[owner].clamp(min=1)
    at_x = torch.where(is_pair, x_first[owner] + nth // columns, 0)
    at_y = torch.where(is_pair, y_first[owner] + nth % columns, 0)
    values = torch.where(is_pair, hash_pair(x[at_x], y[at_y]), 0)
    return values, torch.where(is_pair, x_weights[at_x] * y_weights[at_y], 0), offsets, overflow


def _distinct(values: Tensor, offsets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct values of each list end to end, their weights, and each list's count and first place."""
    capacity, num_lists = values.numel(), offsets.numel() - 1
    owner = list_of(offsets, capacity)
    by_value = torch.sort(values, stable=True).indices
    order = by_value[torch.sort(owner[by_value], stable=True).indices]  # of equal values in a list the first leads
    leads = torch.ones_like(order, dtype=torch.bool)
    leads[1:] = (values[order].diff() != 0) | (owner[order].diff() != 0)
    is_first = torch.empty_like(leads).scatter(0, order, leads) & (owner < num_lists)
    rank = is_first.cumsum(0)
    place = torch.where(is_first, rank - 1, capacity)  # one more place for what is dropped
    distinct = values.new_zeros(capacity + 1).scatter(0, place, values)
    weights = torch.ones_like(values, dtype=torch.float32) if weights is None else weights
    kept = weights.new_zeros(capacity + 1).scatter(0, place, weights)
    before = torch.cat([rank.new_zeros(1), rank])[offsets.long()]
    return distinct[:capacity], kept[:capacity], before.diff(), before[:-1]


def _fake(x, x_offsets, x_weights, y, y_offsets, y_weights, capacity):  # type: ignore[no-untyped-def]
    weights = x.new_empty(capacity, dtype=torch.float32)
    return x.new_empty(capacity), weights, torch.empty_like(x_offsets), x.new_empty(())


cross_lists = define_op(
    "cross_lists",
    definition=definition,
    cuda="lists.gpu.cross_lists",
    fake=_fake,
)
