"""The embedding hash table as an explicit state: an index from ids to rows, and the rows.

The specification is a Python dict: `row = d.setdefault((vocabulary, id), len(d))`, ids taken in the order (sample,
lookup, place in the list). New ids take freed rows first, the lowest number before the others.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.embeddings import TablePlan, column_key
from recfx.kernels import add_row_grads, find, find_or_insert, order_ids, pool, rehash
from recfx.types import Ragged

__all__ = [
    "Found",
    "Table",
    "TableState",
    "copy_of",
    "grow_",
    "initializer_tensors",
    "num_live",
    "num_rows_bytes",
    "rebuild_",
    "reserve",
    "restore_",
    "table",
]

FIRST_SLOTS = 2**16


class TableState(NamedTuple):
    """A table. Tensors are reserved at their largest size; memory is used as rows come (on a CPU).

    So nothing moves and no shape changes while a table grows: `num_slots` says how much of the index is in use.
    The last three fields belong to the step in progress and are zero between steps.
    """

    slots: Tensor  # i64 [S], open addressing: tag:16 | vocabulary:16 | row:32, or -1
    ids: Tensor  # i64 [R], id of each row
    vocabularies: Tensor  # i32 [R], vocabulary of each row, -1 where it is freed
    seen: Tensor  # i64 [R], last step that touched the row << 32 | its unique number in that step
    born: Tensor  # i32 [R], step that created the row
    counts: Tensor  # i32 [R], steps that touched the row; zero without a `Life`
    rows: Tensor  # f32 [R, 1 + optimiser slots, W], weights first
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


# What a checkpoint holds of a table, per row and of the table as a whole, beside the numbers of its rows and of those
# that are free. What is not named here can be made anew, or belongs to the step in progress.
ROW_FIELDS = ("ids", "vocabularies", "seen", "born", "counts", "rows")
COUNTERS = ("num_refused", "tally", "step")


class Found(NamedTuple):
    """Where a batch's ids are. Lives inside one step."""

    id: Tensor  # i64 [P], in the order (sample, lookup, place in the list), padding at the end
    cell: Tensor  # i32 [P], sample * L + lookup, -1 padding
    ragged: list[Ragged]  # the feature of each lookup
    row: Tensor  # i32 [P], -1 unknown or padding, -2 refused
    inverse: Tensor  # i32 [P], unique number in this step, -1 without


class Table(NamedTuple):
    """The functions of one physical table; those ending in `_` write into the state they are given."""

    init: Callable[[], TableState]
    find: Callable[[TableState, dict], Found]
    insert: Callable[[TableState, dict], tuple[TableState, Found]]
    insert_: Callable[[TableState, dict], tuple[TableState, Found]]
    pool: Callable[[TableState, Found], list[Tensor]]
    add_grads: Callable[[TableState, Found, list[Tensor]], TableState]
    add_grads_: Callable[[TableState, Found, list[Tensor]], TableState]
    grow_: Callable[[TableState, int], TableState]


