"""find_or_insert_: rows of all ids, new ones inserted in dict order, with de-duplication."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.counters import (
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
from recfx.kernels.index import hashing
from recfx.kernels.op import REFUSED, UNKNOWN, define_op
from recfx.kernels.rows.initial import initial_values

__all__ = ["find_or_insert_"]


# long: the specification of the table, read from top to bottom
def definition(
    slots: Tensor,
    ids: Tensor,
    row_vocabularies: Tensor,
    seen: Tensor,
    born: Tensor,
    rows: Tensor,
    free_rows: Tensor,
    unique_rows: Tensor,
    counters: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
    init_keys: Tensor,
    init_params: Tensor,
    admit_P: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`row = d.setdefault((vocabulary, id), len(d))` over the ids in the order (sample, lookup, place in the list).

    The step is the one in progress: its number is one more than the counter STEP. Freed rows are taken first, the
    lowest number before the others. An absent id gets a row at its first occurrence k with admit_P[k] (without admit_P:
    at its first); earlier ones are REFUSED and counted as not admitted. Row and unique numbers depend on that order
    alone. The table takes at most as many rows as `ids` has places, and at most 7/8 of NUM_SLOTS; a step takes at most
    as many unique rows as `unique_rows` has places. What finds no place is counted.

    Shapes:   slots i64 [S], ids i64 [R], row_vocabularies i32 [R], seen i64 [R], born i32 [R],
              rows f32 [R, 1 + slots, W], free_rows i32 [R] of which NUM_FREE are in use, descending,
              unique_rows i32 [U], counters i64 [NUM_COUNTERS]; id_P, cell_P, vocabularies as in `find`;
              init_keys i64 [V, W], init_params f32 [V, 3, W], admit_P bool [P].
    Returns:  row_P i32 [P] (REFUSED without room or not admitted), inverse_P i32 [P] (unique number in this step, -1
              without).
    Writes:   slots, ids, row_vocabularies, seen, born, rows, unique_rows, counters.
    """
    num_rows, num_free, num_slots, salt = (counters[place].clone() for place in (NUM_ROWS, NUM_FREE, NUM_SLOTS, SALT))
    num_unique, step = counters[NUM_UNIQUE].clone(), counters[STEP] + 1
    valid = cell_P >= 0
    vocabulary, id = vocabularies[cell_P[valid] % len(vocabularies)].long(), id_P[valid]
    keys, inverse = torch.unique(torch.stack([vocabulary, id]), dim=1, return_inverse=True)
    known = hashing.probe(slots, ids, num_slots, salt, *keys)
    nth = torch.arange(id.numel(), device=id.device)
    admitted = torch.ones_like(nth, dtype=torch.bool) if admit_P is None else admit_P[valid]
    counts = torch.where(admitted | (known[inverse] >= 0), nth, id.numel())  # occurrences that a row is there for
    first = torch.full((keys.shape[1],), id.numel(), device=id.device).scatter_reduce(0, inverse, counts, "amin")
    order = torch.argsort(first, stable=True)  # distinct keys by first occurrence
    keys, row, first, inverse = keys[:, order], known[order], first[order], torch.argsort(order)[inverse]

    room = torch.clamp(num_slots // 8 * 7, max=ids.numel()) - (num_rows - num_free)
    wants = (row == UNKNOWN) & (first < id.numel())
    rank = torch.cumsum(wants, 0) - 1
    reused = free_rows[(num_free - 1 - rank).clamp(min=0)]
    row = torch.where(wants, torch.where(rank < num_free, reused, num_rows + rank - num_free), row)
    row = torch.where((wants & (rank >= room)) | (row == UNKNOWN), REFUSED, row)
    is_new = wants & (row >= 0)
    new_keys, new_row = keys[:, is_new], row[is_new]
    counters[NUM_CROWDED] += hashing.place(slots, num_slots, salt, new_keys[0], new_keys[1], new_row)
    ids[new_row], row_vocabularies[new_row] = new_keys[1], new_keys[0].int()
    seen[new_row], born[new_row] = torch.full_like(new_row, -1), step.int()
    rows[new_row] = torch.zeros_like(rows[new_row])
    rows[new_row, 0] = initial_values(new_keys[1], init_keys[new_keys[0]], init_params[new_keys[0]])
    num_reused = torch.clamp(num_free, max=new_row.numel())
    counters[NUM_ROWS] += new_row.numel() - num_reused
    counters[NUM_FREE] -= num_reused

    held = torch.where(row >= 0, seen[row.clamp(min=0)], -1)
    unique = torch.where(held >> 32 == step, held << 32 >> 32, UNKNOWN)  # UNKNOWN where `keep_trained_` took it away
    joins = (row >= 0) & (unique == UNKNOWN)
    number = num_unique + torch.cumsum(joins, 0) - 1
    joins &= number < unique_rows.numel()
    unique = torch.where(joins, number, unique)
    unique_rows[number[joins]] = row[joins].int()
    seen[row[joins]] = (step << 32) | number[joins]
    counters[NUM_UNIQUE] += joins.sum()

    too_early = nth < first[inverse]  # of ids with a row: their occurrences before the one that was admitted
    row_V, unique_V = torch.where(too_early, REFUSED, row[inverse]), torch.where(too_early, UNKNOWN, unique[inverse])
    unadmitted = (row_V == REFUSED) & ~admitted
    counters[NUM_REFUSED] += ((unique_V == UNKNOWN) & ~unadmitted).sum()
    counters[LOOKED_UP] += id.numel()
    counters[CREATED] += new_row.numel()
    counters[UNADMITTED] += unadmitted.sum()
    row_P = torch.full_like(cell_P, UNKNOWN)
    inverse_P = row_P.clone()
    row_P[valid], inverse_P[valid] = row_V.int(), unique_V.int()
    return row_P, inverse_P


def _fake(  # type: ignore[no-untyped-def]
    slots, ids, row_vocabularies, seen, born, rows, free_rows, unique_rows, counters, id_P, cell_P, vocabularies,
    init_keys, init_params, admit_P,
):  # fmt: skip
    return torch.empty_like(cell_P), torch.empty_like(cell_P)


find_or_insert_ = define_op(
    "find_or_insert_",
    definition=definition,
    cuda="index.gpu.find_or_insert",
    fake=_fake,
)
