"""Loads RecIS checkpoints: tables, optimiser state and dense parameters.

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

from recfx.checkpoint.matching import check_arguments, check_names, world_of
from recfx.kernels.op import UNKNOWN
from recfx.recis.dense import FilterSteps, dense_pairs
from recfx.recis.folder import PIECE, Folder, Part
from recfx.rows.surgery import check_ids, check_values, put_
from recfx.rows.views import owned, rows_of, view_of
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
    rank: int | None = None,
    world_size: int | None = None,
) -> TrainState:
    """Fills a freshly initialised `state` from a RecIS checkpoint, so that its training continues here.

    Rows are in the order of the model's tables, then of the checkpoint's ranks, then of each rank's rows. Where two
    tables share their rows here (embedding and bias of one feature), an id that one of them does not contain gets its
    initial value there. docs/coming-from-recis.md loads the DeepFM of its
    example.

    The optimisers must match: `sparse_adamw_recis` for SparseAdamW, `sparse_adamw_tf` for SparseAdamWTF,
    `sparse_adam_recis` for SparseAdam; for parameters `adamw` for torch's AdamW, `adamw_tf` for AdamWTF, `adam` for
    torch's Adam. `sparse_adamw` and `sparse_adam` are torch's formulas: they have the same state, but continue
    differently. Where RecIS coalesced tables it kept the low 52 bits of an id: look up ids of such a table as
    `ops.mod(x, 2**52)`.

    Rows of a table with a step filter keep their age: the filter's step counts batches, and `step.accumulation` batches
    are one step here. Rows of other tables count as touched by the last step. model.pt stores a filter's step under
    '<table>@filter_global_step' since 1.2.18; before, under the name of a module with a hash of the table's options.
    Such a name does not identify the table, so all filters must then have the same step.

    Args:     path: a checkpoint's folder, or the output folder of a run, for the newest checkpoint that it lists.
              tables: logical tables of the model to take, by name ('<group>/<feature>', or the shared name); default
              all, () none.
              names: name in the checkpoint, for a table whose name in the model differs.
              dense: function from the saved state_dict to parameters here. It is applied to the moments too, so it may
              only select, transpose, cut or join: torch.nn.Linear has [out, in], `recfx.layers.linear` has [in, out].
              Other parameters keep their initial values. Default: no dense part is taken.
              moments: take AdamW's moments and its step counts, with which bias correction and schedules continue.
              False: they start at 0. The dense moments are taken by name, if the optimiser saved names, as the named
              ones of RecIS (1.1) do; else by number: AdamW(model.parameters()) saves one group that matches model.pt
              in number, order and shape. For another dense optimiser load the dense part in an earlier call, with
              tables=(), moments=False.
              betas: of the sparse optimiser, which saves their powers for bias correction. In 1.0 its step counter
              stays at 0 and the steps follow from the powers, up to 87 000 with the default, (0.9, 0.999). Give betas
              also for a run that began under 1.0 and continued: its counter has only the later steps.
              rank, world_size: take the rows that `recfx.kernels.index.owner.owner` gives to this rank; default those
              of `step.group`; 0 of 1 in one process. Nothing is exchanged.
    Cost:     reads every byte twice, first to check it; files are mapped, one table's ids are sorted in memory.
    Differs:  from `load`: RecIS files have no checksums, so a flipped bit is found only if it gives an invalid value.
              Reader positions and metrics are not taken.
    Raises:   ValueError naming file and tensor when one is missing, damaged, of another shape or type, or not finite;
              when an id occurs twice, a rank's part of a table is missing, or the optimiser has another state; when
              the powers of betas contradict each other, or a step filter's step is missing; when `state` has rows
              already, or too little room. `state` is then unchanged.
    """
    world = world_of(step, rank, world_size)
    check_arguments([Path(path)], state, *world)
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
            view_of(step, state, name).table.step.fill_(num_steps)
        for name in taken:
            for part in parts[name]:
                _write_part_(step, state, name, part, *world)
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
    """Batches since a table's rows were looked up, i64 [n] for each part; None without a step filter.

    A batch at filter step s looks its rows up at s; a hook then increments the step, before or after the hook that
    saves. If any row was looked up at the saved step itself, it was after."""
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
    """Sets when rows were last touched and created. Rows that tables share get the later step."""
    never = torch.iinfo(torch.int32).min
    lasts = [torch.full((int(t.num_rows),), never, dtype=torch.int64, device=t.ids.device) for t in state.tables]
    for name in parts:
        view = view_of(step, state, name)
        (last,) = (last for last, t in zip(lasts, state.tables, strict=True) if t is view.table)
        for part, batches in zip(parts[name], idle[name], strict=True):
            ago = torch.zeros_like(part.ids) if batches is None else batches // step.accumulation
            for ids, steps in zip(part.ids.split(PIECE), ago.split(PIECE), strict=True):
                row = rows_of(view, ids.to(last.device))
                mine = row != UNKNOWN  # other ids belong to other ranks
                row, steps = row[mine], steps.to(last.device)[mine]
                last[row] = torch.maximum(last[row], view.table.step - steps)
    for last, t in zip(lasts, state.tables, strict=True):
        t.seen[: len(last)] = last << 32
        t.born[: len(last)] = torch.minimum(t.born[: len(last)], last.int())


def _write_part_(step: Step, state: TrainState, table: str, part: Part, rank: int, world_size: int) -> None:
    view = view_of(step, state, table)._replace(rank=rank, world_size=world_size)
    pieces = zip(part.ids.split(PIECE), *(value.split(PIECE) for value in part.values.values()), strict=True)
    for ids, *values in pieces:
        mine = owned(view, ids)
        ids, *values = (column[mine].to(view.table.ids.device) for column in (ids, *values))
        check_ids(view, state, table, ids)
        by_name = dict(zip(("weight", *list(part.values)[1:]), (value.float() for value in values), strict=True))
        check_values(view, ids, by_name)
        put_(view, step.seed, ids, by_name)


def _empty_(table: TableState) -> None:
    """Resets the table to having no rows. Its index keeps its size."""
    for field in ROW_FIELDS:
        getattr(table, field)[: int(table.num_rows)] = 0
    restore_(table, 0, torch.zeros(0, dtype=torch.int32))
    for counter in (table.step, table.tally, table.num_unique):
        counter.zero_()
