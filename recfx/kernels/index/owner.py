"""owner: which rank of several holds an id."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index.hashing import GOLDEN, hash_id, shift_right
from recfx.kernels.op import address, c_function, define_op

__all__ = ["owner"]


def definition(ids: Tensor, vocabularies: Tensor, world_size: int) -> Tensor:
    """i64 [N]: the rank that holds each (vocabulary, id). Independent of where in an index it stands.

    Shapes:   ids i64 [N], vocabularies i32 [N].
    """
    return shift_right(hash_id(ids, vocabularies, torch.tensor(GOLDEN, device=ids.device)), 33) % world_size


_owner = c_function("owner", "ppiip")


def _cpu(ids, vocabularies, world_size):  # type: ignore[no-untyped-def]
    assert (ids.dtype, vocabularies.dtype, ids.shape) == (torch.int64, torch.int32, vocabularies.shape)
    if world_size < 1:
        raise ValueError(f"world_size: got {world_size}, expected at least 1 rank.")
    ranks = torch.empty_like(ids)
    _owner(address(ids), address(vocabularies), len(ids), world_size, address(ranks))
    return ranks


owner = define_op(
    "owner(Tensor ids, Tensor vocabularies, int world_size) -> Tensor",
    definition=definition,
    cpu=_cpu,
    fake=lambda ids, vocabularies, world_size: torch.empty_like(ids),
)
