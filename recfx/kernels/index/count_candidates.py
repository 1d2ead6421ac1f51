"""count_candidates_: how often ids that have no row have occurred, counted exactly in a separate index."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_CANDIDATE_SLOTS, NUM_CANDIDATES, NUM_SLOTS, SALT
from recfx.kernels.index import hashing
from recfx.kernels.op import UNKNOWN, define_op

__all__ = ["count_candidates_"]


def definition(
    candidate_slots: Tensor,
    candidate_ids: Tensor,
    candidate_vocabularies: Tensor,
    candidate_counts: Tensor,
    slots: Tensor,
    ids: Tensor,
    counters: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
) -> Tensor:
    """`n = d[vocabulary, id] = d.get((vocabulary, id), 0) + 1` over the ids without a row, in the table's order.

    Returns n for each occurrence, itself included; 0 for ids that have a row and for padding. When `candidate_ids` or
    7/8 of the index is full, further ids are not counted: their every occurrence is their first.

    Shapes:   candidate_slots i64 [S], candidate_ids i64 [K], candidate_vocabularies and candidate_counts i32 [K];
              the others as in `find` -> i32 [P].
    Writes:   candidate_slots, candidate_ids, candidate_vocabularies, candidate_counts, the counter NUM_CANDIDATES.
    """
    salt, num_candidates = counters[SALT], counters[NUM_CANDIDATES].clone()
    num_candidate_slots = counters[NUM_CANDIDATE_SLOTS]
    vocabulary_P = vocabularies[cell_P % len(vocabularies)].long()
    row_P = hashing.probe(slots, ids, counters[NUM_SLOTS], salt, vocabulary_P, id_P)
    absent = (cell_P >= 0) & (row_P == UNKNOWN)
    keys, inverse = torch.unique(torch.stack([vocabulary_P, id_P])[:, absent], dim=1, return_inverse=True)
    nth = torch.arange(inverse.numel(), device=ids.device)
    first = torch.full((keys.shape[1],), inverse.numel(), device=ids.device).scatter_reduce(0, inverse, nth, "amin")
    order = torch.argsort(first)
    keys, inverse = keys[:, order], torch.argsort(order)[inverse]

    number = hashing.probe(candidate_slots, candidate_ids, num_candidate_slots, salt, *keys)
    room = torch.clamp(num_candidate_slots // 8 * 7, max=candidate_ids.numel()) - num_candidates
    is_new = number == UNKNOWN
    rank = torch.cumsum(is_new, 0) - 1
    is_new &= rank < room
    number = torch.where(is_new, num_candidates + rank, number)
    new = number[is_new]
    hashing.place(candidate_slots, num_candidate_slots, salt, keys[0, is_new], keys[1, is_new], new)
    candidate_ids[new], candidate_vocabularies[new] = keys[1, is_new], keys[0, is_new].int()
    candidate_counts[new] = torch.zeros_like(new, dtype=torch.int32)
    counters[NUM_CANDIDATES] += new.numel()

    held = number != UNKNOWN
    before = torch.where(held, candidate_counts[number.clamp(min=0)], 0)
    size = torch.bincount(inverse, minlength=keys.shape[1])
    by_key = torch.argsort(inverse, stable=True)
    occurrence = torch.empty_like(nth)  # 1, 2, ... within each key
    occurrence[by_key] = nth - (torch.cumsum(size, 0) - size)[inverse[by_key]] + 1
    candidate_counts[number[held]] += size[held].int()
    count_P = torch.zeros_like(cell_P)
    count_P[absent] = torch.where(held[inverse], before[inverse] + occurrence, 1).int()
    return count_P


def _fake(  # type: ignore[no-untyped-def]
    candidate_slots, candidate_ids, candidate_vocabularies, candidate_counts, slots, ids, counters, id_P, cell_P,
    vocabularies,
):  # fmt: skip
    return torch.empty_like(cell_P)


count_candidates_ = define_op(
    "count_candidates_",
    definition=definition,
    cuda="index.gpu.count_candidates",
    fake=_fake,
)
