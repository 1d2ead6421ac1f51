"""The index between steps: its growth, and making it anew from the rows."""

from __future__ import annotations

from torch import Tensor

from recfx.kernels import rehash
from recfx.table.state import TableState, num_live

__all__ = ["grow_", "rebuild_", "restore_", "slots_for"]


def grow_(state: TableState, num_ids: int) -> TableState:
    """Doubles the index until `num_ids` more rows fit at load 0.75. One rehash; no row moves, no shape changes."""
    needed = min(num_live(state) + num_ids, state.ids.numel())
    num_slots = min(slots_for(needed, 3 / 4), state.slots.numel())
    if num_slots > int(state.num_slots):
        state.num_slots.fill_(num_slots)
        rebuild_(state)
    return state


def rebuild_(state: TableState) -> TableState:
    """The index made anew from the rows, over as many slots as they need."""
    num_slots = max(int(state.num_slots), min(slots_for(num_live(state), 3 / 4), state.slots.numel()))
    rows = state.ids, state.vocabularies, int(state.num_rows)
    rehash.rehash_(state.slots, state.num_crowded, *rows, num_slots, int(state.salt))
    state.num_slots.fill_(num_slots)
    return state


def restore_(state: TableState, num_rows: int, free: Tensor) -> TableState:
    """Takes the first `num_rows` rows into use, all but `free` (rising) of them filled; the index is made anew."""
    state.num_rows.fill_(num_rows)
    state.num_free.fill_(len(free))
    state.free_rows[: len(free)] = free.flip(0)
    state.vocabularies[free.long()] = -1
    return rebuild_(state)


def slots_for(num_rows: int, load: float) -> int:
    """Smallest power of two, at least 8, that holds `num_rows` at no more than `load`."""
    slots = 8
    while slots * load < num_rows:
        slots *= 2
    return slots
