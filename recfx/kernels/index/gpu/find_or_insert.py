"""find_or_insert_ on a GPU: the dict's order without a sort and without a read by the host.

    claim      every id claims a place of a scratch table, which ends with the id's first position in the batch
    look_up    first occurrences read the index; where a row or a unique number is to be given out is summed up to each
               position (`scan.py`), which is its rank among those before it
    number     ranks become rows (free ones first) and unique numbers; every occurrence reads its first one's
    store_new  new rows enter the index, which is all that races: for places, never for numbers; and get their initial
               values

The scratch table is what keeps a refused id out of the index: nothing is inserted before it is known to have a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels import op
from recfx.kernels.counters import PLACES
from recfx.kernels.gpu.counters import (
    CREATED,
    LOOKED_UP,
    NUM_CROWDED,
    NUM_FREE,
    NUM_REFUSED,
    NUM_ROWS,
    NUM_SLOTS,
    NUM_UNIQUE,
    SALT,
    STEP,
    UNADMITTED,
)
from recfx.kernels.gpu.launch import BLOCK, KEYS, NUM_WARPS, TILE, columns_of, programs
from recfx.kernels.gpu.scan import add_up, num_counters, sum_before, sum_of_all, sums_of
from recfx.kernels.index.gpu.hashing import EMPTY, hash_id, key_at, next_run, place, probe, slot_of, swap_where
from recfx.kernels.rows.gpu.initial import initial_values

__all__ = ["UNKNOWN", "claim", "find_or_insert_", "scratch_table"]

UNKNOWN, REFUSED = tl.constexpr(op.UNKNOWN), tl.constexpr(op.REFUSED)
SCRATCH_LOAD = 3 / 4
INSERTING, INITIALISING = 6, 10  # programs of `store_new` that a multiprocessor holds at once: 16 in all


@triton.jit
def lower_to(places, at, k, mask):
    """An empty place counts as above every position: all ones, compared without a sign."""
    tl.atomic_min(places.to(tl.pointer_type(tl.uint32)) + at, k.to(tl.uint32), mask=mask, sem="relaxed")


@triton.jit
def claim(
    first_H, admitted_H, place_P, id_P, cell_P, vocabularies, salt, admit_P, num_positions, num_lookups, num_places,
    ADMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """first_H[place_P[k]]: the first position of k's key; admitted_H: the first one admitted, EMPTY without."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, valid)
    # Not from where the index would begin: ids that collide there must not collide here.
    at = (next_run(hash_id(id, vocabulary, tl.load(salt))) & (num_places - 1).to(tl.uint64)).to(tl.int32)
    active = valid
    while tl.max(active.to(tl.int32), axis=0) > 0:
        holder = tl.load(first_H + at, mask=active, other=0)
        empty = active & (holder == EMPTY)
        if tl.max(empty.to(tl.int32), axis=0) > 0:
            holder = tl.where(empty, swap_where(empty, first_H, num_places, at, EMPTY, k), holder)
        held = active & (holder != EMPTY)
        held_id, held_vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, holder, held)
        same = held & (held_id == id) & (held_vocabulary == vocabulary)
        lower_to(first_H, at, k, same & (k < holder))
        active = held & ~same
        at = tl.where(active, (at + 1) & (num_places - 1), at)
    tl.store(place_P + k, at, mask=valid)
    if ADMITS:
        admitted = tl.load(admit_P + k, mask=valid, other=0) != 0
        lower_to(admitted_H, at, k, valid & admitted)


@triton.jit
def look_up(
    sums_P, sums, done, first_H, admitted_H, place_P, found_P, slots, ids, seen, counters, id_P, cell_P,
    vocabularies, num_positions, num_lookups, ADMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums_P: how many positions of its program up to each give out a number (low 16 bits), and a row (high 16)."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    at = tl.load(place_P + k, mask=valid, other=0)
    first = valid & (tl.load(first_H + at, mask=valid, other=0) == k)
    begins = first
    if ADMITS:
        begins = valid & (tl.load(admitted_H + at, mask=valid, other=0) == k)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, first | begins)
    hash = hash_id(id, vocabulary, tl.load(counters + SALT))
    row = probe(slots, ids, (tl.load(counters + NUM_SLOTS) - 1).to(tl.uint64), hash, vocabulary, id, first | begins)
    last = tl.load(seen + row, mask=row >= 0, other=-1)
    number = tl.where(last >> 32 == tl.load(counters + STEP) + 1, (last << 32) >> 32, UNKNOWN)
    tl.store(found_P + k, (number << 32) | (row.to(tl.int64) & 0xFFFFFFFF), mask=first)
    joins = (first & (row >= 0) & (number < 0)).to(tl.int32)
    begins = (begins & (row < 0)).to(tl.int32)
    tl.store(sums_P + k, tl.cumsum(joins + (begins << 16), axis=0), mask=k < num_positions)
    add_up(sums, done, tl.sum(joins.to(tl.int64) + (begins.to(tl.int64) << 32), axis=0))


