"""find: rows of known ids. Read-only."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.counters import NUM_SLOTS, SALT
from recfx.kernels.index import hashing
from recfx.kernels.op import UNKNOWN, define_op

__all__ = ["find"]


def definition(
    slots: Tensor,
    ids: Tensor,
    counters: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
) -> Tensor:
    """Row of each id, UNKNOWN for absent ids and padding.

    Shapes:   slots i64 [S], ids i64 [R], counters as in `TableState`; id_P i64 [P] and cell_P i32 [P] as `order_ids`
              returns them, except that padding (cell -1) may be anywhere; vocabularies i32 [L], of each lookup
              -> i32 [P].
    """
    valid = cell_P >= 0
    row_P = torch.full_like(cell_P, UNKNOWN)
    vocabulary = vocabularies[cell_P[valid] % len(vocabularies)]
    row_P[valid] = hashing.probe(slots, ids, counters[NUM_SLOTS], counters[SALT], vocabulary, id_P[valid]).int()
    return row_P


find = define_op(
    "find",
    definition=definition,
    cuda="index.gpu.find",
    fake=lambda slots, ids, counters, id_P, cell_P, vocabularies: torch.empty_like(cell_P),
)
