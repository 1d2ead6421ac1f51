"""owner: the rank that holds each (vocabulary, id)."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.hashing import GOLDEN, hash_id, shift_right
from recfx.kernels.op import address, c_function, define_op

__all__ = ["owner"]


def definition(id: Tensor, vocabulary: Tensor, world_size: int) -> Tensor:
    """Independent of where in an index a key stands, and of the index's salt.

    Shapes:   id i64 [n], vocabulary i32 [n] -> i32 [n], 0 to world_size - 1.
    """
    hash = hash_id(id, vocabulary, torch.tensor(GOLDEN, device=id.device))
    return (shift_right(hash, 33) % world_size).int()


_owner = c_function("owner", "ppiip")


def _fake(id: Tensor, vocabulary: Tensor, world_size: int) -> Tensor:
    return torch.empty_like(vocabulary)


def _cpu(id: Tensor, vocabulary: Tensor, world_size: int) -> Tensor:
    assert (id.dtype, vocabulary.dtype) == (torch.int64, torch.int32)
    out = _fake(id, vocabulary, world_size)
    _owner(address(id), address(vocabulary), id.numel(), world_size, address(out))
    return out


owner = define_op(
    "owner(Tensor id, Tensor vocabulary, int world_size) -> Tensor", definition=definition, cpu=_cpu, fake=_fake
)
