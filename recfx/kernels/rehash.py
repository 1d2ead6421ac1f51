"""rehash_: the index rebuilt from the rows, over another number of slots or with another salt."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels import hashing
from recfx.kernels.op import address, c_function, define_op

__all__ = ["rehash_"]


def definition(slots: Tensor, ids: Tensor, row_vocabularies: Tensor, num_rows: int, num_slots: int, salt: int) -> None:
    """Empties slots[:num_slots] and places rows 0 .. num_rows - 1 in it. The old index is not read.

    Shapes:   slots i64 [S], ids i64 [R], row_vocabularies i32 [R].
    """
    slots[:num_slots] = hashing.EMPTY
    row = torch.arange(num_rows, device=ids.device)
    size, seed = torch.tensor(num_slots, device=ids.device), torch.tensor(salt, device=ids.device)
    hashing.place(slots, size, seed, row_vocabularies[:num_rows], ids[:num_rows], row)


_rehash = c_function("rehash", "pppiii")


def _cpu(slots, ids, row_vocabularies, num_rows, num_slots, salt):  # type: ignore[no-untyped-def]
    _rehash(address(slots), address(ids), address(row_vocabularies), num_rows, num_slots, salt)


rehash_ = define_op(
    "rehash_(Tensor(a!) slots, Tensor ids, Tensor row_vocabularies, int num_rows, int num_slots, int salt) -> ()",
    definition=definition,
    cpu=_cpu,
    fake=lambda *_: None,
)
