"""select_lists: the first numbers of each list of many columns, as one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["select_lists"]


def definition(values: Sequence[Tensor], offsets: Sequence[Tensor], dim: int, fill: float) -> Tensor:
    """The first `dim` numbers of each list, `fill` where there are fewer, columns side by side.

    Shapes:   values[c] f32 [any], offsets[c] i32 [B + 1] -> f32 [B, columns * dim].
    """
    out = []
    for value, offset in zip(values, offsets, strict=True):
        place = offset[:-1, None].long() + torch.arange(dim, device=offset.device)
        value = torch.cat([value, value.new_zeros(1)])
        number = value[place.clamp(max=value.numel() - 1)]
        out.append(torch.where(place < offset[1:, None], number, fill))
    return torch.cat(out, dim=1)


def _fake(values: Sequence[Tensor], offsets: Sequence[Tensor], dim: int, fill: float) -> Tensor:
    return values[0].new_empty(offsets[0].shape[0] - 1, len(values) * dim)


select_lists = define_op(
    "select_lists",
    definition=definition,
    cuda="lists.gpu.select_lists",
    fake=_fake,
)
