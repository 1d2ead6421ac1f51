"""find: rows of known ids. Read-only."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index import hashing
from recfx.kernels.op import UNKNOWN, define_op

__all__ = ["find"]


def definition(
    slots: Tensor,
    ids: Tensor,
    num_slots: Tensor,
    salt: Tensor,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
) -> Tensor:
    """Row of each id, UNKNOWN for absent ids and padding.

    Shapes:   slots i64 [S], ids i64 [R], id_P i64 [P] and cell_P i32 [P] as `order_ids` gives them, but for padding
              (cell -1), which may stand anywhere; vocabularies i32 [L], of each lookup -> i32 [P].
    """
    valid = cell_P >= 0
    row_P = torch.full_like(cell_P, UNKNOWN)
    vocabulary = vocabularies[cell_P[valid] % len(vocabularies)]
    row_P[valid] = hashing.probe(slots, ids, num_slots, salt, vocabulary, id_P[valid]).int()
    return row_P


find = define_op(
    "find(Tensor slots, Tensor ids, Tensor num_slots, Tensor salt, Tensor id_P, Tensor cell_P, Tensor vocabularies)"
    " -> Tensor",
    definition=definition,
    cuda="index.gpu.find",
    fake=lambda slots, ids, num_slots, salt, id_P, cell_P, *_: torch.empty_like(cell_P),
)
