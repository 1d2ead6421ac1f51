"""owner: which rank of several holds an id."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index.hashing import GOLDEN, hash_id, shift_right
from recfx.kernels.op import define_op

__all__ = ["owner"]


def definition(ids: Tensor, vocabularies: Tensor, world_size: int) -> Tensor:
    """i64 [N]: the rank that holds each (vocabulary, id). Independent of where in an index it stands.

    Shapes:   ids i64 [N], vocabularies i32 [N].
    """
    return shift_right(hash_id(ids, vocabularies, torch.tensor(GOLDEN, device=ids.device)), 33) % world_size


owner = define_op(
    "owner",
    definition=definition,
    fake=lambda ids, vocabularies, world_size: torch.empty_like(ids),
)
