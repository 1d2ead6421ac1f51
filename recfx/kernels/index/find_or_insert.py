"""find_or_insert_: rows of all ids, new ones inserted in dict order, with de-duplication."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index import hashing
from recfx.kernels.op import REFUSED, UNKNOWN, define_op
from recfx.kernels.rows.initial import initial_values

__all__ = ["CREATED", "EVICTED", "LOOKED_UP", "TALLIES", "UNADMITTED", "find_or_insert_"]

# What `tally` counts since the table began: ids looked up by training, rows created and evicted, ids not admitted.
LOOKED_UP, CREATED, EVICTED, UNADMITTED, TALLIES = range(5)


def definition(
    slots: Tensor,
    ids: Tensor,
    row_vocabularies: Tensor,
    seen: Tensor,
    born: Tensor,
    rows: Tensor,
    num_rows: Tensor,
    free_rows: Tensor,
    num_free: Tensor,
    num_refused: Tensor,
    tally: Tensor,
    num_crowded: Tensor,
    unique_rows: Tensor,
    num_unique: Tensor,
    num_slots: Tensor,
    salt: Tensor,
    step: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
    init_keys: Tensor,
    init_params: Tensor,
    admit_P: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`row = d.setdefault((vocabulary, id), len(d))` over the ids in the order (sample, lookup, place in the list).

    Freed rows are taken first, the lowest number before the others. An absent id gets a row at its first occurrence k
    with admit_P[k] (without admit_P: at its first), until then it is refused and counted as not admitted.
    Row and unique numbers follow that order alone. The table takes no more rows than `ids` has places, nor more than
    7/8 of `num_slots`; a step no more unique rows than `unique_rows` has places. What finds no place is counted.

    Shapes:   slots i64 [S], ids i64 [R], row_vocabularies i32 [R], seen i64 [R], born i32 [R],
              rows f32 [R, 1 + slots, W], free_rows i32 [R] of which num_free are in use, descending,
              unique_rows i32 [U], tally i64 [TALLIES], counters i64 []; id_P, cell_P, vocabularies as in `find`;
              init_keys i64 [V, W], init_params f32 [V, 3, W], admit_P bool [P].
    Returns:  row_P i32 [P] (REFUSED without room or not admitted), inverse_P i32 [P] (unique number in this step, -1
              without).
    Writes:   slots, ids, row_vocabularies, seen, born, rows, num_rows, num_free, num_refused, tally, num_crowded,
              unique_rows, num_unique.
    """
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
    num_crowded += hashing.place(slots, num_slots, salt, new_keys[0], new_keys[1], new_row)
    ids[new_row], row_vocabularies[new_row] = new_keys[1], new_keys[0].int()
    seen[new_row], born[new_row] = torch.full_like(new_row, -1), step.int()
    rows[new_row] = torch.zeros_like(rows[new_row])
    rows[new_row, 0] = initial_values(new_keys[1], init_keys[new_keys[0]], init_params[new_keys[0]])
    num_reused = torch.clamp(num_free, max=new_row.numel())
    num_rows += new_row.numel() - num_reused
    num_free -= num_reused

    held = torch.where(row >= 0, seen[row.clamp(min=0)], -1)
    unique = torch.where(held >> 32 == step, held << 32 >> 32, UNKNOWN)  # UNKNOWN where `keep_trained_` took it away
    joins = (row >= 0) & (unique == UNKNOWN)
    number = num_unique + torch.cumsum(joins, 0) - 1
    joins &= number < unique_rows.numel()
    unique = torch.where(joins, number, unique)
    unique_rows[number[joins]] = row[joins].int()
    seen[row[joins]] = (step << 32) | number[joins]
    num_unique += joins.sum()

    too_early = nth < first[inverse]  # of ids with a row: their occurrences before the one that was admitted
    row_V, unique_V = torch.where(too_early, REFUSED, row[inverse]), torch.where(too_early, UNKNOWN, unique[inverse])
    unadmitted = (row_V == REFUSED) & ~admitted
    num_refused += ((unique_V == UNKNOWN) & ~unadmitted).sum()
    tally[LOOKED_UP] += id.numel()
    tally[CREATED] += new_row.numel()
    tally[UNADMITTED] += unadmitted.sum()
    row_P = torch.full_like(cell_P, UNKNOWN)
    inverse_P = row_P.clone()
    row_P[valid], inverse_P[valid] = row_V.int(), unique_V.int()
    return row_P, inverse_P


def _fake(*args):  # type: ignore[no-untyped-def]
    cell_P = args[18]
    return torch.empty_like(cell_P), torch.empty_like(cell_P)


find_or_insert_ = define_op(
    "find_or_insert_(Tensor(a!) slots, Tensor(b!) ids, Tensor(c!) row_vocabularies, Tensor(d!) seen, Tensor(e!) born,"
    " Tensor(f!) rows, Tensor(g!) num_rows, Tensor free_rows, Tensor(h!) num_free, Tensor(i!) num_refused,"
    " Tensor(j!) tally, Tensor(k!) num_crowded, Tensor(l!) unique_rows, Tensor(m!) num_unique, Tensor num_slots,"
    " Tensor salt, Tensor step, Tensor id_P, Tensor cell_P, Tensor vocabularies, Tensor init_keys,"
    " Tensor init_params, Tensor? admit_P) -> (Tensor, Tensor)",
    definition=definition,
    cuda="index.gpu.find_or_insert",
    fake=_fake,
)
