"""The index's hash and probe, as in `table.h` for a CPU and in `index/hashing.py` in torch."""

from __future__ import annotations

import triton
import triton.language as tl

from recfx.kernels.index import hashing

__all__ = ["hash_id", "key_at", "mix", "next_run", "place", "probe", "slot_of", "swap_where"]

EMPTY = tl.constexpr(hashing.EMPTY)
IMPOSSIBLE = tl.constexpr(-2)  # neither a slot nor a position
RUN = tl.constexpr(hashing.RUN)
MULTIPLIER = tl.constexpr(hashing.MULTIPLIER % 2**64)
GOLDEN = tl.constexpr(hashing.GOLDEN % 2**64)
GROUP = tl.constexpr(8)  # slots a probe reads at once: 64 bytes, as DRAM is read


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
def swap_where(active, places, num_places, at, expected, value):
    """What places[at] held; `value` is there now if that was `expected`. Only for active lanes.

    tl.atomic_cas has no mask. An idle lane compares with what no place holds, and does so at an address that it shares
    with as few others as there can be: aimed at one, such as place 0, they would wait for each other, launch-wide.
    num_places: a power of two.
    """
    lane = tl.program_id(0) * active.shape[0] + tl.arange(0, active.shape[0])
    at = tl.where(active, at, lane & (num_places - 1))
    expected = tl.where(active, expected, IMPOSSIBLE).to(places.dtype.element_ty)
    return tl.atomic_cas(places + at, expected, value, sem="relaxed")


@triton.jit
def go_on(start, k):
    """(start, k) of a lane that has looked at k slots of its run, or more."""
    over = k >= RUN
    if tl.max(over.to(tl.int32), axis=0) > 0:
        start, k = tl.where(over, next_run(start), start), tl.where(over, 0, k)
    return start, k


@triton.jit
def first_stop(slots, mask, head, start, k, active):
    """Of the GROUP slots that each active lane has come to, k slots into its run, the first that is empty or of `head`.

    A lane reads all slots of its group at once, in one place each: what belongs to a key is in one thread, and nothing
    is exchanged between threads. Returns (low half of that slot, whether there is one, k after it or after the group).
    """
    at = ((start + k.to(tl.uint64)) & mask).to(tl.int64)
    group, before = slots + at // GROUP * GROUP, (at & (GROUP - 1)).to(tl.int32)
    begin, end = tl.where(active, before, GROUP), RUN + before - k  # the run may end within the group
    other_head = (head ^ 1).to(tl.int64) << 32
    low, stop = head * 0, head * 0 + GROUP
    for j in tl.static_range(GROUP - 1, -1, -1):
        slot = tl.load(group + j, mask=(j >= begin) & (j < end), other=other_head)
        stops = (slot == EMPTY) | ((slot >> 32).to(tl.int32) == head)
        low, stop = tl.where(stops, slot.to(tl.int32), low), tl.where(stops, j, stop)
    return low, stop < GROUP, k - before + tl.minimum(stop + 1, GROUP)


@triton.jit
def probe(slots, ids, mask, hash, vocabulary, id, active):
    """Row i32 of each key, -1 where it is absent or not active. The index is only read."""
    head = (slot_of(hash, vocabulary, vocabulary * 0) >> 32).to(tl.int32)
    row = vocabulary * 0 - 1
    start, k = hash, vocabulary * 0  # k: how far in the run
    while tl.max(active.to(tl.int32), axis=0) > 0:
        candidate, stopped, k = first_stop(slots, mask, head, start, k, active)
        used = stopped & (candidate >= 0)
        found = used & (tl.load(ids + candidate, mask=used, other=0) == id)
        row = tl.where(found, candidate, row)
        active = active & ~found & ~(stopped & ~used)
        start, k = go_on(start, k)
    return row


@triton.jit
def next_empty(slots, mask, start, k, active):
    """(start, k) of the first slot at or after each lane's that seems empty. A full one is not, but for one whose upper
    half is all ones."""
    while tl.max(active.to(tl.int32), axis=0) > 0:
        _, stopped, after = first_stop(slots, mask, k * 0 - 1, start, k, active)
        k = tl.where(active, after - stopped.to(tl.int32), k)
        active = active & ~stopped
        start, k = go_on(start, k)
    return start, k


@triton.jit
def place(slots, mask, hash, slot, active):
    """Puts the slots of distinct, absent keys in the first empty places of their ways; how many are crowded, i64.

    Whatever the order in which lanes win a place, every key is on its path with no empty slot before it: slots only
    fill, so what a lane read as full is full, and what it read as empty is won or lost by compare-and-swap. Lanes look
    for a place until all have one, and then swap at once: lanes that wait swap too (`swap_where`).
    """
    start, k, left = hash, (slot * 0).to(tl.int32), active
    while tl.max(left.to(tl.int32), axis=0) > 0:
        start, k = next_empty(slots, mask, start, k, left)
        at = ((start + k.to(tl.uint64)) & mask).to(tl.int64)
        left = left & (swap_where(left, slots, mask.to(tl.int64) + 1, at, EMPTY, slot) != EMPTY)
        start, k = go_on(start, k + left.to(tl.int32))
    crowded = active & (((start + k.to(tl.uint64) - hash) & mask) >= RUN)
    return tl.sum(crowded.to(tl.int64), axis=0)
