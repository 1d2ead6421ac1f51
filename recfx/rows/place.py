"""Where a logical table lies in the state, and its rows there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recfx.embeddings import TablePlan
from recfx.kernels.index.find import find
from recfx.kernels.op import UNKNOWN
from recfx.run_checks import check_program
from recfx.step import Step, TrainState
from recfx.table import Reading, TableState

__all__ = ["Place", "Rows", "check_device", "live_rows", "place_of", "reading_of", "rows_of", "taken"]


class Rows(NamedTuple):
    """Rows of one logical table, copied; zeros where an id has none."""

    id: Tensor  # i64 [N]
    known: Tensor  # bool [N]
    weight: Tensor  # f32 [N, D]
    slots: dict[str, Tensor]  # what the optimiser keeps, by its names: f32 [N, D], or [N, 1] per row
    first_step: Tensor  # i64 [N], of the table, that created the row
    last_step: Tensor  # i64 [N], the last that touched it
    num_steps: Tensor  # i64 [N] that touched it; 0 unless the step has a `Life`


class Place(NamedTuple):
    """A logical table in the state."""

    table: TableState
    plan: TablePlan
    vocabulary: int
    views: dict[str, Tensor]  # f32 [R, D] each: "weight", then by slot


def place_of(step: Step, state: TrainState, table: str) -> Place:
    """Raises: ValueError on an unknown table, or a state of another step."""
    check_program(step, state, "The order is (step, state).")
    names = []
    for plan, t in zip(step.plan.tables, state.tables, strict=True):
        for v, columns in enumerate(plan.vocabularies):
            for k, column in enumerate(columns):
                if column.name == table:
                    weights = t.rows[:, :, column.first : column.first + column.dim].unbind(1)
                    per_row = (t.rows.shape[2] - plan.width) // len(plan.dims)
                    first = plan.width + per_row * k
                    behind = t.rows[:, 0, first : first + per_row].split(1, dim=1) if per_row else ()
                    return Place(t, plan, v, dict(zip(("weight", *step.slots), (*weights, *behind), strict=True)))
                names.append(column.name)
    raise ValueError(f"table: got '{table}', expected one of {sorted(names)}.")


def rows_of(place: Place, ids: Tensor) -> Tensor:
    """i64 [N]: row of each id, or UNKNOWN."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: got {got}, expected torch.int64 [N]. float32 merges ids above 2**24.")
    check_device("ids", place, ids)
    t = place.table
    reading = reading_of(place, ids)
    return find(t.slots, t.ids, t.num_slots, t.salt, reading.id, reading.cell, reading.vocabularies).long()


def check_device(name: str, place: Place, t: Tensor) -> None:
    """Raises ValueError when a tensor is not where the table is."""
    expected = place.table.ids.device
    if t.device != expected:
        raise ValueError(f"{name}: got a tensor on {t.device}, expected {expected}, where the table is. Move it there.")


def reading_of(place: Place, ids: Tensor) -> Reading:
    """The ids as a table reads them: one lookup, each id a sample."""
    cell = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    return Reading(ids.contiguous(), cell, torch.tensor([place.vocabulary], dtype=torch.int32, device=ids.device))


def live_rows(place: Place) -> Tensor:
    """i64: rows in use, rising."""
    t = place.table
    return torch.nonzero(t.vocabularies[: int(t.num_rows)] == place.vocabulary)[:, 0]


def taken(place: Place, row: Tensor, ids: Tensor) -> Rows:
    """Copies of rows i64 [N] by number; zeros for UNKNOWN."""
    t, known = place.table, row != UNKNOWN

    def take(column: Tensor) -> Tensor:
        taken = column[row.clamp(min=0)]
        taken[~known] = 0
        return taken

    weight, *slots = map(take, place.views.values())
    names = list(place.views)[1:]
    steps = (take(t.born).long(), take(t.seen) >> 32, take(t.counts).long())
    return Rows(ids, known, weight, dict(zip(names, slots, strict=True)), *steps)
