"""farm_hashes and murmur_hashes on a GPU: one launch for all columns, a lane per string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.launch import BLOCK, chosen, list_bounds
from recfx.kernels.lists import string_hash

__all__ = ["farm_hashes", "hash_pair", "murmur_hashes"]

MURMUR = tl.constexpr(string_hash.MURMUR % 2**64)
FARM0, FARM1, FARM2 = (tl.constexpr(k % 2**64) for k in (string_hash.FARM0, string_hash.FARM1, string_hash.FARM2))
FARM_X, FARM_Y = tl.constexpr(81 * FARM2.value % 2**64), tl.constexpr((81 * FARM1.value + 113) % 2**64)
WARPS = BLOCK // 32  # one string a lane: the code for long ones is long


@triton.jit
def fold(x):
    return x ^ (x >> 47)


@triton.jit
def rotate(x, BITS: tl.constexpr):
    return (x >> BITS) | (x << (64 - BITS))


@triton.jit
def word(string, n, place):
    """The eight bytes from `place` on as a little-endian u64, of a string of n bytes; anything outside it.

    Strings begin anywhere: the bytes are cut out of the two aligned words that hold them. Of those each is read only
    if it has a byte of the string in it, so it is memory of the string's tensor.
    """
    address = (string + place).to(tl.int64)
    bits = address & 7
    begin = place - bits.to(tl.int32)
    words = (address - bits).to(tl.pointer_type(tl.uint64))
    low = tl.load(words, mask=(n > 0) & (begin > -8) & (begin < n), other=0)
    high = tl.load(words + 1, mask=(n > 0) & (bits > 0) & (begin > -16) & (begin + 8 < n), other=0)
    bits = (8 * bits).to(tl.uint64)
    return (low >> bits) | ((high << 1) << (63 - bits))


@triton.jit
def murmur_word(hash, bits):
    return (hash ^ (fold(bits * MURMUR) * MURMUR)) * MURMUR


@triton.jit
def murmur_end(hash):
    return fold(fold(hash) * MURMUR)


@triton.jit
def hash_pair(x, y):
    """MurmurHash64A of the 16 bytes of x and y, i64."""
    hash = (x * 0 + 16).to(tl.uint64) * MURMUR
    hash = murmur_word(murmur_word(hash, x.to(tl.uint64, bitcast=True)), y.to(tl.uint64, bitcast=True))
    return murmur_end(hash).to(tl.int64, bitcast=True)


@triton.jit
def murmur(string, n):
    zero = tl.zeros_like(n).to(tl.uint64)
    hash = n.to(tl.uint64) * MURMUR
    for k in range(tl.max(n, axis=0) // 8):
        hash = tl.where(k < n // 8, murmur_word(hash, word(string, n, 8 * k + n * 0)), hash)
    rest = word(string, n, n // 8 * 8) & ((zero + 1 << (8 * (n % 8)).to(tl.uint64)) - 1)
    return murmur_end(tl.where(n % 8 > 0, (hash ^ rest) * MURMUR, hash))


@triton.jit
def farm_pair(u, v, multiplier):
    a = fold((u ^ v) * multiplier)
    return fold((v ^ a) * multiplier) * multiplier


@triton.jit
def farm_short(string, n):
    """Of strings up to 16 bytes."""
    size = n.to(tl.uint64)
    multiplier = FARM2 + 2 * size
    head, tail = word(string, n, n * 0), word(string, n, n - 8)
    a = head + FARM2
    of_8 = farm_pair(rotate(tail, 37) * multiplier + a, (rotate(a, 25) + tail) * multiplier, multiplier)
    of_4 = farm_pair(size + ((head & 0xFFFFFFFF) << 3), tail >> 32, multiplier)
    middle, last = (head >> (4 * (size & 2))) & 0xFF, tail >> 56
    y, z = (head & 0xFF) + (middle << 8), size + (last << 2)
    of_1 = fold(y * FARM2 ^ z * FARM0) * FARM2
    return tl.where(n >= 8, of_8, tl.where(n >= 4, of_4, tl.where(n > 0, of_1, of_1 * 0 + FARM2)))


@triton.jit
def farm_medium(string, n):
    """Of strings of 17 to 64 bytes."""
    zero = n * 0
    multiplier = FARM2 + 2 * n.to(tl.uint64)
    head = word(string, n, zero)
    a, b = tl.where(n <= 32, head * FARM1, head * FARM2), word(string, n, zero + 8)
    c, d = word(string, n, n - 8) * multiplier, word(string, n, n - 16) * FARM2
    y = rotate(a + b, 43) + rotate(c, 30) + d
    z = farm_pair(y, a + rotate(b + FARM2, 18) + c, multiplier)
    e, f = word(string, n, zero + 16) * multiplier, word(string, n, zero + 24)
    g, h = (y + word(string, n, n - 32)) * multiplier, (z + word(string, n, n - 24)) * multiplier
    of_64 = farm_pair(rotate(e + f, 43) + rotate(g, 30) + h, e + rotate(f + a, 18) + g, multiplier)
    return tl.where(n <= 32, z, of_64)


@triton.jit
def farm_half(string, n, place, a, b):
    a += word(string, n, place)
    last = word(string, n, place + 24)
    b = rotate(b + a + last, 21)
    c = a + word(string, n, place + 8) + word(string, n, place + 16)
    return c + last, b + rotate(c, 44) + a


@triton.jit
def farm_block(string, n, place, multiplier, WEIGHT: tl.constexpr, x, y, z, v0, v1, w0, w1):
    x = (rotate(x + y + v0 + word(string, n, place + 8), 37) * multiplier) ^ (w1 * WEIGHT)
    y = rotate(y + v1 + word(string, n, place + 48), 42) * multiplier + v0 * WEIGHT + word(string, n, place + 40)
    z = rotate(z + w0, 33) * multiplier
    v0, v1 = farm_half(string, n, place, v1 * multiplier, x + w0)
    w0, w1 = farm_half(string, n, place + 32, z + w1, y + word(string, n, place + 16))
    return z, y, x, v0, v1, w0, w1


@triton.jit
def farm_long(string, n):
    """Of strings above 64 bytes: round k takes the k-th block of every string that has one."""
    zero = tl.zeros_like(n).to(tl.uint64)
    x, y = word(string, n, n * 0) + FARM_X, zero + FARM_Y
    z = fold(y * FARM2 + 113) * FARM2
    v0, v1, w0, w1 = zero, zero, zero, zero
    for k in range((tl.max(n, axis=0) - 1) // 64):
        a, b, c, d, e, f, g = farm_block(string, n, n * 0 + 64 * k, zero + FARM1, 1, x, y, z, v0, v1, w0, w1)
        has = 64 * k < n - 64
        x, y, z = tl.where(has, a, x), tl.where(has, b, y), tl.where(has, c, z)
        v0, v1, w0, w1 = tl.where(has, d, v0), tl.where(has, e, v1), tl.where(has, f, w0), tl.where(has, g, w1)
    multiplier = FARM1 + ((z & 0xFF) << 1)
    w0 += ((n - 1) & 63).to(tl.uint64)
    v0 += w0
    x, y, z, v0, v1, w0, w1 = farm_block(string, n, n - 64, multiplier, 9, x, y, z, v0, v1, w0 + v0, w1)
    u = farm_pair(v0, w0, multiplier) + fold(y) * FARM0 + z
    return farm_pair(u, farm_pair(v1, w1, multiplier) + x, multiplier)


@triton.jit
def farm(string, n):
    longest = tl.max(n, axis=0)
    hash = farm_short(string, n)
    if longest > 16:
        hash = tl.where(n > 16, farm_medium(string, n), hash)
    if longest > 64:
        hash = tl.where(n > 64, farm_long(string, n), hash)
    return hash


@triton.jit
def hash_strings(outs, values, offsets, nums, sizes, HASH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1)
    nth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num = chosen(nums, column)
    begin, end = list_bounds(chosen(offsets, column), nth, num, chosen(sizes, column))
    hash = HASH(chosen(values, column) + begin, end - begin)
    tl.store(chosen(outs, column) + nth, hash.to(tl.int64, bitcast=True), mask=nth < num)


def hashes(hash: Callable, values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    out = [o.new_empty(o.numel() - 1, dtype=torch.int64) for o in offsets]
    nums = tuple(t.numel() for t in out)
    if any(nums):
        hash_strings[(triton.cdiv(max(nums), BLOCK), len(nums))](
            tuple(out), tuple(values), tuple(offsets), nums, tuple(v.numel() for v in values), HASH=hash, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def farm_hashes(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    """`recfx.kernels.lists.string_hash.farm_definition`."""
    return hashes(farm, values, offsets)


def murmur_hashes(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    """`recfx.kernels.lists.string_hash.murmur_definition`."""
    return hashes(murmur, values, offsets)
