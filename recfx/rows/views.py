"""Views of a logical table in the state, and its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recfx.embeddings import TablePlan
from recfx.kernels.index.find import find
from recfx.kernels.index.owner import owner
from recfx.kernels.op import UNKNOWN
from recfx.run_checks import check_step_and_state
from recfx.step import Step, TrainState
from recfx.table import Reading, TableState

__all__ = [
    "Rows",
    "TableView",
    "check_device",
    "live_rows",
    "owned",
    "reading_of",
    "rows_of",
    "taken",
    "view_of",
]


class Rows(NamedTuple):
    """Copies of rows of one logical table; zeros where an id has no row."""

    id: Tensor  # i64 [N]
    known: Tensor  # bool [N]; an id that another rank owns has no row here
    weight: Tensor  # f32 [N, D]
    slots: dict[str, Tensor]  # optimiser slots by name: f32 [N, D], or [N, 1] per row
    first_step: Tensor  # i64 [N]: the step of the table that created the row
    last_step: Tensor  # i64 [N]: the last step that touched it
    num_steps: Tensor  # i64 [N]: how many steps touched it; 0 unless the step has a `Life`


class TableView(NamedTuple):
    """A logical table: its physical table in the state, and views of its columns."""

    table: TableState
    plan: TablePlan
    vocabulary: int
    tensors: dict[str, Tensor]  # f32 [R, D] each: "weight", then by slot
    rank: int  # that has this state, of world_size
    world_size: int


def view_of(step: Step, state: TrainState, table: str) -> TableView:
    """The view of a logical table. Raises: ValueError on an unknown table, or a state of another step."""
    check_step_and_state(step, state, "The order is (step, state).")
    names = []
    for plan, t in zip(step.plan.tables, state.tables, strict=True):
        for v, columns in enumerate(plan.vocabularies):
            for k, column in enumerate(columns):
                if column.name == table:
                    weights = t.rows[:, :, column.first : column.first + column.dim].unbind(1)
                    per_row = (t.rows.shape[2] - plan.width) // len(plan.dims)
                    first = plan.width + per_row * k
                    slots = t.rows[:, 0, first : first + per_row].split(1, dim=1) if per_row else ()
                    tensors = dict(zip(("weight", *step.slots), (*weights, *slots), strict=True))
                    return TableView(t, plan, v, tensors, *_world_of(step))
                names.append(column.name)
    raise ValueError(f"table: got '{table}', expected one of {sorted(names)}.")


def _world_of(step: Step) -> tuple[int, int]:
    """This rank, and how many there are."""
    return (0, 1) if step.group is None else (step.group.rank, step.group.world_size)


def owned(view: TableView, ids: Tensor) -> Tensor:
    """bool [N]: the ids i64 [N] that this rank owns; all in one process."""
    if view.world_size == 1:
        return torch.ones_like(ids, dtype=torch.bool)
    return owner(ids, torch.full_like(ids, view.vocabulary, dtype=torch.int32), view.world_size) == view.rank


def rows_of(view: TableView, ids: Tensor) -> Tensor:
    """i64 [N]: the row of each id, or UNKNOWN."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: got {got}, expected torch.int64 [N]. float32 merges ids above 2**24.")
    check_device("ids", view, ids)
    t, reading = view.table, reading_of(view, ids)
    return find(t.slots, t.ids, t.counters, reading.id, reading.cell, reading.vocabularies).long()


def check_device(name: str, view: TableView, t: Tensor) -> None:
    """Raises ValueError when a tensor is not where the table is."""
    expected = view.table.ids.device
    if t.device != expected:
        raise ValueError(f"{name}: got a tensor on {t.device}, expected {expected}, where the table is. Move it there.")


def reading_of(view: TableView, ids: Tensor) -> Reading:
    """The ids as a table reads them: one lookup, each id is a sample."""
    cell = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    return Reading(ids.contiguous(), cell, torch.tensor([view.vocabulary], dtype=torch.int32, device=ids.device))


def live_rows(view: TableView) -> Tensor:
    """i64: rows in use, rising."""
    t = view.table
    return torch.nonzero(t.vocabularies[: int(t.num_rows)] == view.vocabulary)[:, 0]


def taken(view: TableView, row: Tensor, ids: Tensor) -> Rows:
    """Copies of rows i64 [N] by number; zeros for UNKNOWN."""
    t, known = view.table, row != UNKNOWN

    def take(column: Tensor) -> Tensor:
        taken = column[row.clamp(min=0)]
        taken[~known] = 0
        return taken

    weight, *slots = map(take, view.tensors.values())
    names = list(view.tensors)[1:]
    steps = (take(t.born).long(), take(t.seen) >> 32, take(t.counts).long())
    return Rows(ids, known, weight, dict(zip(names, slots, strict=True)), *steps)