def table(
    plan: TablePlan, *, optimizer_slots: int, seed: int, max_rows: int = 2**26, max_unique: int | None = None
) -> Table:
    """An embedding table of one row shape for all vocabularies of `plan`.

    Args:     optimizer_slots: f32 values the optimiser keeps per weight.
              seed: of the initial weights.
              max_rows: hard cap; ids beyond it use their initial value, are not trained, and are counted. On a CPU a
              reserved row costs address space only, on a GPU it costs its memory.
              max_unique: most distinct ids one optimiser step may touch. Default max_rows.
    Cost:     find and insert read 16 to 32 B per id; insert never syncs; at load 0.75 a row's index and bookkeeping
              take 35 B, 45 B right after a doubling, 8 B more where rows are counted and have been freed.
    Raises:   ValueError when max_rows is not in [1, 2**31) or max_unique is below 1.
    """
    if not 1 <= max_rows < 2**31:
        raise ValueError(f"max_rows: got {max_rows}, expected 1 to 2**31 - 1. Row numbers are 32-bit.")
    if max_unique is not None and max_unique < 1:
        raise ValueError(f"max_unique: got {max_unique}, expected at least 1. A step could train nothing.")
    device, width = torch.device(plan.device), plan.width
    num_unique = max_rows if max_unique is None else min(max_rows, max_unique)
    max_slots = _slots_for(max_rows, 7 / 8)
    vocabularies = torch.tensor([lookup.vocabulary for lookup in plan.lookups], dtype=torch.int32, device=device)
    init_keys, init_params = initializer_tensors(plan, seed)

    def init() -> TableState:
        def counter(value: int = 0) -> Tensor:
            return torch.tensor(value, dtype=torch.int64, device=device)

        first_slots = min(FIRST_SLOTS, max_slots)
        slots = reserve((max_slots,), torch.int64, device)
        slots[:first_slots] = -1
        return TableState(
            slots=slots,
            ids=reserve((max_rows,), torch.int64, device),
            vocabularies=reserve((max_rows,), torch.int32, device),
            seen=reserve((max_rows,), torch.int64, device),
            born=reserve((max_rows,), torch.int32, device),
            counts=reserve((max_rows,), torch.int32, device),
            rows=reserve_rows((max_rows, 1 + optimizer_slots, width), device, most_padding=0.25),
            num_rows=counter(),
            free_rows=reserve((max_rows,), torch.int32, device),
            num_free=counter(),
            num_slots=counter(first_slots),
            num_crowded=counter(),
            num_refused=counter(),
            tally=torch.zeros(find_or_insert.TALLIES, dtype=torch.int64, device=device),
            salt=counter(),
            step=counter(),
            unique_rows=reserve((num_unique,), torch.int32, device),
            num_unique=counter(),
            grads=reserve_rows((num_unique, width), device, most_padding=1.0),
        )

    def read(features: dict) -> tuple[Tensor, Tensor, list[Ragged]]:
        ragged = [_ids(features, lookup.feature) for lookup in plan.lookups]
        return *order_ids.order_ids(
            [r.values.contiguous() for r in ragged], [r.offsets.contiguous() for r in ragged]
        ), ragged

    def find_(state: TableState, features: dict) -> Found:
        id, cell, ragged = read(features)
        row = find.find(state.slots, state.ids, state.num_slots, state.salt, id, cell, vocabularies)
        return Found(id, cell, ragged, row, torch.full_like(row, -1))

    def insert_with(op: Callable) -> Callable[[TableState, dict], tuple[TableState, Found]]:
        def insert_(s: TableState, features: dict) -> tuple[TableState, Found]:
            id, cell, ragged = read(features)
            row, inverse = op(
                s.slots, s.ids, s.vocabularies, s.seen, s.born, s.rows, s.num_rows, s.free_rows, s.num_free,
                s.num_refused, s.tally, s.num_crowded, s.unique_rows, s.num_unique, s.num_slots, s.salt, s.step + 1,
                id, cell, vocabularies, init_keys, init_params, None,
            )  # fmt: skip
            return s, Found(id, cell, ragged, row, inverse)

        return insert_

    def pool_(state: TableState, found: Found) -> list[Tensor]:
        ids = (found.row, found.id, found.cell, vocabularies, found.ragged[0].num_samples)
        return pool.pool(state.rows, *ids, init_keys, init_params, plan.firsts, plan.dims)

    def add_with(op: Callable) -> Callable[[TableState, Found, list[Tensor]], TableState]:
        def add_grads_(state: TableState, found: Found, blocks: list[Tensor]) -> TableState:
            op(state.grads, found.inverse, found.cell, vocabularies, plan.firsts, plan.dims, blocks)
            return state

        return add_grads_

    insert_pure, add_pure = insert_with(find_or_insert.definition), add_with(add_row_grads.definition)
    return Table(
        init=init,
        find=find_,
        insert=lambda state, features: insert_pure(copy_of(state), features),
        insert_=insert_with(find_or_insert.find_or_insert_),
        pool=pool_,
        add_grads=lambda state, found, blocks: add_pure(copy_of(state), found, blocks),
        add_grads_=add_with(add_row_grads.add_row_grads_),
        grow_=grow_,
    )


def grow_(state: TableState, num_ids: int) -> TableState:
    """Doubles the index until `num_ids` more rows fit at load 0.75. One rehash; no row moves, no shape changes."""
    needed = min(num_live(state) + num_ids, state.ids.numel())
    num_slots = min(_slots_for(needed, 3 / 4), state.slots.numel())
    if num_slots > int(state.num_slots):
        state.num_slots.fill_(num_slots)
        rebuild_(state)
    return state


