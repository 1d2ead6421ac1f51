"""find: rows of known ids. Read-only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels import hashing
from recfx.kernels.op import UNKNOWN, address, c_function, define_op, int64s, lookup_positions

__all__ = ["find"]


def definition(
    slots: Tensor,
    ids: Tensor,
    num_slots: Tensor,
    salt: Tensor,
    values: Tensor,
    offsets: Tensor,
    starts: Sequence[int],
    vocabularies: Tensor,
) -> Tensor:
    """Row of each position's id, UNKNOWN for absent ids and padding.

    Shapes:   slots i64 [S], ids i64 [R], values i64 [P], offsets i32 [L, B + 1], vocabularies i32 [L] -> i32 [P].
              Lookup l reads values[starts[l]:starts[l] + offsets[l, B]] in vocabulary vocabularies[l].
    """
    position, _, lookup = lookup_positions(offsets, starts)
    row_P = torch.full_like(values, UNKNOWN, dtype=torch.int32)
    found = hashing.probe(slots, ids, num_slots, salt, vocabularies[lookup], values[position])
    row_P[position] = found.int()
    return row_P


_find = c_function("find", "pppp" + "pppp" + "iii" + "p")


def _cpu(slots, ids, num_slots, salt, values, offsets, starts, vocabularies):  # type: ignore[no-untyped-def]
    row_P = torch.empty_like(values, dtype=torch.int32)
    _find(
        *map(address, (slots, ids, num_slots, salt, values, offsets)),
        int64s(starts),
        address(vocabularies),
        len(starts),
        offsets.shape[1] - 1,
        values.numel(),
        address(row_P),
    )
    return row_P


find = define_op(
    "find(Tensor slots, Tensor ids, Tensor num_slots, Tensor salt, Tensor values, Tensor offsets, int[] starts,"
    " Tensor vocabularies) -> Tensor",
    definition=definition,
    cpu=_cpu,
    fake=lambda slots, ids, num_slots, salt, values, *_: torch.empty_like(values, dtype=torch.int32),
)
