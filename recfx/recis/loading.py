"""Checkpoints of RecIS: tables, optimiser state and dense parameters, read into a state of this library.

<folder>/index                        JSON: the file of each block, and the files' names
<folder>/tensorkey.json               JSON: '<table>.<slot>/part_<rank>_<ranks>' -> '<table>@<slot>^<slice>'
<folder>/model-*.safetensors          those blocks, and the sparse optimiser's counters as '<name>^ '
<folder>/model.pt, extra.pt           the dense part's state_dict with the step filters', and that of its optimiser
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from recfx.checkpoint.matching import check_arguments, check_names
from recfx.kernels.index.owner import owner
from recfx.kernels.op import UNKNOWN
from recfx.recis.dense import FilterSteps, dense_pairs
from recfx.recis.folder import PIECE, Folder, Part
from recfx.rows.place import place_of, rows_of
from recfx.rows.surgery import write_
from recfx.step import Step, TrainState
from recfx.table import ROW_FIELDS, TableState, restore_
from recfx.types import Params

__all__ = ["load_recis"]


def load_recis(
    path: str | Path,
    step: Step,
    state: TrainState,
    *,
    tables: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
    dense: Callable[[Params], Params] | None = None,
    moments: bool = True,
    betas: tuple[float, float] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainState:
    """Fills a freshly initialised `state` from a checkpoint of RecIS, whose training then goes on here.

    Rows come in the order of the model's tables, of the checkpoint's ranks, of each rank's rows. Where two tables share
    their rows here, as embedding and bias of one feature do, an id that one of them lacks has its initial value there.
    docs/coming-from-recis.md loads the DeepFM of its example.

    What was saved must fit what is built: `sparse_adamw_recis` for SparseAdamW, `sparse_adamw_tf` for SparseAdamWTF,
    `sparse_adam_recis` for SparseAdam; of parameters `adamw` for torch's AdamW, `adamw_tf` for AdamWTF, `adam` for
    torch's Adam. `sparse_adamw` and `sparse_adam` are torch's formulas: they keep the same, and go on otherwise.
    Where RecIS coalesced tables it kept the low 52 bits of an id: look ids of such a table up as `ops.mod(x, 2**52)`.

    Rows of a table with a step filter keep their age: the filter's step counts batches, `step.accumulation` of which
    are one step here. Rows of other tables count as touched by the last step. model.pt has a filter's step under
    '<table>@filter_global_step', as of 1.2.18; under the name of a module with a hash of the table's options before. As
    such a name does not tell the table, all of them must then be at one step.

    Args:     path: a checkpoint's folder, or the output folder of a run, for the newest one that it lists.
              tables: logical tables of the model to take, by name ('<group>/<feature>', or the shared name); default
              all, () none.
              names: name there of a table that has another one in the model.
              dense: parameters here from the state_dict there. It is used on the moments too, so it may only select,
              transpose, cut or join: torch.nn.Linear keeps [out, in] where `recfx.layers.linear` has [in, out]. What it
              leaves out keeps its initial value. Default: no dense part is taken.
              moments: take what AdamW keeps, and its step counts, by which bias correction and schedules go on. False:
              they begin at 0. The dense part's are taken by name, where the optimiser there saved names, as RecIS's
              named ones (1.1) do; else by number: what AdamW(model.parameters()) saves, one group, alike in number,
              order and shape to model.pt. Of another optimiser take the dense part without them in a call before:
              tables=(), moments=False.
              betas: of the sparse optimiser there, which saves their powers and corrects the bias by them. In 1.0 its
              counter of steps stays at 0; the powers then tell the steps, up to 87 000 of the default, (0.9, 0.999).
              Give betas also for a run that began under 1.0 and went on: its counter has the later steps only.
              rank, world_size: take the rows that `recfx.kernels.index.owner.owner` gives to this rank.
    Cost:     reads every byte twice, first to check it; files are mapped, one table's ids are sorted in memory.
    Differs:  from `load`: the layout has no checksums, so a flipped bit shows where it makes no sense, if anywhere.
              Reader positions and metrics are not taken.
    Raises:   ValueError naming file and tensor when one is missing, damaged, of another shape or type, or not finite;
              when an id is there twice, a rank's part of a table is missing, or the optimiser keeps something else;
              when powers of betas are of two numbers of steps, or a step filter's step is missing; when `state` has
              rows already, or too little room. `state` is then as it was.
    """
    check_arguments([Path(path)], state, rank, world_size)
    if betas is not None and not (0 <= betas[0] < 1 and 0 < betas[1] < 1):
        raise ValueError(f"betas: got {betas}, expected two numbers below 1 and above 0.")
    columns = {c.name: c for t in step.plan.tables for v in t.vocabularies for c in v}
    check_names("tables", tables, columns)
    check_names("names", (names or {}).keys(), columns)
    folder = Folder(Path(path))
    taken = [name for name in columns if tables is None or name in tables]
    name_there = {name: (names or {}).get(name, name) for name in taken}
    slots, num_steps = folder.optimizer(name_there.values(), step.slots, betas) if moments and taken else ({}, 0)
    parts = {name: folder.parts(there, columns[name].dim, slots) for name, there in name_there.items()}
    idle = _idle(folder, name_there, parts)
    pairs = [] if dense is None else dense_pairs(folder.path, state, dense, moments=moments)
    try:
        for name in taken:
            place_of(step, state, name).table.step.fill_(num_steps)
        for name in taken:
            for part in parts[name]:
                _write_part_(step, state, name, part, rank, world_size)
        if any(batches is not None for table in idle.values() for batches in table):
            _date_rows_(step, state, parts, idle)
    except BaseException:
        for t in state.tables:
            _empty_(t)
        raise
    for target, saved in pairs:
        target.copy_(saved)
    return state


def _idle(
    folder: Folder, name_there: Mapping[str, str], parts: Mapping[str, list[Part]]
) -> dict[str, list[Tensor | None]]:
    """Batches since a table's rows were looked up, i64 [n] for each part; None where it has no step filter.

    The batch that comes when the filter's step is s looks its rows up at s, and raises it afterwards, in a hook: before
    or after the one that saves. Where a row was looked up at the very step that was saved, it was after."""
    filtered = [name for name in parts if any(p.seen is not None for p in parts[name])]
    if not filtered:
        return {name: [None] * len(parts[name]) for name in parts}
    steps = FilterSteps(folder.path)
    now = {name: steps.of(name_there[name]) for name in filtered}
    late = any(p.seen is not None and bool((p.seen == now[name]).any()) for name in now for p in parts[name])
    return {
        name: [None if p.seen is None else (now[name] - 1 + late - p.seen).clamp(min=0) for p in parts[name]]
        for name in parts
    }


def _date_rows_(
    step: Step, state: TrainState, parts: Mapping[str, list[Part]], idle: Mapping[str, list[Tensor | None]]
) -> None:
    """Rows as last touched, and created, so many steps ago: where tables share them, as the later one saw them."""
    never = torch.iinfo(torch.int32).min
    lasts = [torch.full((int(t.num_rows),), never, dtype=torch.int64, device=t.ids.device) for t in state.tables]
    for name in parts:
        place = place_of(step, state, name)
        (last,) = (last for last, t in zip(lasts, state.tables, strict=True) if t is place.table)
        for part, batches in zip(parts[name], idle[name], strict=True):
            ago = torch.zeros_like(part.ids) if batches is None else batches // step.accumulation
            for ids, steps in zip(part.ids.split(PIECE), ago.split(PIECE), strict=True):
                row = rows_of(place, ids.to(last.device))
                mine = row != UNKNOWN  # others are another rank's
                row, steps = row[mine], steps.to(last.device)[mine]
                last[row] = torch.maximum(last[row], place.table.step - steps)
    for last, t in zip(lasts, state.tables, strict=True):
        t.seen[: len(last)] = last << 32
        t.born[: len(last)] = torch.minimum(t.born[: len(last)], last.int())


def _write_part_(step: Step, state: TrainState, table: str, part: Part, rank: int, world_size: int) -> None:
    place = place_of(step, state, table)
    pieces = zip(part.ids.split(PIECE), *(value.split(PIECE) for value in part.values.values()), strict=True)
    for ids, *values in pieces:
        mine = owner(ids, torch.full_like(ids, place.vocabulary, dtype=torch.int32), world_size) == rank
        ids, *values = (column[mine].to(place.table.ids.device) for column in (ids, *values))
        weight, *slots = (value.float() for value in values)
        write_(step, state, table, ids, weight, dict(zip(list(part.values)[1:], slots, strict=True)))


def _empty_(table: TableState) -> None:
    """As it was when it had no rows, but for the size of its index."""
    for field in ROW_FIELDS:
        getattr(table, field)[: int(table.num_rows)] = 0
    restore_(table, 0, torch.zeros(0, dtype=torch.int32))
    for counter in (table.step, table.tally, table.num_unique):
        counter.zero_()
