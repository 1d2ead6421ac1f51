"""The functions of a table: what a step does with it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recfx.checks import check_type
from recfx.embeddings import Lookup, TablePlan, column_key
from recfx.kernels.counters import NUM_UNIQUE, new_counters
from recfx.kernels.index import count_candidates, find, find_or_insert, keep_trained
from recfx.kernels.lists import order_ids, order_lists
from recfx.kernels.rows import add_row_grads, count_rows, pool
from recfx.table.index import grow_, slots_for
from recfx.table.memory import padded, reserve, reserve_rows
from recfx.table.policies import Life
from recfx.table.state import TableCandidates, TableState, copy_of
from recfx.table.sweep import checked
from recfx.types import NUM_SAMPLES, Ragged

__all__ = ["Columns", "Found", "Occurrences", "Table", "ids_of", "initializer_tensors", "table"]

FIRST_SLOTS = 2**16
BOOKKEEPING_BYTES = 32  # of a row: id 8, vocabulary 4, seen 8, born 4, count 4, its place in the free list 4
WHOLE = "1e3 is a float: write 1000."
CANDIDATE_BYTES = 16  # id 8, vocabulary 4, count 4


class Found(NamedTuple):
    """Where a batch's ids are. Lives inside one step."""

    id: Tensor  # i64 [P], in the order (sample, lookup, place in the list), padding anywhere between
    cell: Tensor  # i32 [P], sample * L + cell of the sample, -1 padding; a lookup is one cell, or n that are tiled
    weight: Tensor | None  # f32 [P]; None: all 1
    ragged: list[Ragged]  # the feature of each lookup
    row: Tensor  # i32 [P], -1 unknown or padding, -2 refused
    inverse: Tensor  # i32 [P], unique number in this step, -1 without
    vocabularies: Tensor  # i32 [L], of each cell
    read_only: Found | None = None  # where the ids of read-only lookups are, which come after the others
    ends: Tensor | None = None  # i32 [B * L], the position at which each cell's ids end, where `pool_lists` is used


class Cells(NamedTuple):
    """What fills the cells of a sample: some of the lookups."""

    lookups: Sequence[Lookup]
    vocabularies: Tensor  # i32 [L], of each cell
    padding: tuple[Tensor, Tensor] | None  # i64 [L], an id that is not counted, and bool [L], whether there is one


class Occurrences(NamedTuple):
    """The gradients of a batch's ids, and the unique rows they are of, as the kernels take them."""

    inverse: Tensor  # i32 [P]
    cell: Tensor  # i32 [P]
    firsts: Sequence[int]  # of each logical table in a row
    dims: Sequence[int]
    blocks: list[Tensor]  # f32 [B, L, dim], gradients of pooled rows by logical table
    weight: Tensor | None  # f32 [P]


class Columns(NamedTuple):
    """The logical tables side by side in a row, as an optimiser sees them. Without rates all are alike."""

    dims: tuple[int, ...]  # their widths, W in sum
    rates: Tensor | None  # f64 [V, 2, W]: factor of the learning rate, weight decay (NaN: the optimiser's)


class Table(NamedTuple):
    """The functions of one physical table; those ending in `_` write into the state they are given."""

    columns: Columns
    init: Callable[[], TableState]
    find: Callable[[TableState, dict], Found]
    insert: Callable[[TableState, dict], tuple[TableState, Found]]
    insert_: Callable[[TableState, dict], tuple[TableState, Found]]
    pool: Callable[[TableState, Found], list[Tensor]]
    occurrences: Callable[[Found, list[Tensor]], Occurrences]
    add_grads: Callable[[TableState, Found, list[Tensor]], TableState]
    add_grads_: Callable[[TableState, Found, list[Tensor]], TableState]
    count_steps: Callable[[TableState, Tensor], TableState]
    count_steps_: Callable[[TableState, Tensor], TableState]
    grow_: Callable[[TableState, int], TableState]


