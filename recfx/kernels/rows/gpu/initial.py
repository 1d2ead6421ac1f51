"""Initial weights on a GPU: the arithmetic of `table.h`, so that a row starts alike on both."""

from __future__ import annotations

import triton
import triton.language as tl

from recfx.kernels.index.gpu.hashing import GOLDEN, mix

__all__ = ["initial_values"]


@triton.jit
def log_positive(x):
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # x = 2^e m, m in [sqrt(1/2), sqrt(2))
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    poly = 2.0 * s * (1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9)))))
    return poly + e.to(tl.float32) * 0.69314718056


@triton.jit
def erfinv(x):
    """Giles, "Approximating the erfinv function", GPU Computing Gems 2, 2010, single precision."""
    w = -log_positive((1.0 - x) * (1.0 + x))
    a = w - 2.5
    p = 3.43273939e-07 + 2.81022636e-08 * a
    p = -3.5233877e-06 + p * a
    p = -4.39150654e-06 + p * a
    p = 0.00021858087 + p * a
    p = -0.00125372503 + p * a
    p = -0.00417768164 + p * a
    p = 0.246640727 + p * a
    p = 1.50140941 + p * a
    b = tl.sqrt_rn(w) - 3.0
    q = 0.000100950558 - 0.000200214257 * b
    q = 0.00134934322 + q * b
    q = -0.00367342844 + q * b
    q = 0.00573950773 + q * b
    q = -0.0076224613 + q * b
    q = 0.00943887047 + q * b
    q = 1.00167406 + q * b
    q = 2.83297682 + q * b
    return tl.where(w < 5.0, p, q) * x


@triton.jit
def initial_values(init_keys, init_params, width, vocabulary, id, column, mask):
    """f32 [rows, columns] of i32 vocabularies and i64 ids [rows, 1] and i32 columns [1, columns]."""
    key = tl.load(init_keys + vocabulary * width + column, mask=mask, other=0)
    of_id = id.to(tl.uint64, bitcast=True) * GOLDEN
    bits = (mix(of_id ^ key.to(tl.uint64, bitcast=True)) >> 41).to(tl.int32)
    x = (2 * bits + 1 - (1 << 23)).to(tl.float32) * (1.0 / (1 << 23))
    params = init_params + vocabulary * 3 * width + column
    loc = tl.load(params, mask=mask, other=0.0)
    scale = tl.load(params + width, mask=mask, other=0.0)
    cover = tl.load(params + 2 * width, mask=mask, other=0.0)
    normal = 1.41421356237 * erfinv(cover * x)
    return loc + scale * tl.where(cover == 0.0, x, normal)
