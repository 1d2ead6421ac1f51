"""find_or_insert_ on a GPU: the dict's order without a sort and without a read by the host.

    claim       every id claims a place of a scratch table, which ends with the id's first position in the batch
    look_up     first occurrences read the index, and flag where a row or a unique number is to be given out
    (scan)      the flags summed up to each position: its rank among those before it
    number      ranks become rows (free ones first) and unique numbers; every occurrence reads its first one's
    insert      new rows enter the index, which is all that races: for places, never for numbers
    initialise  new rows get their initial values

The scratch table is what keeps a refused id out of the index: nothing is inserted before it is known to have a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels import op
from recfx.kernels.gpu.hashing import EMPTY, IMPOSSIBLE, hash_id, key_at, next_run, place, probe, slot_of
from recfx.kernels.gpu.initial import initial_values
from recfx.kernels.gpu.launch import BLOCK, NUM_WARPS, columns_of, programs, rows_of

__all__ = ["NEVER", "UNKNOWN", "claim", "find_or_insert_", "scratch_table"]

NEVER = tl.constexpr(2**31 - 1)  # position of what does not occur
UNKNOWN, REFUSED = tl.constexpr(op.UNKNOWN), tl.constexpr(op.REFUSED)
LOOKED_UP, CREATED, UNADMITTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)  # of `tally`
SCRATCH_LOAD = 3 / 4


@triton.jit
def claim(
    first_H, admitted_H, place_P, flags_P, id_P, cell_P, vocabularies, salt, admit_P, num_positions, num_lookups,
    num_places, ADMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    tl.store(flags_P + k, tl.zeros_like(k).to(tl.int64), mask=k < num_positions)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, valid)
    # Not from where the index would begin: ids that collide there must not collide here.
    at = (next_run(hash_id(id, vocabulary, tl.load(salt))) & (num_places - 1).to(tl.uint64)).to(tl.int32)
    active = valid
    while tl.max(active.to(tl.int32), axis=0) > 0:
        holder = tl.load(first_H + at, mask=active, other=0)
        empty = active & (holder == EMPTY)
        if tl.max(empty.to(tl.int32), axis=0) > 0:
            before = tl.atomic_cas(first_H + at, tl.where(empty, EMPTY, IMPOSSIBLE).to(tl.int32), k, sem="relaxed")
            holder = tl.where(empty, before, holder)
        held = active & (holder != EMPTY)
        held_id, held_vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, holder, held)
        same = held & (held_id == id) & (held_vocabulary == vocabulary)
        tl.atomic_min(first_H + at, k, mask=same & (k < holder), sem="relaxed")
        active = held & ~same
        at = tl.where(active, (at + 1) & (num_places - 1), at)
    tl.store(place_P + k, at, mask=valid)
    if ADMITS:
        admitted = tl.load(admit_P + k, mask=valid, other=0) != 0
        tl.atomic_min(admitted_H + at, k, mask=valid & admitted, sem="relaxed")


@triton.jit
def look_up(
    first_H, admitted_H, place_P, flags_P, found_P, slots, ids, seen, num_slots, salt, step, id_P, cell_P, vocabularies,
    num_positions, num_lookups, ADMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    at = tl.load(place_P + k, mask=valid, other=0)
    first = valid & (tl.load(first_H + at, mask=valid, other=0) == k)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, first)
    hash = hash_id(id, vocabulary, tl.load(salt))
    row = probe(slots, ids, (tl.load(num_slots) - 1).to(tl.uint64), hash, vocabulary, id, first)
    last = tl.load(seen + row, mask=row >= 0, other=-1)
    number = tl.where(last >> 32 == tl.load(step), (last << 32) >> 32, UNKNOWN)
    tl.store(found_P + k, (number << 32) | (row.to(tl.int64) & 0xFFFFFFFF), mask=first)
    joins = first & (row >= 0) & (number < 0)
    tl.store(flags_P + k, tl.full(k.shape, 1, tl.int64), mask=joins)
    begins = first & (row < 0)
    if ADMITS:
        k = tl.load(admitted_H + at, mask=begins, other=NEVER)
    tl.store(flags_P + k, tl.full(k.shape, 1 << 32, tl.int64), mask=begins & (k < NEVER))


@triton.jit
def number(
    row_P, inverse_P, new_rows, totals, first_H, admitted_H, place_P, sums_P, found_P, ids, row_vocabularies, seen,
    born, num_rows, free_rows, num_free, num_refused, tally, unique_rows, num_unique, num_slots, step, id_P, cell_P,
    vocabularies, admit_P, max_rows, max_unique, num_positions, num_lookups, ADMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    fill, free, unique, now = tl.load(num_rows), tl.load(num_free), tl.load(num_unique), tl.load(step)
    room = tl.maximum(tl.minimum(max_rows, tl.load(num_slots) // 8 * 7) - (fill - free), 0)

    at = tl.load(place_P + k, mask=valid, other=0)
    begin = tl.load(first_H + at, mask=valid, other=0)
    found = tl.load(found_P + begin, mask=valid, other=-1)
    row, number = (found << 32) >> 32, found >> 32
    known = row >= 0
    if ADMITS:
        begin = tl.where(known, begin, tl.load(admitted_H + at, mask=valid, other=NEVER))
    sums = tl.load(sums_P + begin, mask=valid & (begin < NEVER), other=0)
    rank = (sums >> 32) - 1  # among the new keys
    taken = valid & ~known & (begin < NEVER) & (rank < room)
    reused = tl.load(free_rows + (free - 1 - rank), mask=taken & (rank < free), other=0)
    new_row = tl.where(rank < free, reused, fill + rank - free)
    row = tl.where(known, row, tl.where(taken & (k >= begin), new_row, REFUSED))
    fresh = number < 0
    number = tl.where(fresh, unique + (sums & 0xFFFFFFFF) + tl.minimum(rank + 1, room) - 1, number)
    numbered = valid & (row >= 0) & (number < max_unique)
    tl.store(row_P + k, tl.where(valid, row, UNKNOWN).to(tl.int32), mask=k < num_positions)
    tl.store(inverse_P + k, tl.where(numbered, number, UNKNOWN).to(tl.int32), mask=k < num_positions)

    created = taken & (k == begin)
    joins = numbered & fresh & (k == begin)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, created)
    tl.store(new_rows + rank, row.to(tl.int32), mask=created)
    tl.store(ids + row, id, mask=created)
    tl.store(row_vocabularies + row, vocabulary, mask=created)
    tl.store(born + row, tl.zeros_like(k) + now.to(tl.int32), mask=created)
    tl.store(seen + row, tl.where(joins, (now << 32) | number, -1), mask=created | joins)
    tl.store(unique_rows + number, row.to(tl.int32), mask=joins)

    waits = k < 0
    if ADMITS:
        waits = tl.load(admit_P + k, mask=valid, other=0) == 0
    unadmitted = valid & (row == REFUSED) & waits
    refused = tl.sum((valid & ~numbered & ~unadmitted).to(tl.int64), axis=0)
    tl.atomic_add(num_refused, refused, mask=refused > 0, sem="relaxed")
    waiting = tl.sum(unadmitted.to(tl.int64), axis=0)
    tl.atomic_add(tally + UNADMITTED, waiting, mask=waiting > 0, sem="relaxed")
    looked_up = tl.sum(valid.to(tl.int64), axis=0)
    tl.atomic_add(tally + LOOKED_UP, looked_up, mask=looked_up > 0, sem="relaxed")
    if tl.program_id(0) == 0:
        all_sums = tl.load(sums_P + num_positions - 1)
        num_created = tl.minimum(all_sums >> 32, room)
        num_joined = tl.minimum((all_sums & 0xFFFFFFFF) + num_created, max_unique - unique)
        tl.store(totals, num_created)
        tl.store(totals + 1, num_joined)


@triton.jit
def insert(
    slots, num_crowded, new_rows, totals, ids, row_vocabularies, num_rows, num_free, tally, num_unique, num_slots, salt,
    BLOCK: tl.constexpr,
):  # fmt: skip
    num_created = tl.load(totals)
    mask = (tl.load(num_slots) - 1).to(tl.uint64)
    for begin in range(tl.program_id(0) * BLOCK, num_created, tl.num_programs(0) * BLOCK):
        nth = begin + tl.arange(0, BLOCK)
        active = nth < num_created
        row = tl.load(new_rows + nth, mask=active, other=0)
        vocabulary = tl.load(row_vocabularies + row, mask=active, other=0)
        hash = hash_id(tl.load(ids + row, mask=active, other=0), vocabulary, tl.load(salt))
        crowded = place(slots, mask, hash, slot_of(hash, vocabulary, row), active)
        tl.atomic_add(num_crowded, crowded, mask=crowded > 0, sem="relaxed")
    if tl.program_id(0) == 0:
        free = tl.load(num_free)
        reused = tl.minimum(num_created, free)
        tl.store(num_free, free - reused)
        tl.store(num_rows, tl.load(num_rows) + num_created - reused)
        tl.store(num_unique, tl.load(num_unique) + tl.load(totals + 1))
        tl.store(tally + CREATED, tl.load(tally + CREATED) + num_created)


@triton.jit
def initialise(
    rows, new_rows, totals, ids, row_vocabularies, init_keys, init_params, stride, width, size, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    num_created = tl.load(totals)
    column = tl.arange(0, COLUMNS)[None, :]
    for begin in range(tl.program_id(0) * ROWS, num_created, tl.num_programs(0) * ROWS):
        nth = begin + tl.arange(0, ROWS)[:, None]
        row = tl.load(new_rows + nth, mask=nth < num_created, other=0)
        id = tl.load(ids + row, mask=nth < num_created, other=0)
        vocabulary = tl.load(row_vocabularies + row, mask=nth < num_created, other=0)
        within = (nth < num_created) & (column < width)
        value = initial_values(init_keys, init_params, width, vocabulary, id, column, within)
        at = rows + row.to(tl.int64) * stride
        tl.store(at + column, value, mask=within)
        for first in range(width, size, COLUMNS):
            behind = (nth < num_created) & (first + column < size)
            tl.store(at + first + column, tl.zeros_like(value), mask=behind)


def scratch_table(cell_P: Tensor) -> Tensor:
    """Places that `claim` can give out to all positions: i32, empty."""
    return cell_P.new_full((triton.next_power_of_2(int(cell_P.numel() / SCRATCH_LOAD) + 1),), EMPTY.value)


def find_or_insert_(
    slots: Tensor, ids: Tensor, row_vocabularies: Tensor, seen: Tensor, born: Tensor, rows: Tensor, num_rows: Tensor,
    free_rows: Tensor, num_free: Tensor, num_refused: Tensor, tally: Tensor, num_crowded: Tensor, unique_rows: Tensor,
    num_unique: Tensor, num_slots: Tensor, salt: Tensor, step: Tensor, id_P: Tensor, cell_P: Tensor,
    vocabularies: Tensor, init_keys: Tensor, init_params: Tensor, admit_P: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`recfx.kernels.find_or_insert.definition`."""
    num, num_lookups, width = cell_P.numel(), len(vocabularies), rows.shape[2]
    row_P, inverse_P, place_P, new_rows = (torch.empty_like(cell_P) for _ in range(4))
    if num == 0:
        return row_P, inverse_P
    flags_P, found_P = torch.empty_like(id_P), torch.empty_like(id_P)
    totals = id_P.new_empty(2)
    first_H = scratch_table(cell_P)
    admitted_H = first_H if admit_P is None else torch.full_like(first_H, NEVER.value)
    admit = cell_P if admit_P is None else admit_P.view(torch.uint8)
    by_position = {"ADMITS": admit_P is not None, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    grid = (triton.cdiv(num, BLOCK),)

    claim[grid](
        first_H, admitted_H, place_P, flags_P, id_P, cell_P, vocabularies, salt, admit, num, num_lookups,
        first_H.numel(), **by_position,
    )  # fmt: skip
    look_up[grid](
        first_H, admitted_H, place_P, flags_P, found_P, slots, ids, seen, num_slots, salt, step, id_P, cell_P,
        vocabularies, num, num_lookups, **by_position,
    )  # fmt: skip
    number[grid](
        row_P, inverse_P, new_rows, totals, first_H, admitted_H, place_P, torch.cumsum(flags_P, 0), found_P, ids,
        row_vocabularies, seen, born, num_rows, free_rows, num_free, num_refused, tally, unique_rows, num_unique,
        num_slots, step, id_P, cell_P, vocabularies, admit, ids.numel(), unique_rows.numel(), num, num_lookups,
        **by_position,
    )  # fmt: skip
    insert[programs(num, BLOCK)](
        slots, num_crowded, new_rows, totals, ids, row_vocabularies, num_rows, num_free, tally, num_unique, num_slots,
        salt, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    initialise[programs(num, rows_of(width))](
        rows, new_rows, totals, ids, row_vocabularies, init_keys, init_params, rows.stride(0), width,
        rows.shape[1] * width, ROWS=rows_of(width), COLUMNS=columns_of(width),
    )  # fmt: skip
    return row_P, inverse_P
