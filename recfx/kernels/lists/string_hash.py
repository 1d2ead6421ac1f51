"""farm_hashes, murmur_hashes: 64-bit hashes of strings that lie end to end, as Arrow keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.kernels.index.hashing import shift_right, signed
from recfx.kernels.op import define_op

__all__ = ["MURMUR", "farm_hashes", "murmur_end", "murmur_hashes", "murmur_word"]

MURMUR = signed(0xC6A4A7935BD1E995)
FARM0, FARM1, FARM2 = (signed(k) for k in (0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F))


class _Strings(NamedTuple):
    words: Tensor  # i64 [capacity + 8], the eight bytes from each place on as a little-endian number
    first: Tensor  # i64 [strings]
    length: Tensor  # i64 [strings]

    def word(self, place: Tensor) -> Tensor:
        return self.words[place.clamp(0, self.words.numel() - 1)]


def farm_definition(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    """FarmHash Fingerprint64 of each string, per column.

    Shapes:   values[c] u8 [capacity], offsets[c] i32 [strings + 1] -> i64 [strings].
    """
    return [_farm(_strings(v, o)) for v, o in zip(values, offsets, strict=True)]


def murmur_definition(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    """MurmurHash64A with seed 0 of each string, per column.

    Shapes:   values[c] u8 [capacity], offsets[c] i32 [strings + 1] -> i64 [strings].
    """
    return [_murmur(_strings(v, o)) for v, o in zip(values, offsets, strict=True)]


def _fold(x: Tensor) -> Tensor:
    return x ^ shift_right(x, 47)


def murmur_word(hash: Tensor | int, word: Tensor) -> Tensor:
    """MurmurHash64A's step: eight more bytes."""
    return (hash ^ _fold(word * MURMUR) * MURMUR) * MURMUR


def murmur_end(hash: Tensor) -> Tensor:
    """MurmurHash64A's last step."""
    return _fold(_fold(hash) * MURMUR)


def _strings(values: Tensor, offsets: Tensor) -> _Strings:
    padded = torch.cat([values, values.new_zeros(16)]).long()
    size = values.numel() + 8
    words = padded[:size]
    for k in range(1, 8):
        words = words | padded[k : k + size] << (8 * k)
    return _Strings(words, offsets[:-1].long(), offsets.diff().long())


def _most(needed: Tensor) -> int:
    """How often a loop over all strings at once runs."""
    return int(needed.max()) if needed.numel() else 0


def _murmur(s: _Strings) -> Tensor:
    hash, num_words = s.length * MURMUR, s.length // 8
    for k in range(_most(num_words)):
        hash = torch.where(k < num_words, murmur_word(hash, s.word(s.first + 8 * k)), hash)
    rest = s.length % 8
    tail = s.word(s.first + 8 * num_words) & ((torch.ones_like(rest) << 8 * rest) - 1)
    return murmur_end(torch.where(rest > 0, (hash ^ tail) * MURMUR, hash))


def _rotate(x: Tensor, bits: int) -> Tensor:
    return shift_right(x, bits) | x << (64 - bits)


def _pair(u: Tensor, v: Tensor, multiplier: Tensor) -> Tensor:
    a = _fold((u ^ v) * multiplier)
    return _fold((v ^ a) * multiplier) * multiplier


def _farm(s: _Strings) -> Tensor:
    n, multiplier = s.length, FARM2 + 2 * s.length
    last = s.first + n
    hash = torch.where(n <= 16, _farm_short(s, last, multiplier), _farm_medium(s, last, multiplier))
    num_blocks = (n - 1) // 64
    rounds = _most(num_blocks)
    return torch.where(n <= 64, hash, _farm_long(s, num_blocks, rounds)) if rounds > 0 else hash