def table(
    plan: TablePlan,
    *,
    optimizer_slots: int,
    row_slots: int = 0,
    seed: int,
    max_rows: int = 2**26,
    max_bytes: int | None = None,
    max_unique: int | None = None,
    life: Life | None = None,
    sum_row_grads: Callable[..., None] = add_row_grads.add_row_grads_,
) -> Table:
    """An embedding table of one row shape for all vocabularies of `plan`.

    Args:     optimizer_slots: f32 values the optimiser keeps per weight.
              row_slots: f32 values it keeps per row of each logical table; they stand behind the weights.
              seed: of the initial weights.
              max_rows: hard cap; ids beyond it are unknown (`Embedding.unknown` is their value), are not trained, and
              are counted. On a CPU a reserved row costs address space only, on a GPU it costs its memory.
              max_bytes: the same in bytes of memory: index, bookkeeping, candidates, and the gradients of as many rows
              as one step may touch included. The lower cap counts.
              max_unique: most distinct ids one optimiser step may touch. Default max_rows.
              life: which ids get a row; with it, the steps that touch a row are counted.
              sum_row_grads: see `recfx.step.train_step`.
    Cost:     find and insert read 16 to 32 B per id; insert never syncs; at load 0.75 a row's index and bookkeeping
              take 35 B, 45 B right after a doubling, 8 B more where rows are counted and have been freed.
    Raises:   ValueError when max_rows is not in [1, 2**31), max_bytes holds no row, max_unique is below 1, or a `life`
              that evicts at the cap keeps as many rows; TypeError when its `admit` returns what it should not.
    """
    check_type("max_rows", max_rows, int, WHOLE)
    check_type("max_bytes", max_bytes, int | None, WHOLE)
    check_type("max_unique", max_unique, int | None, WHOLE)
    check_type("seed", seed, int)
    if not 1 <= max_rows < 2**31:
        raise ValueError(f"max_rows: got {max_rows}, expected 1 to 2**31 - 1. Row numbers are 32-bit.")
    if max_unique is not None and max_unique < 1:
        raise ValueError(f"max_unique: got {max_unique}, expected at least 1. A step could train nothing.")
    device, width, num_extra = _device(plan), plan.width, row_slots * len(plan.dims)
    admit = life.admit if life else None
    max_candidates = life.candidates if life and admit else 0
    if max_bytes is not None:
        floats = (width + num_extra) * (1 + optimizer_slots)
        max_rows = min(max_rows, _rows_in(max_bytes, floats, width, max_unique, max_candidates))
    if life and life.at_cap == "evict" and life.keep is not None and life.keep >= max_rows:
        raise ValueError(
            f"keep: got {life.keep}, expected less than the cap, {max_rows} rows. Nothing could be evicted."
        )
    num_unique = max_rows if max_unique is None else min(max_rows, max_unique)
    if admit is not None:  # asked here once, since an error within a capture is torch's
        id = torch.zeros(2, dtype=torch.int64, device=device)
        checked("admit", admit(id.int() + 1, id, id.int(), id[0] + 1), torch.bool, id)
    num_inserting = sum(not lookup.read_only for lookup in plan.lookups)
    parts = plan.lookups, plan.lookups[:num_inserting], plan.lookups[num_inserting:]
    all_cells, inserting, reading = (_cells(lookups, device) for lookups in parts)
    trains = [l.trainable for l in inserting.lookups for _ in range(l.num_cells)]
    trains_L = None if all(trains) else torch.tensor(trains, device=device)
    init_keys, init_params = (nn.functional.pad(t, (0, num_extra)) for t in initializer_tensors(plan, seed))
    unknown_params = _unknown_params(plan, init_params)

    def init() -> TableState:
        def index(max_keys: int) -> tuple[Tensor, int]:
            max_slots = slots_for(max_keys, 7 / 8)
            first_slots = min(FIRST_SLOTS, max_slots)
            slots = reserve((max_slots,), torch.int64, device)
            slots[:first_slots] = -1
            return slots, first_slots

        slots, num_slots = index(max_rows)
        candidate_slots, num_candidate_slots = index(max_candidates)
        return TableState(
            slots=slots,
            ids=reserve((max_rows,), torch.int64, device),
            vocabularies=reserve((max_rows,), torch.int32, device),
            seen=reserve((max_rows,), torch.int64, device),
            born=reserve((max_rows,), torch.int32, device),
            counts=reserve((max_rows,), torch.int32, device),
            rows=reserve_rows((max_rows, 1 + optimizer_slots, width + num_extra), device, most_padding=0.25),
            free_rows=reserve((max_rows,), torch.int32, device),
            unique_rows=reserve((num_unique,), torch.int32, device),
            grads=reserve_rows((num_unique, width), device, most_padding=1.0),
            candidates=TableCandidates(
                slots=candidate_slots,
                ids=reserve((max_candidates,), torch.int64, device),
                vocabularies=reserve((max_candidates,), torch.int32, device),
                counts=reserve((max_candidates,), torch.int32, device),
            ),
            counters=new_counters(device, num_slots=num_slots, num_candidate_slots=num_candidate_slots),
        )

    def ids_in(features: dict) -> list[Ragged]:
        ragged = [ids_of(features, lookup.feature) for lookup in plan.lookups]
        plan.check_batch(ragged[0].num_samples, sum(r.values.numel() for r in ragged))
        return ragged

    def find_(state: TableState, ragged: list[Ragged], cells: Cells) -> Found:
        id, cell, weight, ends = _ordered(ragged, cells)
        row = find.find(state.slots, state.ids, state.counters, id, cell, cells.vocabularies)
        return Found(id, cell, weight, ragged, row, torch.full_like(row, -1), cells.vocabularies, ends=ends)

    def find_all(state: TableState, features: dict) -> Found:
        return find_(state, ids_in(features), all_cells)

    def admitted(count_with: Callable, s: TableState, id: Tensor, cell: Tensor) -> Tensor | None:
        if admit is None:
            return None
        table, in_cell = (s.slots, s.ids, s.counters), inserting.vocabularies
        count = count_with(*s.candidates, *table, id, cell, in_cell) if max_candidates else torch.zeros_like(cell)
        admits = admit(count, id, in_cell[cell % len(in_cell)], s.step + 1)
        return checked("admit", admits, torch.bool, id).contiguous()

    def insert_with(
        op: Callable, count_with: Callable, keep: Callable
    ) -> Callable[[TableState, dict], tuple[TableState, Found]]:
        def insert_(s: TableState, features: dict) -> tuple[TableState, Found]:
            if num_inserting == 0:
                return s, find_all(s, features)
            ragged = ids_in(features)
            id, cell, weight, ends = _ordered(ragged[:num_inserting], inserting)
            admits = admitted(count_with, s, id, cell)
            # Of another type, since an operator must not be given a tensor and its clone.
            num_before = None if trains_L is None else s.counters[NUM_UNIQUE].int()
            row, inverse = op(
                s.slots, s.ids, s.vocabularies, s.seen, s.born, s.rows, s.free_rows, s.unique_rows, s.counters, id,
                cell, inserting.vocabularies, init_keys, init_params, admits,
            )  # fmt: skip
            if trains_L is not None:
                inverse = keep(s.seen, s.unique_rows, s.counters, num_before, inverse, cell, trains_L)
            read_only = find_(s, ragged[num_inserting:], reading) if reading.lookups else None
            return s, Found(id, cell, weight, ragged, row, inverse, inserting.vocabularies, read_only, ends)

        return insert_

    def pool_(state: TableState, found: Found) -> list[Tensor]:
        ids, num_samples = (state.rows, found.row, found.id, found.cell), found.ragged[0].num_samples
        rest = (found.vocabularies, num_samples, init_keys, unknown_params, plan.firsts, plan.dims)
        if found.ends is None:
            blocks = pool.pool(*ids, *rest, found.weight)
        else:
            blocks = pool.pool_lists(*ids, found.ends, *rest)
        if found.read_only is None:
            return blocks
        return [torch.cat(both, dim=1) for both in zip(blocks, pool_(state, found.read_only), strict=True)]

    def occurrences(found: Found, blocks: list[Tensor]) -> Occurrences:
        if found.read_only is not None:
            blocks = [block[:, : len(found.vocabularies)] for block in blocks]
        return Occurrences(found.inverse, found.cell, plan.firsts, plan.dims, blocks, found.weight)

    def add_with(op: Callable) -> Callable[[TableState, Found, list[Tensor]], TableState]:
        def add_grads_(state: TableState, found: Found, blocks: list[Tensor]) -> TableState:
            op(state.grads, *occurrences(found, blocks))
            return state

        return add_grads_

    def count_steps_with(op: Callable) -> Callable[[TableState, Tensor], TableState]:
        def count_steps_(s: TableState, due: Tensor) -> TableState:
            op(s.counts, s.counters, s.unique_rows, due)
            return s

        return count_steps_

    insert_pure = insert_with(find_or_insert.definition, count_candidates.definition, keep_trained.definition)
    in_place = find_or_insert.find_or_insert_, count_candidates.count_candidates_, keep_trained.keep_trained_
    add_pure, count_pure = add_with(add_row_grads.definition), count_steps_with(count_rows.definition)
    return Table(
        columns=Columns(plan.dims, _rate_tensor(plan)),
        init=init,
        find=find_all,
        insert=lambda state, features: insert_pure(copy_of(state), features),
        insert_=insert_with(*in_place),
        pool=pool_,
        occurrences=occurrences,
        add_grads=lambda state, found, blocks: add_pure(copy_of(state), found, blocks),
        add_grads_=add_with(sum_row_grads),
        count_steps=lambda state, due: count_pure(copy_of(state), due),
        count_steps_=count_steps_with(count_rows.count_rows_),
        grow_=grow_,
    )


