"""Oracles of the feature ops, in Python integers and lists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from recfx.types import Ragged
from tests.reference import EXTREMES, MAX_INT64, MIN_INT64

LOW = 2**64 - 1
K0, K1, K2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F
IDS = st.sampled_from(EXTREMES) | st.integers(-3, 3) | st.integers(MIN_INT64, MAX_INT64)
LISTS = st.lists(st.lists(IDS, max_size=5), max_size=5)
STRINGS = st.lists(st.binary(max_size=20) | st.binary(min_size=21, max_size=300), max_size=6)


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def word(s: bytes, first: int, size: int = 8) -> int:
    return int.from_bytes(s[first : first + size], "little")


def murmur64a(s: bytes) -> int:
    """Signed MurmurHash64A, seed 0."""
    m, whole = 0xC6A4A7935BD1E995, len(s) // 8 * 8
    h = len(s) * m & LOW
    for i in range(0, whole, 8):
        k = word(s, i) * m & LOW
        h = (h ^ (k ^ k >> 47) * m & LOW) * m & LOW
    if whole < len(s):
        h = (h ^ word(s, whole)) * m & LOW
    h = (h ^ h >> 47) * m & LOW
    return signed(h ^ h >> 47)


def rotate(x: int, bits: int) -> int:
    x &= LOW
    return (x >> bits | x << 64 - bits) & LOW


def len16(u: int, v: int, m: int) -> int:
    a = ((u ^ v) & LOW) * m & LOW
    a ^= a >> 47
    b = ((v ^ a) & LOW) * m & LOW
    b ^= b >> 47
    return b * m & LOW


def fingerprint64(s: bytes) -> int:
    """Signed FarmHash Fingerprint64. `tests/kernels/test_string_hash.py` holds it against Google's where installed."""
    n, m = len(s), K2 + 2 * len(s)
    if n == 0:
        return signed(K2)
    if n < 4:
        x = (s[0] + (s[n // 2] << 8)) * K2 & LOW ^ (n + (s[-1] << 2)) * K0 & LOW
        return signed((x ^ x >> 47) * K2 & LOW)
    if n < 8:
        return signed(len16(n + (word(s, 0, 4) << 3), word(s, n - 4, 4), m))
    if n <= 16:
        a, b = word(s, 0) + K2 & LOW, word(s, n - 8)
        return signed(len16((rotate(b, 37) * m + a) & LOW, (rotate(a, 25) + b) * m & LOW, m))
    if n <= 64:
        return signed(farm_17_to_64(s, n, m))
    return signed(farm_above_64(s, n))


def farm_17_to_64(s: bytes, n: int, m: int) -> int:
    a, b = word(s, 0) * (K1 if n <= 32 else K2) & LOW, word(s, 8)
    c, d = word(s, n - 8) * m & LOW, word(s, n - 16) * K2 & LOW
    y = (rotate(a + b, 43) + rotate(c, 30) + d) & LOW
    z = len16(y, (a + rotate(b + K2, 18) + c) & LOW, m)
    if n <= 32:
        return z
    e, f = word(s, 16) * m & LOW, word(s, 24)
    g, h = (y + word(s, n - 32)) * m & LOW, (z + word(s, n - 24)) * m & LOW
    return len16((rotate(e + f, 43) + rotate(g, 30) + h) & LOW, (e + rotate(f + a, 18) + g) & LOW, m)


def farm_above_64(s: bytes, n: int) -> int:
    def weak(i: int, a: int, b: int) -> tuple[int, int]:
        w, x, y, z = (word(s, i + 8 * k) for k in range(4))
        a += w
        b = rotate(b + a + z, 21)
        total = a + x + y
        return total + z & LOW, b + rotate(total, 44) + a & LOW

    def block(i: int, m: int, weight: int, x: int, y: int, z: int, v: tuple, w: tuple) -> tuple:
        x = rotate(x + y + v[0] + word(s, i + 8), 37) * m & LOW ^ w[1] * weight & LOW
        y = (rotate(y + v[1] + word(s, i + 48), 42) * m + v[0] * weight + word(s, i + 40)) & LOW
        z = rotate(z + w[0], 33) * m & LOW
        v, w = weak(i, v[1] * m, x + w[0]), weak(i + 32, z + w[1], y + word(s, i + 16))
        return z, y, x, v, w

    y = 81 * K1 + 113 & LOW
    z = (y * K2 + 113) & LOW
    state = (81 * K2 + word(s, 0) & LOW, y, (z ^ z >> 47) * K2 & LOW, (0, 0), (0, 0))
    for i in range(0, (n - 1) // 64 * 64, 64):
        state = block(i, K1, 1, *state)
    x, y, z, v, w = state
    m = K1 + ((z & 0xFF) << 1)
    w = (w[0] + (n - 1) % 64, w[1])
    v = (v[0] + w[0], v[1])
    x, y, z, v, w = block(n - 64, m, 9, x, y, z, v, (w[0] + v[0], w[1]))
    y = (y ^ y >> 47) * K0
    return len16(len16(v[0], w[0], m) + y + z & LOW, len16(v[1], w[1], m) + x & LOW, m)


def strings(items: Sequence[bytes], *, spare: int = 0, outer: Sequence[int] | None = None) -> Ragged:
    """Strings as lists of bytes, one per sample; with `outer`, sample b holds strings outer[b] to outer[b + 1]."""
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item))
    values = torch.tensor(list(b"".join(items)) + [77] * spare, dtype=torch.uint8)
    levels = () if outer is None else (torch.tensor(list(outer), dtype=torch.int32),)
    return Ragged(values, torch.tensor(ends, dtype=torch.int32), None, levels)


def nested(samples: Sequence[Sequence[Sequence[int]]], *, spare: int = 0, weighted: bool = False) -> Ragged:
    """Lists of lists of ids, with `spare` values of padding and as many empty lists after the last."""
    inner = [items for lists in samples for items in lists]
    values = [v for items in inner for v in items] + [77] * spare
    ends, outer = [0], [0]
    for items in inner + [[]] * spare:
        ends.append(ends[-1] + len(items))
    for lists in samples:
        outer.append(outer[-1] + len(lists))
    weights = torch.arange(len(values), dtype=torch.float32) + 0.5 if weighted else None
    offsets = torch.tensor(ends, dtype=torch.int32)
    return Ragged(torch.tensor(values, dtype=torch.int64), offsets, weights, (torch.tensor(outer, dtype=torch.int32),))


def lists_of(column: Ragged, values: torch.Tensor | None = None) -> list:
    """A ragged column as nested Python lists."""
    items = (column.values if values is None else values).tolist()
    for offsets in (column.offsets, *reversed(column.outer)):
        ends = offsets.tolist()
        items = [items[a:b] for a, b in itertools.pairwise(ends)]
    return items


def distinct(items: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """In order of first occurrence, with the weight there."""
    out: dict[int, float] = {}
    for item, weight in zip(items, weights, strict=True):
        out.setdefault(item, weight)
    return out


def cross_pair(x: int, y: int) -> int:
    return murmur64a(x.to_bytes(8, "little", signed=True) + y.to_bytes(8, "little", signed=True))
