"""find on a GPU: one launch, a probe per id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels.gpu.counters import NUM_SLOTS, SALT
from recfx.kernels.gpu.launch import KEYS, NUM_WARPS
from recfx.kernels.index.gpu.hashing import hash_id, key_at, probe

__all__ = ["find"]


@triton.jit
def find_rows(slots, ids, counters, id_P, cell_P, vocabularies, row_P, num_positions, num_lookups, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(cell_P + k, mask=k < num_positions, other=-1) >= 0
    id, vocabulary = key_at(id_P, cell_P, vocabularies, num_lookups, k, active)
    mask = (tl.load(counters + NUM_SLOTS) - 1).to(tl.uint64)
    hash = hash_id(id, vocabulary, tl.load(counters + SALT))
    tl.store(row_P + k, probe(slots, ids, mask, hash, vocabulary, id, active), mask=k < num_positions)


def find(slots: Tensor, ids: Tensor, counters: Tensor, id_P: Tensor, cell_P: Tensor, vocabularies: Tensor) -> Tensor:
    """`recfx.kernels.index.find.definition`."""
    row_P, num = torch.empty_like(cell_P), cell_P.numel()
    if num:
        find_rows[(triton.cdiv(num, KEYS),)](
            slots, ids, counters, id_P, cell_P, vocabularies, row_P, num, len(vocabularies),
            BLOCK=KEYS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return row_P
