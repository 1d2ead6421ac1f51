"""The index between steps: its growth, and rebuilding it from the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recfx.kernels.counters import (
    NUM_CANDIDATE_SLOTS,
    NUM_CANDIDATES,
    NUM_CROWDED,
    NUM_FREE,
    NUM_ROWS,
    NUM_SLOTS,
)
from recfx.kernels.index import hashing, rehash
from recfx.table.state import CANDIDATE_FIELDS, TableCandidates, TableState, num_live

__all__ = ["grow_", "rebuild_", "restore_", "slots_for"]


def grow_(state: TableState, num_ids: int) -> TableState:
    """Doubles the index until `num_ids` more rows fit at load 0.75. One rehash; no row moves, no shape changes.

    Where far more rows are crowded than chance explains, ids are chosen to collide: the index is then rebuilt with
    another salt, the next of a fixed sequence. Only the places in the index depend on it.
    """
    counters = state.counters.tolist()  # read once: this runs before every step
    num_live = counters[NUM_ROWS] - counters[NUM_FREE]
    candidates, num_candidates = state.candidates, counters[NUM_CANDIDATES]
    if candidates.ids.numel() and _size(candidates, num_candidates, num_ids) > counters[NUM_CANDIDATE_SLOTS]:
        _rebuild_candidates_(state, num_ids)
    num_slots, num_crowded = _size(state, num_live, num_ids), counters[NUM_CROWDED]
    if num_slots > counters[NUM_SLOTS]:
        state.num_slots.fill_(num_slots)
        rebuild_(state)
        num_crowded = int(state.num_crowded)
    if num_crowded > MOST_CROWDED + num_live // MOST_CROWDED:
        state.salt.copy_(hashing.mix(state.salt + hashing.GOLDEN))
        rebuild_(state)
        state.num_crowded.zero_()  # what no salt can part does not call for the next one
    return state


# By chance one row in 3600 is crowded at load 3/4 and one in 150 at load 7/8 (measured).
MOST_CROWDED = 64


def rebuild_(state: TableState) -> TableState:
    """Rebuilds the index from the rows, over as many slots as they need."""
    num_slots = max(int(state.num_slots), _size(state, num_live(state), 0))
    rows = state.ids, state.vocabularies, int(state.num_rows)
    rehash.rehash_(state.slots, state.num_crowded, *rows, num_slots, int(state.salt))
    state.num_slots.fill_(num_slots)
    _rebuild_candidates_(state, 0)
    return state


def _rebuild_candidates_(state: TableState, num_ids: int) -> None:
    c, num, salt = state.candidates, int(state.num_candidates), int(state.salt)
    num_slots = max(int(state.num_candidate_slots), _size(c, num, num_ids))
    rehash.rehash_(c.slots, torch.zeros_like(state.salt), c.ids, c.vocabularies, num, num_slots, salt)
    state.num_candidate_slots.fill_(num_slots)


def _size(index: TableState | TableCandidates, num_keys: int, num_ids: int) -> int:
    """Slots for that many keys and `num_ids` more."""
    return min(slots_for(min(num_keys + num_ids, index.ids.numel()), 3 / 4), index.slots.numel())


def restore_(state: TableState, num_rows: int, free: Tensor, candidates: Sequence[Tensor] = ()) -> TableState:
    """Takes the first `num_rows` rows into use, all but `free` (rising) of them filled, and rebuilds the index.

    Args:     candidates: none, or their ids, vocabularies and counts; as many are taken as the state has room for.
    """
    state.num_rows.fill_(num_rows)
    state.num_free.fill_(len(free))
    state.free_rows[: len(free)] = free.flip(0)
    state.vocabularies[free.long()] = -1
    for name, saved in zip(CANDIDATE_FIELDS, candidates, strict=False):
        held = getattr(state.candidates, name)
        state.num_candidates.fill_(min(len(saved), len(held)))
        held[: len(saved)] = saved[: len(held)]
    return rebuild_(state)


def slots_for(num_rows: int, load: float) -> int:
    """Smallest power of two, at least 8, that holds `num_rows` at no more than `load`."""
    slots = 8
    while slots * load < num_rows:
        slots *= 2
    return slots
