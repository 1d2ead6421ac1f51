"""What a table holds. Every tensor is reserved at its largest size."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from recfx.describe import or_plain, table_text

__all__ = [
    "CANDIDATE_FIELDS",
    "COUNTERS",
    "ROW_FIELDS",
    "TableCandidates",
    "TableState",
    "copy_of",
    "is_full",
    "num_live",
    "num_rows_bytes",
]


class TableCandidates(NamedTuple):
    """Ids without a row and how often each has occurred; empty unless a `Life` admits by count."""

    slots: Tensor  # i64 [S], an index like the table's
    ids: Tensor  # i64 [K]
    vocabularies: Tensor  # i32 [K]
    counts: Tensor  # i32 [K]
    num: Tensor  # i64 []
    num_slots: Tensor  # i64 []


class TableState(NamedTuple):
    """A table. Tensors are reserved at their largest size; memory is used as rows come (on a CPU).

    So nothing moves and no shape changes while a table grows: `num_slots` says how much of the index is in use.
    `unique_rows`, `num_unique` and `grads` belong to the step in progress and are zero between steps.
    """

    slots: Tensor  # i64 [S], open addressing: tag:16 | vocabulary:16 | row:32, or -1
    ids: Tensor  # i64 [R], id of each row
    vocabularies: Tensor  # i32 [R], vocabulary of each row, -1 where it is freed
    seen: Tensor  # i64 [R], last step that touched the row << 32 | its unique number in that step, 2**32 - 1 without
    born: Tensor  # i32 [R], step that created the row
    counts: Tensor  # i32 [R], steps that touched the row; zero without a `Life`
    rows: Tensor  # f32 [R, 1 + optimiser slots, W + row slots], weights first
    num_rows: Tensor  # i64 [], rows in use or freed: the next row when none is free
    free_rows: Tensor  # i32 [R], freed rows, descending: the lowest is the last
    num_free: Tensor  # i64 [], how many
    num_slots: Tensor  # i64 [], a power of two
    num_crowded: Tensor  # i64 [], rows far from their place in the index
    num_refused: Tensor  # i64 [], ids that found no room, counted per occurrence
    tally: Tensor  # i64 [4], ids looked up by training, rows created, rows evicted, ids not admitted
    salt: Tensor  # i64 []
    step: Tensor  # i64 [], optimiser steps taken on this table
    unique_rows: Tensor  # i32 [U], rows touched by the step in progress, in first-occurrence order
    num_unique: Tensor  # i64 []
    grads: Tensor  # f32 [U, W], their gradients
    candidates: TableCandidates

    def __repr__(self) -> str:
        return or_plain(table_text)(self)


# What a checkpoint holds of a table, per row and of the table as a whole, beside the numbers of its rows and of those
# that are free. What is not named here can be made anew, or belongs to the step in progress.
ROW_FIELDS = ("ids", "vocabularies", "seen", "born", "counts", "rows")
CANDIDATE_FIELDS = ("ids", "vocabularies", "counts")
COUNTERS = ("num_refused", "tally", "step")


def num_live(state: TableState) -> int:
    """Rows in use: `num_rows` without the freed ones."""
    return int(state.num_rows) - int(state.num_free)


def is_full(state: TableState) -> bool:
    """Whether every row that may be is in use."""
    return num_live(state) == state.ids.numel()


def copy_of(state: TableState) -> TableState:
    """A deep copy, reserved sizes included: for tests and small tables."""
    return tree_map(Tensor.clone, state)


def num_rows_bytes(state: TableState) -> int:
    """Bytes that the rows in use take, index and bookkeeping included."""
    kept = state.ids, state.vocabularies, state.seen, state.born, state.rows
    counted = int(state.num_rows) * sum(t.stride(0) * t.element_size() for t in kept)
    return counted + int(state.num_slots) * state.slots.element_size() + int(state.num_free) * 4
