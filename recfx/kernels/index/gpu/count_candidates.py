"""count_candidates_ on a GPU: the ids without a row numbered as find_or_insert_ numbers rows, occurrences by a sort.

leave_out          ids that have a row
claim              every other id claims a place of a scratch table, which ends with its first position
find_candidates    first occurrences read the candidates' index; those without a candidate are summed up (`scan.py`)
(in order)         positions by candidate, in order within it (`occurrences.py`)
count_occurrences  each occurrence's number among its candidate's
store_counts       the new counts; new candidates enter the index
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.counters import PLACES
from recfx.kernels.gpu.counters import NUM_CANDIDATE_SLOTS, NUM_CANDIDATES, NUM_SLOTS, SALT
from recfx.kernels.gpu.launch import BLOCK, KEYS, NUM_WARPS
from recfx.kernels.gpu.occurrences import in_order
from recfx.kernels.gpu.runs import run_of
from recfx.kernels.gpu.scan import num_counters, store_sums, sum_of_all, sum_up_to, sums_of
from recfx.kernels.index.gpu.find_or_insert import UNKNOWN, claim, scratch_table
from recfx.kernels.index.gpu.hashing import hash_id, key_at, place, probe, slot_of

__all__ = ["count_candidates_"]


@triton.jit
def leave_out(
    absent_P, slots, ids, counters, id_P, cell_P, vocabularies, num_positions, num_lookups, BLOCK: tl.constexpr
):
    """absent_P: the cells of ids without a row, -1 for all others."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(cell_P + k, mask=k < num_positions, other=-1)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, cell >= 0)
    hash = hash_id(id, vocabulary, tl.load(counters + SALT))
    row = probe(slots, ids, (tl.load(counters + NUM_SLOTS) - 1).to(tl.uint64), hash, vocabulary, id, cell >= 0)
    tl.store(absent_P + k, tl.where(row < 0, cell, -1), mask=k < num_positions)


