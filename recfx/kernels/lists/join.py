"""join: tensors end to end, in one call that no compiler takes apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["join", "split"]


def definition(parts: Sequence[Tensor]) -> Tensor:
    """All items of the parts, end to end. Inductor would write torch.cat as a loop per part: 200 take it a minute.

    Shapes:   any, of one dtype -> [items].
    """
    return torch.cat([part.flatten() for part in parts])


def _fake(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(sum(part.numel() for part in parts))


join = define_op("join", definition=definition, fake=_fake)


def split(joined: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Views of `joined` of the shapes of the parts."""
    pieces = joined.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
