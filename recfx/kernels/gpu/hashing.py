"""The index's hash and probe, as `table.h` has them for a CPU and `kernels/hashing.py` says in torch."""

from __future__ import annotations

import triton
import triton.language as tl

from recfx.kernels import hashing

__all__ = ["hash_id", "key_at", "mix", "next_run", "place", "probe", "slot_of"]

EMPTY = tl.constexpr(hashing.EMPTY)
IMPOSSIBLE = tl.constexpr(-2)  # no slot and no position: what an idle lane compares with, as atomic_cas has no mask
RUN = tl.constexpr(hashing.RUN)
MULTIPLIER = tl.constexpr(hashing.MULTIPLIER % 2**64)
GOLDEN = tl.constexpr(hashing.GOLDEN % 2**64)
GROUP = tl.constexpr(4)  # slots a probe reads at once: 32 bytes, one sector


@triton.jit
def mix(x):
    """A bijection of u64 that spreads every bit over all."""
    x = (x ^ (x >> 32)) * MULTIPLIER
    x = (x ^ (x >> 32)) * MULTIPLIER
    return x ^ (x >> 32)


@triton.jit
def hash_id(id, vocabulary, salt):
    """u64 of i64 ids, i32 vocabularies and the table's salt."""
    return mix((id.to(tl.uint64, bitcast=True) + (vocabulary + 1).to(tl.uint64) * GOLDEN) ^ salt.to(tl.uint64))


@triton.jit
def next_run(start):
    return mix(start + GOLDEN)


@triton.jit
def key_at(id_P, cell_P, vocabularies, num_lookups, k, active):
    """(id, vocabulary) of the positions k."""
    id = tl.load(id_P + k, mask=active, other=0)
    cell = tl.load(cell_P + k, mask=active, other=0)
    return id, tl.load(vocabularies + cell % num_lookups, mask=active, other=0)


@triton.jit
def slot_of(hash, vocabulary, row):
    """tag:16 | vocabulary:16 | row:32, i64."""
    head = ((hash >> 48) << 16) | vocabulary.to(tl.uint64)
    return ((head << 32) | row.to(tl.uint64)).to(tl.int64, bitcast=True)


@triton.jit
def probe(slots, ids, mask, hash, vocabulary, id, active):
    """Row i32 of each key, -1 where it is absent or not active. The index is only read.

    A lane reads the aligned group of GROUP slots that it has come to, in one or two 16-byte loads, and looks at those
    of them that lie ahead in its run.
    """
    nth = tl.arange(0, GROUP)[None, :]
    head = slot_of(hash, vocabulary, vocabulary * 0) >> 32
    row = vocabulary * 0 - 1
    start, k = hash, vocabulary * 0  # k: how far in the run
    while tl.max(active.to(tl.int32), axis=0) > 0:
        at = ((start + k.to(tl.uint64)) & mask).to(tl.int64)
        group = at // GROUP * GROUP
        first = (at - group).to(tl.int32)
        slot = tl.load(slots + (group[:, None] + nth), mask=active[:, None], other=EMPTY)
        ahead = (nth >= first[:, None]) & (k[:, None] + nth - first[:, None] < RUN)
        stop = tl.min(tl.where(ahead & ((slot == EMPTY) | (slot >> 32 == head[:, None])), nth, GROUP), axis=1)
        stopped = active & (stop < GROUP)
        here = tl.sum(tl.where(nth == stop[:, None], slot, 0), axis=1)
        used = stopped & (here != EMPTY)
        candidate = (here & 0x7FFFFFFF).to(tl.int32)
        found = used & (tl.load(ids + candidate, mask=used, other=0) == id)
        row = tl.where(found, candidate, row)
        active = active & ~found & ~(stopped & ~used)
        k = tl.minimum(k - first + tl.where(stopped, stop + 1, GROUP), RUN)
        start = tl.where(k == RUN, next_run(start), start)
        k = tl.where(k == RUN, 0, k)
    return row


@triton.jit
def place(slots, mask, hash, slot, active):
    """Puts the slots of distinct, absent keys in the first empty places of their ways; how many are crowded, i64.

    Whatever the order in which lanes win a place, every key stands in its way with no empty slot before it.
    """
    start, k = hash, slot * 0
    crowded = slot * 0
    while tl.max(active.to(tl.int32), axis=0) > 0:
        at = (start + k.to(tl.uint64)) & mask
        expected = tl.where(active, EMPTY, IMPOSSIBLE).to(tl.int64)
        before = tl.atomic_cas(slots + at.to(tl.int64), expected, slot, sem="relaxed")
        placed = active & (before == EMPTY)
        crowded += (placed & (((at - hash) & mask) >= RUN)).to(tl.int64)
        active = active & ~placed
        start = tl.where(k + 1 == RUN, next_run(start), start)
        k = tl.where(k + 1 == RUN, 0, k + 1)
    return tl.sum(crowded, axis=0)