@triton.jit
def find_candidates(
    first_P, position_P, count_P, sums_P, sums, done, found_P, first_H, place_P, slots, ids, counters, id_P, cell_P,
    vocabularies, num_positions, num_lookups, BLOCK: tl.constexpr,
):  # fmt: skip
    """first_P: the first position of the same key; position_P: its own; both -1 without a key. sums_P: how many
    positions of its program up to each begin a new candidate."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    first = tl.load(first_H + tl.load(place_P + k, mask=valid, other=0), mask=valid, other=-1)
    tl.store(first_P + k, first, mask=k < num_positions)
    tl.store(position_P + k, tl.where(valid, k, -1), mask=k < num_positions)
    tl.store(count_P + k, tl.zeros_like(k), mask=(k < num_positions) & ~valid)
    leads = valid & (first == k)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, leads)
    hash = hash_id(id, vocabulary, tl.load(counters + SALT))
    number = probe(slots, ids, (tl.load(counters + NUM_CANDIDATE_SLOTS) - 1).to(tl.uint64), hash, vocabulary, id, leads)
    tl.store(found_P + k, number, mask=leads)
    is_new = (leads & (number < 0)).to(tl.int32)
    store_sums(sums_P, sums, done, k, is_new, k < num_positions)


@triton.jit
def occurrence(first_N, begins, last_first, n):
    """Of the n-th position in order: whether there is one, its key's first position, the places of all of its key's."""
    last = tl.load(last_first)
    valid = n < tl.load(begins + last + 1, mask=last >= 0, other=0)
    first = tl.load(first_N + n, mask=valid, other=-1)
    begin, end = run_of(begins, last_first, tl.where(first >= 0, first, last + 1))
    return first >= 0, first, begin, end


@triton.jit
def count_occurrences(
    count_P, number_N, first_N, order_N, begins, last_first, sums_P, sums, num_sums, found_P, counts, counters,
    max_candidates, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """number_N: the candidate of each position in order, UNKNOWN where there is no room for one."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid, first, begin, _ = occurrence(first_N, begins, last_first, n)
    fill = tl.load(counters + NUM_CANDIDATES)
    room = tl.minimum(max_candidates, tl.load(counters + NUM_CANDIDATE_SLOTS) // 8 * 7) - fill
    found = tl.load(found_P + first, mask=valid, other=0)
    before = tl.load(counts + found, mask=valid & (found >= 0), other=0)
    rank = sum_up_to((sums_P, sums, num_sums), first, valid, KEYS) - 1
    number = tl.where(found >= 0, found, tl.where(rank < room, fill + rank, UNKNOWN)).to(tl.int32)
    tl.store(number_N + n, number, mask=valid)
    at = count_P + tl.load(order_N + n, mask=valid, other=0)
    tl.store(at, tl.where(number >= 0, before + n - begin + 1, 1), mask=valid)


@triton.jit
def store_counts(
    slots, ids, candidate_vocabularies, counts, counters, number_N, first_N, order_N, begins, last_first, count_P, sums,
    num_sums, found_P, id_P, cell_P, vocabularies, max_candidates, num_lookups, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid, first, _, end = occurrence(first_N, begins, last_first, n)
    number = tl.load(number_N + n, mask=valid, other=UNKNOWN)
    held = valid & (n + 1 == end) & (number >= 0)
    k = tl.load(order_N + n, mask=held, other=0)
    tl.store(counts + number, tl.load(count_P + k, mask=held, other=0), mask=held)
    is_new = held & (tl.load(found_P + first, mask=held, other=0) < 0)
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, is_new)
    tl.store(ids + number, id, mask=is_new)
    tl.store(candidate_vocabularies + number, vocabulary, mask=is_new)
    hash = hash_id(id, vocabulary, tl.load(counters + SALT))
    place(
        slots,
        (tl.load(counters + NUM_CANDIDATE_SLOTS) - 1).to(tl.uint64),
        hash,
        slot_of(hash, vocabulary, number),
        is_new,
    )
    if tl.program_id(0) == 0:
        fill = tl.load(counters + NUM_CANDIDATES)
        room = tl.minimum(max_candidates, tl.load(counters + NUM_CANDIDATE_SLOTS) // 8 * 7) - fill
        tl.store(counters + NUM_CANDIDATES, fill + tl.minimum(sum_of_all(sums, num_sums), room))


def count_candidates_(
    candidate_slots: Tensor, candidate_ids: Tensor, candidate_vocabularies: Tensor, candidate_counts: Tensor,
    slots: Tensor, ids: Tensor, counters: Tensor, id_P: Tensor, cell_P: Tensor, vocabularies: Tensor,
) -> Tensor:  # fmt: skip
    """`recfx.kernels.index.count_candidates.definition`."""
    num, num_lookups, count_P = cell_P.numel(), len(vocabularies), torch.empty_like(cell_P)
    if num == 0:
        return count_P
    grid, probing = (triton.cdiv(num, BLOCK),), (triton.cdiv(num, KEYS),)
    by_position, by_key = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}, {"BLOCK": KEYS, "num_warps": NUM_WARPS}
    absent_P, place_P, first_P, position_P, found_P, number_N, sums_P = (torch.empty_like(cell_P) for _ in range(7))
    sums, (first_H, done) = sums_of(id_P, *probing), scratch_table(cell_P, num_counters=num_counters(*probing))
    keys = id_P, absent_P, vocabularies
    leave_out[probing](absent_P, slots, ids, counters, id_P, cell_P, vocabularies, num, num_lookups, **by_key)
    claim[grid](
        first_H,
        first_H,
        place_P,
        *keys,
        counters[PLACES["SALT"] :],
        cell_P,
        num,
        num_lookups,
        first_H.numel(),
        ADMITS=False,
        **by_position,
    )
    find_candidates[probing](
        first_P, position_P, count_P, sums_P, sums, done, found_P, first_H, place_P, candidate_slots, candidate_ids,
        counters, *keys, num, num_lookups, **by_key,
    )  # fmt: skip
    first_N, order_N, _, *ends = in_order(first_P, position_P, None, num)
    count_occurrences[grid](
        count_P, number_N, first_N, order_N, *ends, sums_P, sums, *probing, found_P, candidate_counts, counters,
        candidate_ids.numel(), KEYS=KEYS, **by_position,
    )  # fmt: skip
    store_counts[probing](
        candidate_slots, candidate_ids, candidate_vocabularies, candidate_counts, counters, number_N, first_N, order_N,
        *ends, count_P, sums, *probing, found_P, *keys, candidate_ids.numel(), num_lookups, **by_key,
    )  # fmt: skip
    return count_P