def _farm_short(s: _Strings, last: Tensor, multiplier: Tensor) -> Tensor:
    """Of strings up to 16 bytes."""
    n, head = s.length, s.word(s.first)
    a, b = head + FARM2, s.word(last - 8)
    of_8 = _pair(_rotate(b, 37) * multiplier + a, (_rotate(a, 25) + b) * multiplier, multiplier)
    of_4 = _pair(n + ((head & 0xFFFFFFFF) << 3), s.word(last - 4) & 0xFFFFFFFF, multiplier)
    y = (head & 0xFF) + ((s.word(s.first + n // 2) & 0xFF) << 8)
    z = n + ((s.word(last - 1) & 0xFF) << 2)
    of_1 = _fold(y * FARM2 ^ z * FARM0) * FARM2
    return torch.where(n >= 8, of_8, torch.where(n >= 4, of_4, torch.where(n > 0, of_1, FARM2)))


def _farm_medium(s: _Strings, last: Tensor, multiplier: Tensor) -> Tensor:
    """Of strings of 17 to 64 bytes."""
    a = s.word(s.first) * torch.where(s.length <= 32, FARM1, FARM2)
    b, c, d = s.word(s.first + 8), s.word(last - 8) * multiplier, s.word(last - 16) * FARM2
    y = _rotate(a + b, 43) + _rotate(c, 30) + d
    z = _pair(y, a + _rotate(b + FARM2, 18) + c, multiplier)
    e, f = s.word(s.first + 16) * multiplier, s.word(s.first + 24)
    g, h = (y + s.word(last - 32)) * multiplier, (z + s.word(last - 24)) * multiplier
    of_64 = _pair(_rotate(e + f, 43) + _rotate(g, 30) + h, e + _rotate(f + a, 18) + g, multiplier)
    return torch.where(s.length <= 32, z, of_64)


def _farm_long(s: _Strings, num_blocks: Tensor, rounds: int) -> Tensor:
    """Of strings above 64 bytes, all at once: round k takes the k-th block of every string that has one."""
    zero = torch.zeros_like(s.first)
    y = torch.full_like(s.first, signed(81 * FARM1 + 113))
    state: tuple[Tensor, ...] = (
        signed(81 * FARM2) + s.word(s.first),
        y,
        _fold(y * FARM2 + 113) * FARM2,
        zero,
        zero,
        zero,
        zero,
    )
    for k in range(rounds):
        new = _farm_block(s, s.first + 64 * k, FARM1, 1, state)
        state = tuple(torch.where(k < num_blocks, a, b) for a, b in zip(new, state, strict=True))
    x, y, z, v0, v1, w0, w1 = state
    multiplier = FARM1 + ((z & 0xFF) << 1)
    w0 = w0 + ((s.length - 1) & 63)
    v0 = v0 + w0
    x, y, z, v0, v1, w0, w1 = _farm_block(s, s.first + s.length - 64, multiplier, 9, (x, y, z, v0, v1, w0 + v0, w1))
    return _pair(_pair(v0, w0, multiplier) + _fold(y) * FARM0 + z, _pair(v1, w1, multiplier) + x, multiplier)


def _farm_block(
    s: _Strings, place: Tensor, multiplier: Tensor | int, weight: int, state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x, y, z, v0, v1, w0, w1 = state
    x = _rotate(x + y + v0 + s.word(place + 8), 37) * multiplier ^ w1 * weight
    y = _rotate(y + v1 + s.word(place + 48), 42) * multiplier + v0 * weight + s.word(place + 40)
    z = _rotate(z + w0, 33) * multiplier
    v0, v1 = _farm_half(s, place, v1 * multiplier, x + w0)
    w0, w1 = _farm_half(s, place + 32, z + w1, y + s.word(place + 16))
    return z, y, x, v0, v1, w0, w1


def _farm_half(s: _Strings, place: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a = a + s.word(place)
    b = _rotate(b + a + s.word(place + 24), 21)
    c = a + s.word(place + 8) + s.word(place + 16)
    return c + s.word(place + 24), b + _rotate(c, 44) + a


def _fake(values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    return [o.new_empty(o.shape[0] - 1, dtype=torch.int64) for o in offsets]


farm_hashes = define_op(
    "farm_hashes",
    definition=farm_definition,
    cuda="lists.gpu.string_hash",
    fake=_fake,
)
murmur_hashes = define_op(
    "murmur_hashes",
    definition=murmur_definition,
    cuda="lists.gpu.string_hash",
    fake=_fake,
)
