"""all_finite: whether the gradients of a step are finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["all_finite", "are_finite"]


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """bool []: no NaN and no infinity in any of them. Plain torch, which a compiler fuses with what made them."""
    largest = [t.abs().amax() for t in tensors if t.numel()]
    if not largest:
        return torch.ones((), dtype=torch.bool)
    return (largest[0] if len(largest) == 1 else torch.stack(largest).amax()) < torch.inf  # NaN is the largest of all


def definition(tensors: Sequence[Tensor], grads: Sequence[Tensor], num_unique: Sequence[Tensor]) -> Tensor:
    """bool []: `tensors` and the first num_unique[t] rows of each grads[t] are finite.

    Shapes:   tensors f32, of any shape; grads[t] f32 [U, W], num_unique[t] i64 []; at least one of either.
    """
    rows = [g[: int(n)] for g, n in zip(grads, num_unique, strict=True)]
    return are_finite([*tensors, *rows]).to(_fake(tensors, grads, num_unique).device)


def _fake(tensors: Sequence[Tensor], grads: Sequence[Tensor], num_unique: Sequence[Tensor]) -> Tensor:
    return [*tensors, *grads][0].new_empty((), dtype=torch.bool)


all_finite = define_op(
    "all_finite(Tensor[] tensors, Tensor[] grads, Tensor[] num_unique) -> Tensor",
    definition=definition,
    fake=_fake,
)
