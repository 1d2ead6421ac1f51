"""rehash_: the index rebuilt from the rows, over another number of slots or with another salt."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index import hashing
from recfx.kernels.op import FREED, define_op

__all__ = ["rehash_"]


def definition(
    slots: Tensor, num_crowded: Tensor, ids: Tensor, row_vocabularies: Tensor, num_rows: int, num_slots: int, salt: int
) -> None:
    """Empties slots[:num_slots] and places those of the rows 0 .. num_rows - 1 that are not freed. The old index is not
    read. num_crowded becomes the number of rows outside their first run.

    Shapes:   slots i64 [S], num_crowded i64 [], ids i64 [R], row_vocabularies i32 [R], FREED where a row is.
    """
    slots[:num_slots] = hashing.EMPTY
    row = torch.nonzero(row_vocabularies[:num_rows] != FREED)[:, 0]
    size, seed = torch.tensor(num_slots, device=ids.device), torch.tensor(salt, device=ids.device)
    num_crowded.fill_(hashing.place(slots, size, seed, row_vocabularies[row], ids[row], row))


rehash_ = define_op(
    "rehash_",
    definition=definition,
    cuda="index.gpu.rehash",
    fake=lambda *_: None,
)
