"""What a step does about NaN and infinity: it checks, counts, and leaves a batch out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from recfx.kernels.dense.all_finite import all_finite, are_finite, finite_parts
from recfx.kernels.index import untouch_rows
from recfx.step.state import NonFinite
from recfx.table import Found, TableState
from recfx.types import Params

__all__ = [
    "clean_padding",
    "count_nonfinite_",
    "gradients_finite",
    "kept",
    "outputs_finite",
    "untouch_",
]


def clean_padding(feats: dict[str, Any], valid: Tensor) -> dict[str, Any]:
    """The features with 0 for NaN and infinity in samples that are padding.

    A logarithm of the zeros that fill a short batch would otherwise reach every gradient: 0 times infinity is NaN.
    """

    def cleaned(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.shape[:1] != valid.shape[:1]:
            return t
        return torch.where(valid.view(-1, *[1] * (t.dim() - 1)) | (t.abs() < torch.inf), t, 0.0)

    return {name: cleaned(value) for name, value in feats.items()}


def outputs_finite(outputs: Mapping[str, Any], loss_B: Tensor, valid: Tensor) -> Tensor:
    """bool []: no real sample has an output or a loss that is NaN or infinite, nor is their sum.

    By the sum, which a CPU takes many at a time, and the step has the one of the loss anyway.
    """
    sums = [kept(t.float(), valid).sum().abs() for t in tree_leaves(outputs)]
    return sum(sums[1:], sums[0]) + loss_B.sum().abs() < torch.inf


def gradients_finite(
    grads: Params, row_grads: Sequence[Sequence[Tensor]], sums: Sequence[TableState] | None = None
) -> Tensor:
    """bool []: no gradient of a batch is NaN or infinite.

    Args:     row_grads: of the pooled rows of each table.
              sums: tables that hold the sums of these by row, and of no other batch. On a CPU the sums are read
              instead: they are fewer, and in the cache.
    """
    numbers = [*grads.values(), *(g for of_table in row_grads for g in of_table)]
    if numbers[0].device.type != "cpu":
        return finite_parts(numbers).all()
    if sums is not None:
        numbers = [*grads.values()]
    others = [g for g in numbers if g.dtype != torch.float32]
    numbers, states = [g for g in numbers if g.dtype == torch.float32], sums or []
    found = all_finite(numbers, [s.grads for s in states], [s.counters for s in states])
    return found & are_finite(others) if others else found


def kept(t: Tensor, there: Tensor) -> Tensor:
    """t [B, ...] of the samples that are there, bool [B, 1]; 0 of the others."""
    return torch.where(there if t.dim() == there.dim() else there.view(-1, *[1] * (t.dim() - 1)), t, 0.0)


def count_nonfinite_(counts: NonFinite, is_bad: Tensor, step: Tensor, batch: Tensor) -> None:
    """Counts a micro-batch that is bad: the one of that number in the optimiser step of that number."""
    is_first = is_bad & (counts.first_step == 0)
    first_step = torch.where(is_first, step, counts.first_step)
    first_batch = torch.where(is_first, batch, counts.first_batch)
    num_batches = counts.num_batches + is_bad
    for target, new in zip(counts, (first_step, first_batch, num_batches), strict=True):
        target.copy_(new)


def untouch_(s: TableState, found: Found, num_before: Tensor, counts: Tensor) -> Found:
    """Unless the batch counts, no row that it touched is among the step's, and no gradient of it reaches one."""
    own = found.own
    untouch_rows.untouch_rows_(s.seen, s.counters, own.row, own.inverse, num_before, counts)
    own = own._replace(inverse=torch.where(counts, own.inverse, -1))
    return own if found.requested is None else found._replace(requested=own)
