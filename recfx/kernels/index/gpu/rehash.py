"""rehash_ on a GPU: slots emptied, then every row places itself. Runs between steps, so its sizes are the host's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recfx.kernels import op
from recfx.kernels.gpu.launch import KEYS, NUM_WARPS
from recfx.kernels.index.gpu.hashing import EMPTY, hash_id, place, slot_of

__all__ = ["rehash_"]

FREED = tl.constexpr(op.FREED)


@triton.jit(do_not_specialize=["salt"])
def place_rows(slots, num_crowded, ids, row_vocabularies, num_rows, num_slots, salt, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # may pass 2**31 in the last block
    vocabulary = tl.load(row_vocabularies + row, mask=row < num_rows, other=FREED)
    live = vocabulary != FREED
    seed = tl.zeros([BLOCK], tl.int64) + salt
    hash = hash_id(tl.load(ids + row, mask=live, other=0), vocabulary, seed)
    mask = tl.zeros([BLOCK], tl.uint64) + (num_slots - 1)
    crowded = place(slots, mask, hash, slot_of(hash, vocabulary, row), live)
    tl.atomic_add(num_crowded, crowded, mask=crowded > 0, sem="relaxed")


def rehash_(
    slots: Tensor, num_crowded: Tensor, ids: Tensor, row_vocabularies: Tensor, num_rows: int, num_slots: int, salt: int
) -> None:
    """`recfx.kernels.index.rehash.definition`."""
    slots[:num_slots].fill_(EMPTY.value)
    num_crowded.zero_()
    if num_rows:
        place_rows[(triton.cdiv(num_rows, KEYS),)](
            slots, num_crowded, ids, row_vocabularies, num_rows, num_slots, salt, BLOCK=KEYS, num_warps=NUM_WARPS
        )
