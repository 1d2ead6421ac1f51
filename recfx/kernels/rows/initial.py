"""Initial weights as a counter-based function of (seed, logical table, id, column), in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recfx.kernels.index.hashing import GOLDEN, mix, shift_right

__all__ = ["initial_values"]


def initial_values(id: Tensor, keys: Tensor, params: Tensor) -> Tensor:
    """value_c = loc_c + scale_c * quantile_c(x_c), x_c uniform in (-1, 1) drawn from (key_c, id).

    quantile_c(x) = x where cover_c is 0, else the normal quantile of the central share cover_c of the distribution:
    cover 1 is the normal, cover = erf(t / sqrt(2)) is the normal truncated at t standard deviations.

    Shapes:   id i64 [U], keys i64 [U, W], params f32 [U, 3, W] (loc, scale, cover) -> f32 [U, W].
    """
    bits = shift_right(mix((id * GOLDEN)[:, None] ^ keys), 41)
    x = (2 * bits + 1 - 2**23).double() / 2**23
    loc, scale, cover = params.unbind(1)
    normal = math.sqrt(2) * torch.erfinv(cover.double() * x)
    return (loc + scale * torch.where(cover == 0, x, normal)).float()
