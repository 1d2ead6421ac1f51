"""The functions of a table: what a step does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recfx.checks import check_type
from recfx.embeddings import TablePlan
from recfx.kernels.counters import NUM_UNIQUE, new_counters
from recfx.kernels.index import count_candidates, find, find_or_insert, keep_trained
from recfx.kernels.rows import add_row_grads, count_rows
from recfx.table import pooling
from recfx.table.columns import RowLayout, columns_for, initializer_tensors, unknown_params
from recfx.table.index import grow_, slots_for
from recfx.table.limits import Limits
from recfx.table.memory import reserve, reserve_rows
from recfx.table.policies import Admit, Life
from recfx.table.pooling import Occurrences
from recfx.table.reading import Cells, Found, Reading, cells_of, ids_of, in_order
from recfx.table.state import TableCandidates, TableState
from recfx.table.sweep import checked

__all__ = ["Table", "table"]

FIRST_SLOTS = 2**16

Pooled = Sequence[Tensor]


class Table(NamedTuple):
    """The functions of one physical table; those ending in `_` write into the state they are given.

    A step calls them in this order; what comes between two of them can be put there from outside.

    columns:     its logical tables, as an optimiser sees them.
    init:        () -> an empty table.
    read:        (features by name) -> the ids of its lookups.
    find:        (state, reading) -> where they are. An id without a row stays without.
    insert_:     (state, reading) -> where they are. New ids get a row and all join the step, but for read-only lookups.
    pool:        (state, found) -> pooled rows, f32 [B, L, dim] per logical table; then, for each lookup that keeps its
                 rows, f32 [P, 1, dim] per logical table.
    occurrences: (found, gradients of the pooled rows) -> these as the kernels take them: of pooled lists, then of each
                 lookup that keeps its rows.
    add_grads_:  (state, found, gradients of the pooled rows) -> state; sums them by row.
    count_steps_: (state, due bool []) -> state; for a `Life`: one more step for each row that the step touched.
    grow_:       (state, number of ids) -> state; room for that many new ids. Between steps, on the host.
    """

    columns: RowLayout
    init: Callable[[], TableState]
    read: Callable[[Mapping[str, Any]], Reading]
    find: Callable[[TableState, Reading], Found]
    insert_: Callable[[TableState, Reading], Found]
    pool: Callable[[TableState, Found], list[Tensor]]
    occurrences: Callable[[Found, Pooled], list[Occurrences]]
    add_grads_: Callable[[TableState, Found, Pooled], TableState]
    count_steps_: Callable[[TableState, Tensor], TableState]
    grow_: Callable[[TableState, int], TableState]


@dataclass(frozen=True, kw_only=True, eq=False)
class TableParts:
    """What is fixed about a table. Tensors are on its device."""

    plan: TablePlan
    admit: Admit | None
    candidates: int  # most ids without a row that are counted
    max_rows: int
    max_unique: int  # rows that one step may touch
    row_shape: tuple[int, int]  # weight and optimiser slots, width with what is kept per row
    main: Cells  # of the lookups that insert; of all where none does
    read_only: Cells
    inserts: bool  # whether any lookup does
    init_keys: Tensor  # i64 [V, W]
    init_params: Tensor  # f32 [V, 3, W]
    unknown_params: Tensor | None  # f32 [V, 3, W], of ids without a row
    sum_row_grads: Callable[..., None]

    @property
    def device(self) -> torch.device:
        return self.init_keys.device


def table(
    plan: TablePlan,
    *,
    optimizer_slots: int,
    row_slots: int = 0,
    seed: int,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    life: Life | None = None,
    sum_row_grads: Callable[..., None] = add_row_grads.add_row_grads_,
) -> Table:
    """An embedding table of one row shape for all vocabularies of `plan`.

    Args:     optimizer_slots: f32 values the optimiser keeps per weight.
              row_slots: f32 values it keeps per row of each logical table, after the weights.
              seed: of the initial weights.
              limits: how large it may become.
              life: which ids get a row; with it, the steps that touch a row are counted.
              sum_row_grads: see `recfx.step.train_step`.
    Cost:     find and insert read 16 to 32 B per id; insert never syncs; at load 0.75 a row's index and bookkeeping
              take 35 B, 45 B right after a doubling, 8 B more where rows are counted and have been freed.
    Raises:   ValueError when max_bytes has no room for a row, or a `life` that evicts at the cap keeps as many rows;
              TypeError when its `admit` returns what it should not.
    """
    check_type("seed", seed, int)
    device, num_extra = _device(plan), row_slots * len(plan.dims)
    width, num_slots = plan.width + num_extra, 1 + optimizer_slots
    admit = None if life is None else life.admit
    candidates = life.candidates if life and admit else 0
    max_rows = limits.rows(floats=width * num_slots, width=plan.width, candidates=candidates)
    if life is not None:
        _check_life(life, max_rows, device)
    inserting = [lookup for lookup in plan.lookups if not lookup.read_only]  # these come first
    main = cells_of(inserting or plan.lookups, device)
    keys, params = (nn.functional.pad(t, (0, num_extra)) for t in initializer_tensors(plan, seed))
    parts = TableParts(
        plan=plan,
        admit=admit,
        candidates=candidates,
        max_rows=max_rows,
        max_unique=limits.unique(max_rows),
        row_shape=(num_slots, width),
        main=main,
        read_only=cells_of(plan.lookups[len(main.lookups) :], device),
        inserts=bool(inserting),
        init_keys=keys,
        init_params=params,
        unknown_params=unknown_params(plan, params),
        sum_row_grads=sum_row_grads,
    )
    return Table(
        columns=columns_for(plan),
        init=partial(_init, parts),
        read=partial(_read, parts),
        find=_find,
        insert_=partial(_insert_, parts),
        pool=partial(_pool, parts),
        occurrences=partial(_occurrences, parts),
        add_grads_=partial(_add_grads_, parts),
        count_steps_=_count_steps_,
        grow_=grow_,
    )


def _init(parts: TableParts) -> TableState:
    device, max_rows, max_unique = parts.device, parts.max_rows, parts.max_unique

    def index(max_keys: int) -> tuple[Tensor, int]:
        max_slots = slots_for(max_keys, 7 / 8)
        first_slots = min(FIRST_SLOTS, max_slots)
        slots = reserve((max_slots,), torch.int64, device)
        slots[:first_slots] = -1
        return slots, first_slots

    slots, num_slots = index(max_rows)
    candidate_slots, num_candidate_slots = index(parts.candidates)
    return TableState(
        slots=slots,
        ids=reserve((max_rows,), torch.int64, device),
        vocabularies=reserve((max_rows,), torch.int32, device),
        seen=reserve((max_rows,), torch.int64, device),
        born=reserve((max_rows,), torch.int32, device),
        counts=reserve((max_rows,), torch.int32, device),
        rows=reserve_rows((max_rows, *parts.row_shape), device, most_padding=0.25),
        free_rows=reserve((max_rows,), torch.int32, device),
        unique_rows=reserve((max_unique,), torch.int32, device),
        grads=reserve_rows((max_unique, parts.plan.width), device, most_padding=1.0),
        candidates=TableCandidates(
            slots=candidate_slots,
            ids=reserve((parts.candidates,), torch.int64, device),
            vocabularies=reserve((parts.candidates,), torch.int32, device),
            counts=reserve((parts.candidates,), torch.int32, device),
        ),
        counters=new_counters(device, num_slots=num_slots, num_candidate_slots=num_candidate_slots),
    )


def _read(parts: TableParts, features: Mapping[str, Any]) -> Reading:
    lists = [ids_of(features, lookup.feature) for lookup in parts.plan.lookups]
    parts.plan.check_batch(lists[0].num_samples, sum(r.values.numel() for r in lists))
    num = len(parts.main.lookups)
    reading = in_order(lists[:num], parts.main)
    read_only = in_order(lists[num:], parts.read_only) if lists[num:] else None
    return reading._replace(lists=lists, read_only=read_only)


def _find(s: TableState, reading: Reading) -> Found:
    ids = reading.id, reading.cell, reading.vocabularies
    row = find.find(s.slots, s.ids, s.counters, *ids)
    read_only = None if reading.read_only is None else _find(s, reading.read_only)
    return Found(reading, row, torch.full_like(row, -1), read_only)


def _insert_(parts: TableParts, s: TableState, reading: Reading) -> Found:
    if not parts.inserts:
        return _find(s, reading)
    admits = _admitted(parts, s, reading)
    # Of another type, since an operator must not be given a tensor and its clone.
    num_before = None if reading.trains is None else s.counters[NUM_UNIQUE].int()
    row, inverse = find_or_insert.find_or_insert_(
        s.slots, s.ids, s.vocabularies, s.seen, s.born, s.rows, s.free_rows, s.unique_rows, s.counters, reading.id,
        reading.cell, reading.vocabularies, parts.init_keys, parts.init_params, admits,
    )  # fmt: skip
    if reading.trains is not None:
        touched = s.seen, s.unique_rows, s.counters, num_before
        inverse = keep_trained.keep_trained_(*touched, inverse, reading.cell, reading.trains)
    read_only = None if reading.read_only is None else _find(s, reading.read_only)
    return Found(reading, row, inverse, read_only)


def _admitted(parts: TableParts, s: TableState, reading: Reading) -> Tensor | None:
    """bool [P], which occurrences of an id without a row may create one. None: all."""
    if parts.admit is None:
        return None
    id, cell, vocabularies = reading.id, reading.cell, reading.vocabularies
    if parts.candidates:
        index = s.slots, s.ids, s.counters
        count = count_candidates.count_candidates_(*s.candidates, *index, id, cell, vocabularies)
    else:
        count = torch.zeros_like(cell)
    admits = parts.admit(count, id, vocabularies[cell % len(vocabularies)], s.step + 1)
    return checked("admit", admits, torch.bool, id).contiguous()


def _pool(parts: TableParts, s: TableState, found: Found) -> list[Tensor]:
    plan = parts.plan
    return pooling.pool(s.rows, found, parts.init_keys, parts.unknown_params, plan.firsts, plan.dims)


def _occurrences(parts: TableParts, found: Found, grads: Pooled) -> list[Occurrences]:
    return pooling.occurrences(found, grads, parts.plan.firsts, parts.plan.dims)


def _add_grads_(parts: TableParts, s: TableState, found: Found, grads: Pooled) -> TableState:
    for of_ids in _occurrences(parts, found, grads):
        parts.sum_row_grads(s.grads, *of_ids)
    return s


def _count_steps_(s: TableState, due: Tensor) -> TableState:
    count_rows.count_rows_(s.counts, s.counters, s.unique_rows, due)
    return s


def _device(plan: TablePlan) -> torch.device:
    try:
        return torch.device(plan.device)
    except (RuntimeError, TypeError) as error:
        feature = plan.lookups[0].feature
        raise ValueError(
            f"feature '{feature}': got device {plan.device!r}, expected one of torch's. Embeddings are kept there. Use "
            "'cpu' or 'cuda'."
        ) from error


def _check_life(life: Life, max_rows: int, device: torch.device) -> None:
    """Raises what `table` raises about a life."""
    if life.at_cap == "evict" and life.keep is not None and life.keep >= max_rows:
        raise ValueError(
            f"keep: got {life.keep}, expected less than the cap, {max_rows} rows. Nothing could be evicted."
        )
    if life.admit is not None:  # called once here: inside a capture torch would hide our error
        id = torch.zeros(2, dtype=torch.int64, device=device)
        checked("admit", life.admit(id.int() + 1, id, id.int(), id[0] + 1), torch.bool, id)