@triton.jit
def number(
    row_P, inverse_P, new_rows, totals, first_H, admitted_H, place_P, sums_P, sums, found_P, ids, row_vocabularies,
    seen, born, free_rows, unique_rows, counters, id_P, cell_P, vocabularies, admit_P, max_rows, max_unique,
    num_positions, num_lookups, num_sums, ADMITS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    fill, free = tl.load(counters + NUM_ROWS), tl.load(counters + NUM_FREE)
    unique, now = tl.load(counters + NUM_UNIQUE), tl.load(counters + STEP) + 1
    room = tl.maximum(tl.minimum(max_rows, tl.load(counters + NUM_SLOTS) // 8 * 7) - (fill - free), 0)

    at = tl.load(place_P + k, mask=valid, other=0)
    begin = tl.load(first_H + at, mask=valid, other=0)
    found = tl.load(found_P + begin, mask=valid, other=-1)
    row, number = (found << 32) >> 32, found >> 32
    known = row >= 0
    if ADMITS:
        begin = tl.where(known, begin, tl.load(admitted_H + at, mask=valid, other=EMPTY))
    ranked = valid & (begin != EMPTY)
    here = tl.load(sums_P + begin, mask=ranked, other=0)
    before = sum_before(sums, num_sums, begin // KEYS, ranked)
    rank = (before >> 32) + (here >> 16) - 1  # among the new keys
    taken = ranked & ~known & (rank < room)
    reused = tl.load(free_rows + (free - 1 - rank), mask=taken & (rank < free), other=0)
    new_row = tl.where(rank < free, reused, fill + rank - free)
    row = tl.where(known, row, tl.where(taken & (k >= begin), new_row, REFUSED))
    fresh = number < 0
    joined = (before & 0xFFFFFFFF) + (here & 0xFFFF)
    number = tl.where(fresh, unique + joined + tl.minimum(rank + 1, room) - 1, number)
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
    tl.atomic_add(counters + NUM_REFUSED, refused, mask=refused > 0, sem="relaxed")
    waiting = tl.sum(unadmitted.to(tl.int64), axis=0)
    tl.atomic_add(counters + UNADMITTED, waiting, mask=waiting > 0, sem="relaxed")
    looked_up = tl.sum(valid.to(tl.int64), axis=0)
    tl.atomic_add(counters + LOOKED_UP, looked_up, mask=looked_up > 0, sem="relaxed")
    if tl.program_id(0) == 0:
        all_sums = sum_of_all(sums, num_sums)
        num_created = tl.minimum(all_sums >> 32, room)
        num_joined = tl.minimum((all_sums & 0xFFFFFFFF) + num_created, max_unique - unique)
        tl.store(totals, num_created)
        tl.store(totals + 1, num_joined)


@triton.jit
def insert(
    slots, counters, new_rows, num_created, ids, row_vocabularies, program, num_programs, BLOCK: tl.constexpr
):  # fmt: skip
    mask = (tl.load(counters + NUM_SLOTS) - 1).to(tl.uint64)
    for begin in range(program * BLOCK, num_created, num_programs * BLOCK):
        nth = begin + tl.arange(0, BLOCK)
        active = nth < num_created
        row = tl.load(new_rows + nth, mask=active, other=0)
        vocabulary = tl.load(row_vocabularies + row, mask=active, other=0)
        hash = hash_id(tl.load(ids + row, mask=active, other=0), vocabulary, tl.load(counters + SALT))
        crowded = place(slots, mask, hash, slot_of(hash, vocabulary, row), active)
        tl.atomic_add(counters + NUM_CROWDED, crowded, mask=crowded > 0, sem="relaxed")


@triton.jit
def initialise(
    rows, new_rows, num_created, ids, row_vocabularies, init_keys, init_params, stride, width, size, program,
    num_programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    for begin in range(program * ROWS, num_created, num_programs * ROWS):
        nth = begin + tl.arange(0, ROWS)[:, None]
        row = tl.load(new_rows + nth, mask=nth < num_created, other=0)
        id = tl.load(ids + row, mask=nth < num_created, other=0)
        vocabulary = tl.load(row_vocabularies + row, mask=nth < num_created, other=0)
        at = rows + row.to(tl.int64) * stride
        for t in tl.static_range(TILES):
            c = t * COLUMNS + column
            within = (nth < num_created) & (c < width)
            value = initial_values(init_keys, init_params, width, vocabulary, id, c, within)
            tl.store(at + c, value, mask=within)
        for first in range(width, size, COLUMNS):
            behind = (nth < num_created) & (first + column < size)
            tl.store(at + first + column, tl.zeros([ROWS, COLUMNS], tl.float32), mask=behind)


@triton.jit
def end_counts(num_created, num_joined, counters):
    free = tl.load(counters + NUM_FREE)
    reused = tl.minimum(num_created, free)
    tl.store(counters + NUM_FREE, free - reused)
    tl.store(counters + NUM_ROWS, tl.load(counters + NUM_ROWS) + num_created - reused)
    tl.store(counters + NUM_UNIQUE, tl.load(counters + NUM_UNIQUE) + num_joined)
    tl.store(counters + CREATED, tl.load(counters + CREATED) + num_created)


@triton.jit
def store_new(
    slots, counters, rows, new_rows, totals, ids, row_vocabularies, init_keys, init_params, stride, width, size,
    num_inserting, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs wait for the index, the others write rows: neither is held up by the other."""
    program, num_created = tl.program_id(0), tl.load(totals)
    if program < num_inserting:
        insert(slots, counters, new_rows, num_created, ids, row_vocabularies, program, num_inserting, BLOCK)
        if program == 0:
            end_counts(num_created, tl.load(totals + 1), counters)
    else:
        initialise(
            rows, new_rows, num_created, ids, row_vocabularies, init_keys, init_params, stride, width, size,
            program - num_inserting, tl.num_programs(0) - num_inserting, ROWS, COLUMNS, TILES,
        )  # fmt: skip


def scratch_table(cell_P: Tensor, *, num_counters: int = 0, num_tables: int = 1) -> tuple[Tensor, ...]:
    """(places that `claim` can give out to all positions, ..., counters), i32 and empty, which is -1: one fill."""
    num = triton.next_power_of_2(int(cell_P.numel() / SCRATCH_LOAD) + 1)
    return cell_P.new_full((num * num_tables + num_counters,), EMPTY.value).split([num] * num_tables + [num_counters])


def find_or_insert_(
    slots: Tensor, ids: Tensor, row_vocabularies: Tensor, seen: Tensor, born: Tensor, rows: Tensor, free_rows: Tensor,
    unique_rows: Tensor, counters: Tensor, id_P: Tensor, cell_P: Tensor, vocabularies: Tensor, init_keys: Tensor,
    init_params: Tensor, admit_P: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`recfx.kernels.index.find_or_insert.definition`."""
    num, num_lookups, width = cell_P.numel(), len(vocabularies), rows.shape[2]
    row_P, inverse_P, place_P, new_rows = (torch.empty_like(cell_P) for _ in range(4))
    if num == 0:
        return row_P, inverse_P
    grid, probing = (triton.cdiv(num, BLOCK),), (triton.cdiv(num, KEYS),)
    found_P, totals, sums_P, sums = (
        torch.empty_like(id_P),
        id_P.new_empty(2),
        torch.empty_like(cell_P),
        sums_of(id_P, *probing),
    )
    num_tables = 1 if admit_P is None else 2
    *tables, done = scratch_table(cell_P, num_counters=num_counters(*probing), num_tables=num_tables)
    first_H, admitted_H = tables[0], tables[-1]
    admit = cell_P if admit_P is None else admit_P.view(torch.uint8)
    admits = {"ADMITS": admit_P is not None, "num_warps": NUM_WARPS}

    claim[grid](
        first_H, admitted_H, place_P, id_P, cell_P, vocabularies, counters[PLACES["SALT"] :], admit, num, num_lookups,
        first_H.numel(), BLOCK=BLOCK, **admits,
    )  # fmt: skip
    look_up[probing](
        sums_P, sums, done, first_H, admitted_H, place_P, found_P, slots, ids, seen, counters, id_P, cell_P,
        vocabularies, num, num_lookups, BLOCK=KEYS, **admits,
    )  # fmt: skip
    number[grid](
        row_P, inverse_P, new_rows, totals, first_H, admitted_H, place_P, sums_P, sums, found_P, ids, row_vocabularies,
        seen, born, free_rows, unique_rows, counters, id_P, cell_P, vocabularies, admit, ids.numel(),
        unique_rows.numel(), num, num_lookups, *probing, KEYS=KEYS, BLOCK=BLOCK, **admits,
    )  # fmt: skip
    columns = min(columns_of(width), TILE // 4)  # the tile of a warp
    rows_of_warp = TILE // 4 // columns
    (inserting,), (initialising,) = programs(num, KEYS, INSERTING), programs(num, rows_of_warp, INITIALISING)
    store_new[(inserting + initialising,)](
        slots, counters, rows, new_rows, totals, ids, row_vocabularies, init_keys, init_params, rows.stride(0), width,
        rows.shape[1] * width, inserting, ROWS=rows_of_warp, COLUMNS=columns, TILES=triton.cdiv(width, columns),
        BLOCK=KEYS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return row_P, inverse_P
