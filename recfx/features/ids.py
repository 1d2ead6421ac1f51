"""Ops on ids: Ragged or dense i64, and strings as Ragged u8."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recfx.features.columns import ColumnT, expect_ragged, of_one_or_many, on_values
from recfx.kernels.lists.cross_lists import cross_lists
from recfx.kernels.lists.string_hash import farm_hashes, murmur_hashes
from recfx.kernels.op import constant_result
from recfx.types import Ragged

__all__ = ["cross", "farm_hash", "mod", "multi_hash", "murmur_hash"]

MULTIPLIERS, PRIME_SCALES = (1, 3, 5, 7), (29, 47, 67, 83)


def farm_hash(columns: Ragged | Mapping[str, Ragged]) -> Any:
    """FarmHash Fingerprint64 of each string, as a signed 64-bit id.

    Args:     columns: strings as lists of bytes, Ragged u8; or a dict of such columns, hashed by one kernel.
    Shapes:   one string per sample -> i64 [B, 1]; a list of strings per sample -> Ragged i64, one id per string; deeper
              levels are kept. For a dict, a dict.
    Cost:     reads each byte once, 10 ns per short string on a CPU.
    Raises:   TypeError when the values are not u8.
    Ref:      github.com/google/farmhash, util::Fingerprint64.
    Example:  >>> words = Ragged(torch.tensor(list(b"abchello"), dtype=torch.uint8), torch.tensor([0, 3, 8]).int())
              >>> farm_hash(words).tolist()
              [[2640714258260161385], [-5436999610281751320]]
    """
    return _hash_strings(columns, farm_hashes)


def murmur_hash(columns: Ragged | Mapping[str, Ragged]) -> Any:
    """MurmurHash64A with seed 0 of each string, as a signed 64-bit id. Shapes and errors as `farm_hash`.

    Example:  >>> words = Ragged(torch.tensor(list(b"abc"), dtype=torch.uint8), torch.tensor([0, 3, 3]).int())
              >>> murmur_hash(words).tolist()
              [[-7148968302806999301], [0]]
    """
    return _hash_strings(columns, murmur_hashes)


def _hash_strings(columns: Ragged | Mapping[str, Ragged], op: Callable[..., list[Tensor]]) -> Any:
    def hash(columns: Mapping[str, Ragged]) -> dict[str, Tensor | Ragged]:
        for name, column in columns.items():
            if expect_ragged(name, column).values.dtype != torch.uint8:
                raise TypeError(
                    f"{name}: got {column.values.dtype} values, expected torch.uint8, the bytes of strings."
                )
        values, offsets = (
            [c.values.contiguous() for c in columns.values()],
            [c.offsets.contiguous() for c in columns.values()],
        )
        ids = zip(columns.items(), op(values, offsets), strict=True)
        return {
            name: Ragged(id, column.outer[-1], None, column.outer[:-1]) if column.outer else id[:, None]
            for (name, column), id in ids
        }

    return of_one_or_many(columns, hash)


def mod(ids: ColumnT, n: int) -> ColumnT:
    """The id as an unsigned 64-bit number, modulo n.

    Args:     n: 1 to 2**63; 2**63 clears the sign bit.
    Raises:   ValueError when n is out of range.
    Example:  >>> mod(torch.tensor([[-1, -5, 1001]]), 1000).tolist()
              [[615, 611, 1]]
    """
    if not 1 <= n <= 2**63:
        raise ValueError(f"n: got {n}, expected 1 to 2**63.")
    if n & (n - 1) == 0:
        return on_values(ids, lambda id: id & (n - 1))

    def unsigned(id: Tensor) -> Tensor:  # adds 2**64 to a negative id, in a form that does not overflow
        remainder = id % n
        shifted = remainder - (n - 2**64 % n)
        return torch.where(id < 0, torch.where(shifted < 0, shifted + n, shifted), remainder)

    return on_values(ids, unsigned)


def multi_hash(ids: ColumnT, num_buckets: Sequence[int]) -> list[ColumnT]:
    """Up to four ids in small spaces for one id in a large space (compositional embeddings):

        hash_i(id) = floormod(id m_i, p_i) mod b_i,  m = 1, 3, 5, 7, wrapping; p_i the largest prime <= c_i b_i

    with c = 29, 47, 67, 83.

    Args:     num_buckets: b_i, one to four, each in [1, 2**32).
    Raises:   ValueError when there are none, more than four, or one is not in [1, 2**32).
    Example:  >>> [h.tolist() for h in multi_hash(torch.tensor([[1001, 1002]]), [1000] * 4)]
              [[[1, 2]], [[3, 6]], [[5, 10]], [[7, 14]]]
    """
    if not (1 <= len(num_buckets) <= len(MULTIPLIERS) and all(1 <= b < 2**32 for b in num_buckets)):
        raise ValueError(f"num_buckets: got {list(num_buckets)}, expected one to four numbers from 1 to 2**32 - 1.")

    def into(multiplier: int, prime: int, buckets: int) -> ColumnT:
        return on_values(ids, lambda id: id * multiplier % prime % buckets)

    numbers = zip(MULTIPLIERS, PRIME_SCALES, num_buckets, strict=False)
    return [into(m, _largest_prime(c * b), b) for m, c, b in numbers]


@constant_result  # the search for a prime is not part of a graph
def _largest_prime(most: int) -> int:
    return _search_prime(most)


@functools.cache
def _search_prime(most: int) -> int:
    def is_prime(n: int) -> bool:
        return all(n % k for k in range(2, math.isqrt(n) + 1))

    return next(n for n in range(most, 1, -1) if is_prime(n))


def cross(x: Ragged, y: Ragged, *, capacity: int) -> tuple[Ragged, Tensor]:
    """Per sample the Cartesian product of the distinct ids of two features, as ids; and the number that did not fit.

        value = MurmurHash64A of x then y, 16 little-endian bytes, seed 0

    Pairs are x-major, in the order of first occurrence. A pair's weight is the product of the weights at the first
    occurrences of its ids, 1 where a feature has no weights.

    Args:     capacity: room for the pairs of a batch. Pairs that do not fit are dropped, last samples first.
    Returns:  Ragged i64, with weights when x or y has weights; overflow i64 [], to be reported under
              `recfx.types.COUNTS`.
    Raises:   TypeError when the ids are not i64, ValueError when samples differ in number, lists are nested, or the
              capacity is not in [0, 2**31).
    Example:  >>> one = torch.tensor([0, 1]).int()
              >>> pairs, overflow = cross(Ragged(torch.tensor([1]), one), Ragged(torch.tensor([2]), one), capacity=4)
              >>> pairs.values.tolist(), pairs.offsets.tolist(), int(overflow)
              ([2346165840139155392, 0, 0, 0], [0, 1], 0)
    """
    for name, column in (("x", x), ("y", y)):
        if expect_ragged(name, column, depth=1).values.dtype != torch.int64:
            raise TypeError(f"{name}: got {column.values.dtype} values, expected torch.int64 ids.")
    if not 0 <= capacity < 2**31:
        raise ValueError(f"capacity: got {capacity}, expected 0 to 2**31 - 1. Offsets are 32-bit.")
    if x.num_samples != y.num_samples:
        raise ValueError(f"y: got {y.num_samples} samples, expected {x.num_samples}, as x has.")
    sides = [
        part if part is None else part.contiguous()
        for column in (x, y)
        for part in (column.values, column.offsets, column.weights)
    ]
    values, weights, offsets, overflow = cross_lists(*sides, capacity)
    is_weighted = x.weights is not None or y.weights is not None
    return Ragged(values, offsets, weights if is_weighted else None), overflow