def _device(plan: TablePlan) -> torch.device:
    try:
        return torch.device(plan.device)
    except (RuntimeError, TypeError) as error:
        feature = plan.lookups[0].feature
        raise ValueError(
            f"feature '{feature}': got device {plan.device!r}, expected one of torch's. Embeddings are kept there. Use "
            "'cpu' or 'cuda'."
        ) from error


def _rows_in(max_bytes: int, floats: int, width: int, max_unique: int | None, max_candidates: int) -> int:
    """Most rows of that many floats, `width` of them weights, with which all tensors of a table take `max_bytes`."""
    candidates = CANDIDATE_BYTES * max_candidates + 8 * slots_for(max_candidates, 7 / 8)

    def num_bytes(rows: int) -> int:
        beside = BOOKKEEPING_BYTES * rows + 8 * slots_for(rows, 7 / 8) + candidates
        of_a_step = min(rows, max_unique or rows) * 4 * (1 + padded(width, most_padding=1.0))
        return rows * 4 * padded(floats, most_padding=0.25) + beside + of_a_step

    rows = bisect.bisect_right(range(2**31), max_bytes, key=num_bytes) - 1
    if rows < 1:
        raise ValueError(
            f"max_bytes: got {max_bytes}, expected at least {num_bytes(1)}, the bytes of one row and {max_candidates} "
            "candidates."
        )
    return rows


