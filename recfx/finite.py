"""What a step does about NaN and infinity: it looks, counts, and leaves a batch out. `nonfinite` tells of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.kernels.dense.all_finite import all_finite, are_finite, finite_parts
from recfx.kernels.index import untouch_rows
from recfx.table import Found, TableState
from recfx.types import Params

__all__ = [
    "NonFinite",
    "clean_padding",
    "counts_after",
    "gradients_finite",
    "outputs_finite",
    "untouch_",
]


class NonFinite(NamedTuple):
    """Micro-batches whose loss, logit or gradient was NaN or infinite, since the state was made."""

    first_step: Tensor  # i64 [], optimiser step of the first one, from 1; 0: there was none
    first_batch: Tensor  # i64 [], its place among the micro-batches of that step, from 0
    num_batches: Tensor  # i64 [], how many there were


def clean_padding(feats: dict[str, Any], valid: Tensor) -> dict[str, Any]:
    """The features with 0 for NaN and infinity in samples that are padding.

    A logarithm of the zeros that fill a short batch would otherwise reach every gradient: 0 times infinity is NaN.
    """

    def cleaned(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.shape[:1] != valid.shape[:1]:
            return t
        return torch.where(valid.view(-1, *[1] * (t.dim() - 1)) | (t.abs() < torch.inf), t, 0.0)

    return {name: cleaned(value) for name, value in feats.items()}


def outputs_finite(logit: Tensor, loss_B: Tensor, valid: Tensor) -> Tensor:
    """bool []: no real sample has a logit or a loss that is NaN or infinite, nor is their sum.

    By the sum, which a CPU takes many at a time, and the step has the one of the loss anyway.
    """
    total = torch.where(valid, logit.float(), 0.0).sum().abs() + loss_B.sum().abs()
    return total < torch.inf


def gradients_finite(grads: Params, block_grads: list[list[Tensor]], sums: list[TableState] | None = None) -> Tensor:
    """bool []: no gradient of a batch is NaN or infinite.

    Args:     sums: tables that hold the sums of the block gradients, and of no other batch. On a CPU those are read
              instead: they are fewer, and in the cache.
    """
    numbers = [*grads.values(), *(g for of_table in block_grads for g in of_table)]
    if numbers[0].device.type != "cpu":
        return finite_parts(numbers).all()
    if sums is not None:
        numbers = [*grads.values()]
    others = [g for g in numbers if g.dtype != torch.float32]
    numbers, states = [g for g in numbers if g.dtype == torch.float32], sums or []
    found = all_finite(numbers, [s.grads for s in states], [s.counters for s in states])
    return found & are_finite(others) if others else found


def counts_after(before: NonFinite, is_bad: Tensor, step: Tensor, batch: Tensor) -> NonFinite:
    """The counters after one more micro-batch of the optimiser step of that number."""
    is_first = is_bad & (before.first_step == 0)
    return NonFinite(
        torch.where(is_first, step, before.first_step),
        torch.where(is_first, batch, before.first_batch),
        before.num_batches + is_bad,
    )


def untouch_(s: TableState, found: Found, num_before: Tensor, counts: Tensor) -> tuple[TableState, Found]:
    """Unless the batch counts, no row that it touched is among the step's, and no gradient of it reaches one."""
    untouch_rows.untouch_rows_(s.seen, s.counters, found.row, found.inverse, num_before, counts)
    return s, found._replace(inverse=torch.where(counts, found.inverse, -1))
