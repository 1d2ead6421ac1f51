"""find_or_insert_: rows of all ids, new ones inserted in dict order, with de-duplication."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels import hashing
from recfx.kernels.initial import initial_values
from recfx.kernels.op import REFUSED, UNKNOWN, address, c_function, define_op

__all__ = ["find_or_insert_"]


def definition(
    slots: Tensor,
    ids: Tensor,
    row_vocabularies: Tensor,
    seen: Tensor,
    rows: Tensor,
    num_rows: Tensor,
    num_refused: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """`row = d.setdefault((vocabulary, id), len(d))` over the ids in the order (sample, lookup, place in the list).

    Row and unique numbers follow that order alone. The table takes no more rows than `ids` has places, nor more than
    7/8 of `num_slots`; a step no more unique rows than `unique_rows` has places. What finds no place is counted.

    Shapes:   slots i64 [S], ids i64 [R], row_vocabularies i32 [R], seen i64 [R], rows f32 [R, 1 + slots, W],
              unique_rows i32 [U], counters i64 []; id_P, cell_P, vocabularies as in `find`;
              init_keys i64 [V, W], init_params f32 [V, 3, W].
    Returns:  row_P i32 [P] (REFUSED without room), inverse_P i32 [P] (unique number in this step, -1 without).
    Writes:   slots, ids, row_vocabularies, seen, rows, num_rows, num_refused, unique_rows, num_unique.
    """
    valid = cell_P >= 0
    vocabulary, id = vocabularies[cell_P[valid] % len(vocabularies)].long(), id_P[valid]
    keys, inverse = torch.unique(torch.stack([vocabulary, id]), dim=1, return_inverse=True)
    nth = torch.arange(id.numel(), device=id.device)
    first = torch.full((keys.shape[1],), id.numel(), device=id.device).scatter_reduce(0, inverse, nth, "amin")
    order = torch.argsort(first)  # distinct keys by first occurrence
    keys, inverse = keys[:, order], torch.argsort(order)[inverse]

    row = hashing.probe(slots, ids, num_slots, salt, *keys)
    room = torch.clamp(num_slots // 8 * 7, max=ids.numel()) - num_rows
    is_new = row == UNKNOWN
    rank = torch.cumsum(is_new, 0) - 1
    row = torch.where(is_new, torch.where(rank < room, num_rows + rank, REFUSED), row)
    new_keys, new_row = keys[:, is_new & (row >= 0)], row[is_new & (row >= 0)]
    hashing.place(slots, num_slots, salt, new_keys[0], new_keys[1], new_row)
    ids[new_row], row_vocabularies[new_row], seen[new_row] = (
        new_keys[1],
        new_keys[0].int(),
        torch.full_like(new_row, -1),
    )
    rows[new_row] = torch.zeros_like(rows[new_row])
    rows[new_row, 0] = initial_values(new_keys[1], init_keys[new_keys[0]], init_params[new_keys[0]])
    num_rows += new_row.numel()

    held = torch.where(row >= 0, seen[row.clamp(min=0)], -1)
    unique = torch.where(held >> 32 == step, held & 0xFFFFFFFF, UNKNOWN)
    joins = (row >= 0) & (unique == UNKNOWN)
    number = num_unique + torch.cumsum(joins, 0) - 1
    joins &= number < unique_rows.numel()
    unique = torch.where(joins, number, unique)
    unique_rows[number[joins]] = row[joins].int()
    seen[row[joins]] = (step << 32) | number[joins]
    num_unique += joins.sum()
    num_refused += (unique[inverse] == UNKNOWN).sum()

    row_P = torch.full_like(cell_P, UNKNOWN)
    inverse_P = row_P.clone()
    row_P[valid], inverse_P[valid] = row[inverse].int(), unique[inverse].int()
    return row_P, inverse_P


_find_or_insert = c_function("find_or_insert", "p" * 12 + "iiii" + "ppi" + "pi" + "ppi" + "pp")


def _cpu(  # type: ignore[no-untyped-def]
    slots, ids, row_vocabularies, seen, rows, num_rows, num_refused, unique_rows, num_unique, num_slots, salt, step,
    id_P, cell_P, vocabularies, init_keys, init_params,
):  # fmt: skip
    row_P, inverse_P = torch.empty_like(cell_P), torch.empty_like(cell_P)
    table = (slots, ids, row_vocabularies, seen, rows, num_rows, num_refused, unique_rows, num_unique, num_slots, salt)
    _find_or_insert(
        *(t.data_ptr() for t in (*table, step)),
        *(ids.numel(), unique_rows.numel(), rows.stride(0), rows.shape[1]),
        *(address(id_P), address(cell_P), cell_P.numel()),
        *(address(vocabularies), len(vocabularies)),
        *(address(init_keys), address(init_params), rows.shape[2]),
        *(address(row_P), address(inverse_P)),
    )
    return row_P, inverse_P


def _fake(*args):  # type: ignore[no-untyped-def]
    cell_P = args[13]
    return torch.empty_like(cell_P), torch.empty_like(cell_P)


find_or_insert_ = define_op(
    "find_or_insert_(Tensor(a!) slots, Tensor(b!) ids, Tensor(c!) row_vocabularies, Tensor(d!) seen, Tensor(e!) rows,"
    " Tensor(f!) num_rows, Tensor(g!) num_refused, Tensor(h!) unique_rows, Tensor(i!) num_unique, Tensor num_slots,"
    " Tensor salt, Tensor step, Tensor id_P, Tensor cell_P, Tensor vocabularies, Tensor init_keys,"
    " Tensor init_params) -> (Tensor, Tensor)",
    definition=definition,
    cpu=_cpu,
    fake=_fake,
)