def _cells(lookups: Sequence[Lookup], device: torch.device) -> Cells:
    of_cells = [lookup for lookup in lookups for _ in range(lookup.num_cells)]
    vocabularies = torch.tensor([l.vocabulary for l in of_cells], dtype=torch.int32, device=device)
    has_one = [l.padding_id is not None for l in of_cells]
    ids = torch.tensor([l.padding_id or 0 for l in of_cells], dtype=torch.int64, device=device)
    return Cells(lookups, vocabularies, (ids, torch.tensor(has_one, device=device)) if any(has_one) else None)


def _ordered(ragged: list[Ragged], cells: Cells) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Id, cell, weight and ends of all lists in the table's order. An id that is padding has cell -1."""
    values, offsets = [r.values.contiguous() for r in ragged], [r.offsets.contiguous() for r in ragged]
    lengths, weight, ends = [lookup.length for lookup in cells.lookups], None, None
    if not any(lengths) and all(r.weights is None for r in ragged):
        if order_ids.uses_ends(values[0].device):
            id, cell, ends = order_ids.order_ids_ends(values, offsets)
        else:
            id, cell = order_ids.order_ids(values, offsets)
    else:
        weights = [None if r.weights is None else r.weights.contiguous() for r in ragged]
        id, cell, weight = order_lists.order_lists(values, offsets, weights, lengths)
    if cells.padding is not None:
        padding_id, has_one = (t[cell % len(t)] for t in cells.padding)
        cell = torch.where(has_one & (id == padding_id), -1, cell)
    return id, cell, weight, ends


