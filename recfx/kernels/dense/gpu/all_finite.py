"""finite_parts on a GPU: all tensors walked by one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.dense.all_finite import PARTS, finite_parts_fake

__all__ = ["finite_parts", "is_number"]

BLOCK = 1024  # numbers of a tensor that a program looks at at once


@triton.jit
def is_number(x):
    """False of NaN and infinity. Of 16 bits, by those of the exponent."""
    if x.dtype.primitive_bitwidth == 16:
        exponent: tl.constexpr = 0x7F80 if x.dtype.is_bf16() else 0x7C00
        return (x.to(tl.int16, bitcast=True) & exponent) != exponent
    return tl.abs(x) < float("inf")


@triton.jit
def look(is_finite, tensors, sizes, BLOCK: tl.constexpr):
    nothing_bad = tl.full([BLOCK], 1, tl.int32)
    begin, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0) * BLOCK
    for t in tl.static_range(len(tensors)):
        for first in range(begin, sizes[t], step):
            at = first + tl.arange(0, BLOCK)
            number = tl.load(tensors[t] + at, mask=at < sizes[t], other=0.0)
            nothing_bad &= is_number(number).to(tl.int32)
    tl.store(is_finite + tl.program_id(0), tl.min(nothing_bad, axis=0) > 0)


def finite_parts(grads: Sequence[Tensor]) -> Tensor:
    """`recfx.kernels.dense.all_finite.finite_parts_definition`."""
    is_finite = finite_parts_fake(grads)
    numbers = [_once(g) for g in grads if g.numel()]
    look[(PARTS,)](is_finite, tuple(numbers), tuple(g.numel() for g in numbers), BLOCK=BLOCK)
    return is_finite


def _once(t: Tensor) -> Tensor:
    """Its numbers, contiguous; where one place in memory stands for many of them, as in a gradient that was expanded,
    that place once."""
    for d, stride in enumerate(t.stride()):
        if stride == 0:
            t = t.narrow(d, 0, 1)
    return t.contiguous()
