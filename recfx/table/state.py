"""What a table holds. Every tensor is reserved at its largest size."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from recfx.describe import or_plain, table_text
from recfx.kernels.counters import (
    LOOKED_UP,
    NUM_CANDIDATE_SLOTS,
    NUM_CANDIDATES,
    NUM_CROWDED,
    NUM_FREE,
    NUM_REFUSED,
    NUM_ROWS,
    NUM_SLOTS,
    NUM_UNIQUE,
    SALT,
    STEP,
    UNADMITTED,
)

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


class TableState(NamedTuple):
    """A table. Tensors are reserved at their largest size; memory is used as rows come (on a CPU).

    So nothing moves and no shape changes while a table grows: `num_slots` is the size of the index in use.
    `unique_rows`, `num_unique` and `grads` belong to the step in progress and are zero between steps.

    The counters are in one tensor, at the places of `recfx.kernels.counters`. `num_rows` and the other properties are
    views of its items, i64 [], to read and write between steps.
    """

    slots: Tensor  # i64 [S], open addressing: tag:16 | vocabulary:16 | row:32, or -1
    ids: Tensor  # i64 [R], id of each row
    vocabularies: Tensor  # i32 [R], vocabulary of each row, -1 where it is freed
    seen: Tensor  # i64 [R], last step that touched the row << 32 | its unique number in that step, 2**32 - 1 without
    born: Tensor  # i32 [R], step that created the row
    counts: Tensor  # i32 [R], steps that touched the row; zero without a `Life`
    rows: Tensor  # f32 [R, 1 + optimiser slots, W + row slots], weights first
    free_rows: Tensor  # i32 [R], freed rows, descending: the lowest is the last
    unique_rows: Tensor  # i32 [U], rows touched by the step in progress, in first-occurrence order
    grads: Tensor  # f32 [U, W], their gradients
    candidates: TableCandidates
    counters: Tensor  # i64 [NUM_COUNTERS]

    @property
    def num_rows(self) -> Tensor:
        """Rows in use or freed: the next row when none is free."""
        return self.counters[NUM_ROWS]

    @property
    def num_free(self) -> Tensor:
        """How many of `free_rows` are in use."""
        return self.counters[NUM_FREE]

    @property
    def num_slots(self) -> Tensor:
        """Slots of the index in use, a power of two."""
        return self.counters[NUM_SLOTS]

    @property
    def num_crowded(self) -> Tensor:
        """Rows far from their place in the index."""
        return self.counters[NUM_CROWDED]

    @property
    def num_refused(self) -> Tensor:
        """Ids that found no room, counted per occurrence."""
        return self.counters[NUM_REFUSED]

    @property
    def salt(self) -> Tensor:
        """Of the hash."""
        return self.counters[SALT]

    @property
    def step(self) -> Tensor:
        """Optimiser steps taken on this table."""
        return self.counters[STEP]

    @property
    def num_unique(self) -> Tensor:
        """How many of `unique_rows` are in use."""
        return self.counters[NUM_UNIQUE]

    @property
    def num_candidates(self) -> Tensor:
        """How many of the candidates' `ids` are in use."""
        return self.counters[NUM_CANDIDATES]

    @property
    def num_candidate_slots(self) -> Tensor:
        """Slots of the candidates' index in use, a power of two."""
        return self.counters[NUM_CANDIDATE_SLOTS]

    @property
    def tally(self) -> Tensor:
        """i64 [4]: ids looked up by training, rows created, rows evicted, ids not admitted."""
        return self.counters[LOOKED_UP : UNADMITTED + 1]

    def __repr__(self) -> str:
        return or_plain(table_text)(self)


# What a checkpoint holds of a table, per row and of the table as a whole, besides the number of its rows and the free
# ones. What is not named here can be rebuilt, or belongs to the step in progress.
ROW_FIELDS = ("ids", "vocabularies", "seen", "born", "counts", "rows")
CANDIDATE_FIELDS = ("ids", "vocabularies", "counts")
COUNTERS = ("num_refused", "tally", "step")


def num_live(state: TableState) -> int:
    """Rows in use: `num_rows` without the freed ones."""
    counters = state.counters.tolist()
    return counters[NUM_ROWS] - counters[NUM_FREE]


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