def ids_of(features: dict, name: str) -> Ragged:
    """The ids of a feature as lists: those of a dense [B, n] are lists of n, empty behind the last real sample.

    Raises:   ValueError when there is no such feature, TypeError when it holds no ids.
    """
    value = features.get(name)
    if value is None:
        raise ValueError(f"feature '{name}': missing, expected Ragged i64 ids. Known features: {sorted(features)}.")
    if isinstance(value, Tensor) and value.dim() == 2:
        num_samples, length = value.shape
        ends = torch.arange(num_samples + 1, dtype=torch.int32, device=value.device)
        if NUM_SAMPLES in features:
            ends = torch.minimum(ends, features[NUM_SAMPLES])
        value = Ragged(value.reshape(-1), ends * length)
    if not isinstance(value, Ragged):
        raise TypeError(f"feature '{name}': got {_said(value)}, expected Ragged i64 ids, or a dense [B, n] of them.")
    if value.values.dtype != torch.int64:
        raise TypeError(
            f"feature '{name}': got {value.values.dtype} ids, expected torch.int64. float32 merges ids above 2**24. "
            "Cast when loading, not in the step."
        )
    if value.offsets.dtype != torch.int32:
        raise TypeError(f"feature '{name}': got {value.offsets.dtype} offsets, expected torch.int32.")
    if value.weights is not None and value.weights.dtype != torch.float32:
        raise TypeError(f"feature '{name}': got {value.weights.dtype} weights, expected torch.float32.")
    return value


def _said(value: object) -> str:
    return f"Tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def initializer_tensors(plan: TablePlan, seed: int) -> tuple[Tensor, Tensor]:
    """keys i64 [V, W], params f32 [V, 3, W]."""
    keys = [[column_key(seed, c.name, d) for c in columns for d in range(c.dim)] for columns in plan.vocabularies]
    params = [
        [[part for c in columns for part in [c.init[i]] * c.dim] for i in range(3)] for columns in plan.vocabularies
    ]
    return torch.tensor(keys, device=plan.device), torch.tensor(params, dtype=torch.float32, device=plan.device)


def _unknown_params(plan: TablePlan, init_params: Tensor) -> Tensor | None:
    """f32 [V, 3, W], `init_params` where an id without a row has its initial value, 0 elsewhere. None: all are 0."""
    kept = [[c.unknown == "initial" for c in columns for _ in range(c.dim)] for columns in plan.vocabularies]
    if not any(map(any, kept)):
        return None
    mask = nn.functional.pad(torch.tensor(kept), (0, init_params.shape[2] - plan.width)).to(plan.device)
    return torch.where(mask[:, None], init_params, 0.0)


def _rate_tensor(plan: TablePlan) -> Tensor | None:
    """f64 [V, 2, W], see `Columns`."""
    if all(c.lr_scale == 1 and c.weight_decay is None for columns in plan.vocabularies for c in columns):
        return None
    rates = [
        [
            [c.lr_scale for c in columns for _ in range(c.dim)],
            [math.nan if c.weight_decay is None else c.weight_decay for c in columns for _ in range(c.dim)],
        ]
        for columns in plan.vocabularies
    ]
    return torch.tensor(rates, dtype=torch.float64, device=plan.device)