def rebuild_(state: TableState) -> TableState:
    """The index made anew from the rows, over as many slots as they need."""
    num_slots = max(int(state.num_slots), min(_slots_for(num_live(state), 3 / 4), state.slots.numel()))
    rows = state.ids, state.vocabularies, int(state.num_rows)
    rehash.rehash_(state.slots, state.num_crowded, *rows, num_slots, int(state.salt))
    state.num_slots.fill_(num_slots)
    return state


def num_live(state: TableState) -> int:
    """Rows in use: `num_rows` without the freed ones."""
    return int(state.num_rows) - int(state.num_free)


def restore_(state: TableState, num_rows: int, free: Tensor) -> TableState:
    """Takes the first `num_rows` rows into use, all but `free` (rising) of them filled; the index is made anew."""
    state.num_rows.fill_(num_rows)
    state.num_free.fill_(len(free))
    state.free_rows[: len(free)] = free.flip(0)
    state.vocabularies[free.long()] = -1
    return rebuild_(state)


def copy_of(state: TableState) -> TableState:
    """A deep copy, reserved sizes included: for tests and small tables."""
    return TableState(*(t.clone() for t in state))


def num_rows_bytes(state: TableState) -> int:
    """Bytes that the rows in use take, index and bookkeeping included."""
    kept = state.ids, state.vocabularies, state.seen, state.born, state.rows
    counted = int(state.num_rows) * sum(t.stride(0) * t.element_size() for t in kept)
    return counted + int(state.num_slots) * state.slots.element_size() + int(state.num_free) * 4


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on a CPU, is taken page by page when first written.

    Raises:   MemoryError naming the size when the system will not reserve that much.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes == 0 or device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(
            f"max_rows: could not reserve {num_bytes} bytes for a table tensor {list(shape)}. Lower max_rows."
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= HUGE_PAGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def reserve_rows(shape: tuple[int, ...], device: torch.device, *, most_padding: float) -> Tensor:
    """`reserve` of f32 rows that each begin on a cache line, unless that takes more than `most_padding` extra memory.

    The result is a view [rows, ...] with the padding left out; a row then touches the fewest lines it can.
    """
    width = torch.Size(shape[1:]).numel()
    padded = -(-width // FLOATS_PER_LINE) * FLOATS_PER_LINE
    padded = padded if padded <= (1 + most_padding) * width else width
    return reserve((shape[0], padded), torch.float32, device)[:, :width].unflatten(1, shape[1:])


FLOATS_PER_LINE = 16
HUGE_PAGE_BYTES = 2**21
# Python names this flag from 3.13 on; elsewhere than on Linux the system overcommits without being asked.
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def _slots_for(num_rows: int, load: float) -> int:
    """Smallest power of two, at least 8, that holds `num_rows` at no more than `load`."""
    slots = 8
    while slots * load < num_rows:
        slots *= 2
    return slots


def _ids(features: dict, name: str) -> Ragged:
    value = features.get(name)
    if value is None:
        raise ValueError(f"feature '{name}': missing, expected Ragged i64 ids. Known features: {sorted(features)}.")
    if not isinstance(value, Ragged):
        raise TypeError(f"feature '{name}': got {type(value).__name__}, expected Ragged i64 ids.")
    if value.values.dtype != torch.int64:
        raise TypeError(
            f"feature '{name}': got {value.values.dtype} ids, expected torch.int64. float32 merges ids above 2**24. "
            "Cast when loading, not in the step."
        )
    if value.offsets.dtype != torch.int32:
        raise TypeError(f"feature '{name}': got {value.offsets.dtype} offsets, expected torch.int32.")
    return value


def initializer_tensors(plan: TablePlan, seed: int) -> tuple[Tensor, Tensor]:
    """keys i64 [V, W], params f32 [V, 3, W]."""
    keys = [[column_key(seed, c.name, d) for c in columns for d in range(c.dim)] for columns in plan.vocabularies]
    params = [
        [[part for c in columns for part in [c.init[i]] * c.dim] for i in range(3)] for columns in plan.vocabularies
    ]
    return torch.tensor(keys, device=plan.device), torch.tensor(params, dtype=torch.float32, device=plan.device)
