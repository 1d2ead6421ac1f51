"""all_finite: whether the gradients of a step are finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_UNIQUE
from recfx.kernels.op import define_op

__all__ = ["PARTS", "all_finite", "are_finite", "finite_parts"]

PARTS = 512  # programs of a launch on a GPU, a few for each multiprocessor


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """bool []: no NaN and no infinity in any of them. Plain torch, which a compiler fuses with what made them."""
    largest = [t.abs().amax() for t in tensors if t.numel()]
    if not largest:
        return torch.ones((), dtype=torch.bool)
    return (largest[0] if len(largest) == 1 else torch.stack(largest).amax()) < torch.inf  # NaN is the largest of all


def definition(tensors: Sequence[Tensor], grads: Sequence[Tensor], counters: Sequence[Tensor]) -> Tensor:
    """bool []: `tensors` and the first NUM_UNIQUE rows of each grads[t] are finite.

    Shapes:   tensors f32, of any shape; grads[t] f32 [U, W], counters[t] as in `TableState`; at least one of either.
    """
    rows = [g[: int(c[NUM_UNIQUE])] for g, c in zip(grads, counters, strict=True)]
    return are_finite([*tensors, *rows]).to(_fake(tensors, grads, counters).device)


def _fake(tensors: Sequence[Tensor], grads: Sequence[Tensor], counters: Sequence[Tensor]) -> Tensor:
    return [*tensors, *grads][0].new_empty((), dtype=torch.bool)


all_finite = define_op(
    "all_finite",
    definition=definition,
    fake=_fake,
)


def finite_parts_definition(grads: Sequence[Tensor]) -> Tensor:
    """bool [PARTS]: shares of the tensors that hold no NaN and no infinity; which share holds what is not said.

    For a GPU: its one launch needs no counter that another clears, and the loop that reads the answer comes anyway.

    Shapes:   grads of floats, of any shape and strides.
    """
    return are_finite(grads).to(grads[0].device).expand(PARTS).clone()


def finite_parts_fake(grads: Sequence[Tensor]) -> Tensor:
    """An empty result."""
    return grads[0].new_empty(PARTS, dtype=torch.bool)


finite_parts = define_op(
    "finite_parts",
    definition=finite_parts_definition,
    on_cpu=False,
    cuda="dense.gpu.all_finite",
    fake=finite_parts_fake,
)
