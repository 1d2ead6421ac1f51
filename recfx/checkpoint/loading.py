"""Loads a checkpoint into a state of the same model, or its common tables and parameters into another model."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recfx.checkpoint.contents import GENERATOR, WORKERS
from recfx.checkpoint.files import ShardReader, fetch, read_shard
from recfx.checkpoint.folders import Part, parts_of
from recfx.checkpoint.matching import (
    Move,
    OpenCheckpoint,
    check_arguments,
    check_distinct,
    check_names,
    dense_pairs,
    moves_of,
    world_of,
)
from recfx.checks import check_type
from recfx.embeddings import TablePlan
from recfx.generators import set_generator_states
from recfx.kernels.index.owner import owner
from recfx.kernels.rows.initial import initial_values
from recfx.run_checks import check_step_and_state
from recfx.step import Step, TrainState
from recfx.table import CANDIDATE_FIELDS, COUNTERS, ROW_FIELDS, TableState, initializer_tensors, restore_

__all__ = ["load"]


def load(
    path: str | Path | Sequence[str | Path],
    step: Step,
    state: TrainState,
    *,
    tables: Collection[str] | None = None,
    dense: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> tuple[TrainState, dict]:
    """Fills a freshly initialised `state`; returns it and the `loop` dict that was saved.

    `state.step` continues from the saved number. If the saved step drew from torch's generators, they are set to their
    saved states.

    Tables and parameters that are not taken keep their initial values. Rows keep their numbers when a whole table is
    taken; otherwise they are renumbered in order. Table capacities may differ from those saved. All variants of AdamW
    have the same moments, so training may continue with another variant or learning rate. Counts of ids that wait for
    admission are taken as rows are, as many as there is room for.

    Any number of ranks load what any number has saved, one included. As many as saved it each read the folder that
    they wrote: rows keep their numbers. Otherwise each reads all folders and takes the rows that it owns, in the order
    of the ranks that saved them and of their numbers. What a table counts as a whole, such as the ids that it refused,
    is then rank 0's. Nothing is exchanged: ranks need not load at the same time.

    Args:     path: a checkpoint's folder; or several, such as those of one checkpoint's ranks.
              tables: logical tables of the model to take, by name ('<group>/<feature>', or the shared name); default
              all, () none. Columns of a vocabulary that are not taken are initialised like those of new rows.
              dense: dense parameters to take, with their optimiser's state; default all, and `state.stats` of
              `forward`; () none.
              names: name in the checkpoint, for a table or dense parameter whose name in the model differs.
              rank, world_size: take the rows that `recfx.kernels.index.owner.owner` gives to this rank; default those
              of `step.group`; 0 of 1 in one process.
    Cost:     reads every byte once (ids twice when several ranks load a partial save); rebuilds the index.
    Raises:   ValueError naming the file when it is missing, damaged, or newer than this version; naming the table or
              parameter when the checkpoint does not contain it, has it in another shape, or was saved with another
              seed or optimiser; when `state` has rows already. `state` is then unchanged.
    """
    many = path if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    for one in many:
        check_type("path", one, str | Path, "`latest` returns None where it finds no checkpoint.")
    check_step_and_state(step, state, "The order is (path, step, state).")
    paths, names, world = [Path(p) for p in many], dict(names or {}), world_of(step, rank, world_size)
    check_arguments(paths, state, *world)
    known = step.plan.widths.keys()
    check_names("tables", tables, known)
    check_names("names", names.keys(), known | state.params.keys())
    parts = [part for p in paths for part in parts_of(p)]
    check_distinct([part.path for part in parts])
    sources, moves = _matched(step, parts, tables, names, world, may_keep=len(paths) == 1)
    pairs = dense_pairs(state, sources[0], dense, names)
    of_tables = zip(step.plan.tables, state.tables, moves, strict=True)
    fillings = [TableFiller(number, table, plan, found) for number, (plan, table, found) in enumerate(of_tables)]
    try:
        for filling in fillings:
            filling.put_rows_(step.seed)
    except BaseException:
        for filling in fillings:
            filling.clear_()
        raise
    for filling in fillings:
        filling.restore_()
    for target, saved in pairs:
        target.copy_(saved)
    small, loop = sources[0].small, sources[0].manifest["loop"]
    state.step.copy_(small.get("step", torch.tensor(loop["step"])))  # older checkpoints have it in the manifest only
    if isinstance(state.rate, Tensor) and "rate" in small:
        state.rate.copy_(small["rate"])
    generators = {name.removeprefix(GENERATOR): t for name, t in small.items() if name.startswith(GENERATOR)}
    if generators and (dense is None or dense):
        set_generator_states(generators, state.step.device)
        step.draws.happened = True
    return state, loop


def _matched(
    step: Step,
    parts: Sequence[Part],
    tables: Collection[str] | None,
    names: dict[str, str],
    world: tuple[int, int],
    *,
    may_keep: bool,
) -> tuple[list[OpenCheckpoint], list[list[Move]]]:
    """What is read, and what it contributes to each table.

    That is the rank's own part alone where as many ranks saved the checkpoint and owned the same ids.
    Raises: as `load`.
    """
    keeps = may_keep and len(parts) == world[1] > 1
    sources = [OpenCheckpoint.open(part) for part in ([parts[world[0]]] if keeps else parts)]
    for source in sources:
        _check_kind(step, source, tables)
    owner_of = (0, 1) if keeps else world
    moves = [
        [move for source in sources for move in moves_of(plan, source, tables, names, owner_of)]
        for plan in step.plan.tables
    ]
    if keeps and not all(move.keeps_vocabularies for found in moves for move in found):
        return _matched(step, parts, tables, names, world, may_keep=False)
    return sources, moves


def _check_kind(step: Step, source: OpenCheckpoint, tables: Collection[str] | None) -> None:
    """Raises ValueError when it was saved with another seed, or rows that are taken with another optimiser."""
    if source.manifest["seed"] != step.seed:
        raise ValueError(
            f"{source.path}: got seed {source.manifest['seed']}, expected the step's, {step.seed}. New rows would "
            "be drawn differently. Build the step with the checkpoint's seed."
        )
    if source.manifest["slots"] != list(step.slots) and (tables is None or tables):
        raise ValueError(
            f"{source.path}: got an optimiser that keeps {source.manifest['slots']} next to the weights, expected "
            f"{list(step.slots)}. Use the optimiser that it was saved with, or take weights alone with "
            "recfx.rows.export_parquet and import_parquet_."
        )


class Places(NamedTuple):
    """The destinations of a shard's rows."""

    kept: np.ndarray  # i64: the rows of the shard that are taken
    rows: np.ndarray | range  # their rows in the table


class TableFiller:
    """Fills one table of the model from checkpoints. The rows are not in use before `restore_`."""

    def __init__(self, number: int, table: TableState, plan: TablePlan, moves: list[Move]) -> None:
        self._number, self._table, self._plan, self._moves = number, table, plan, moves
        self._num_rows, self._free = 0, np.zeros(0, np.int32)

    def put_rows_(self, seed: int) -> None:
        """Fills the rows. Raises: ValueError naming the table that is too small, and as `read_shard`."""
        for move in self._moves:
            parts = move.source.manifest["parts"][move.table]
            row_of = None
            if len(self._moves) == 1 and move.everything:
                row_of = self._as_there(move)
            elif len(parts) > 1:
                row_of = self._in_order(move)
            for names in parts:  # later parts overwrite earlier ones, so one after the other
                self._put_part_(move, names, row_of, seed)

    def clear_(self) -> None:
        """Undoes `put_rows_`."""
        for field in ROW_FIELDS:
            getattr(self._table, field)[: self._num_rows] = 0

    def restore_(self) -> None:
        """Puts the rows into use, with the table's counters and candidates."""
        table, moves = self._table, self._moves
        for name in COUNTERS:
            saved = [move.source.small[f"table.{move.table}.{name}"] for move in moves]
            if name == "step":
                table.step.fill_(max(map(int, saved), default=0))
            elif moves and moves[0].rank == 0:  # counted once, however many ranks there are
                getattr(table, name).copy_(torch.stack(saved).sum(0))
        restore_(table, self._num_rows, torch.from_numpy(self._free), _candidates(moves))

    def _take(self, num_rows: int) -> range:
        """Reserves the next row numbers."""
        end = self._num_rows + num_rows
        if end > (most := self._table.ids.numel()):
            raise ValueError(f"table {self._number}: got {end} rows or more, expected at most {most}. Raise max_rows.")
        self._num_rows, first = end, self._num_rows
        return range(first, end)

    def _as_there(self, move: Move) -> np.ndarray:
        """i32 [rows there]: the row here of each, which has the same number; -1: a free row."""
        self._free = move.source.small[f"table.{move.table}.free_rows"].numpy()
        row_of = np.arange(int(move.source.small[f"table.{move.table}.num_rows"]), dtype=np.int32)
        self._take(len(row_of))
        row_of[self._free] = -1
        return row_of

    def _in_order(self, move: Move) -> np.ndarray:
        """i32 [rows there]: the row here of each, -1: not taken. The last part that holds a row has its current id."""
        taken = np.zeros(int(move.source.small[f"table.{move.table}.num_rows"]), bool)
        for name in itertools.chain(*move.source.manifest["parts"][move.table]):
            with _shard(move, name) as shard:
                (row,) = shard.ahead("row")
                taken[row] = _taken(move, *shard.ahead("ids", "vocabularies"))
        taken[move.source.small[f"table.{move.table}.free_rows"].numpy()] = False
        rows = self._take(int(taken.sum()))
        row_of = np.cumsum(taken, dtype=np.int32) + np.int32(rows.start - 1)
        row_of[~taken] = -1
        return row_of

    def _put_part_(self, move: Move, names: list[str], row_of: np.ndarray | None, seed: int) -> None:
        todo, turn = itertools.pairwise([*names, None]), threading.Lock()  # rows are numbered in the order of shards

        def put_next() -> bool:
            with contextlib.ExitStack() as stack:
                with turn:
                    name, following = next(todo, (None, None))
                    if name is None:
                        return False
                    # A rank that skips rows computes while the disk reads ahead. A rank that takes all rows waits for
                    # new memory, which read-ahead into the page cache would reduce.
                    if (wanted := following if row_of is None else name) is not None:
                        fetch(move.source.path / wanted)
                    shard = stack.enter_context(_shard(move, name))
                    places = self._places(move, shard, row_of)
                self._put_(move, shard, places, seed)
            return True

        def put_all() -> None:
            while put_next():
                pass

        with ThreadPoolExecutor(WORKERS) as pool:
            for done in [pool.submit(put_all) for _ in range(WORKERS)]:
                done.result()

    def _places(self, move: Move, shard: ShardReader, row_of: np.ndarray | None) -> Places:
        """The destinations of a shard's rows: by `row_of`, or after those of the previous shards."""
        if row_of is None:
            kept = np.flatnonzero(_taken(move, *shard.ahead("ids", "vocabularies")))
            return Places(kept, self._take(len(kept)))
        (row,) = shard.ahead("row")
        rows = row_of[row]
        kept = np.flatnonzero(rows >= 0)
        rows = rows[kept]
        together = len(rows) > 0 and rows[-1] - rows[0] + 1 == len(rows)
        return Places(kept, range(rows[0], rows[-1] + 1) if together else rows)

    def _put_(self, move: Move, shard: ShardReader, places: Places, seed: int) -> None:
        """Copies a shard's rows to their destinations, a piece of a column at a time."""
        keeps_layout = move.keeps_layout(self._plan.width)
        if not keeps_layout:
            ids, vocabularies = map(torch.from_numpy, shard.ahead("ids", "vocabularies"))
        for name, first, values in shard.pieces():
            if name == "rows":
                self._check_shape(move, values.shape[1:])
            low, high = np.searchsorted(places.kept, (first, first + len(values)))
            kept = places.kept[low:high]
            if len(kept) < len(values):
                values = values.take(kept - first, axis=0)
            if name == "last_seen":
                steps = int(move.source.small[f"table.{move.table}.step"])
                name, values = "seen", np.minimum(values, steps).astype(np.int64) << 32
            elif name == "vocabularies":
                values = move.here[values]
            elif name == "rows" and not keeps_layout:
                there = torch.from_numpy(values), ids[kept], vocabularies[kept]
                values = _rows_here(*there, self._plan, seed, move).numpy()
            if name in ROW_FIELDS:
                _write_(getattr(self._table, name), places.rows[low:high], values)

    def _check_shape(self, move: Move, got: tuple[int, ...]) -> None:
        """Compares shapes: a slot per weight may have the same name as another optimiser's slot per row."""
        (num, width), there = self._table.rows.shape[1:], move.columns_there(0)
        row_slots = (width - self._plan.width) // len(self._plan.dims)
        expected = (num, max(first + dim for _, first, dim in there) + row_slots * len(there))
        if got != expected:
            raise ValueError(
                f"{move.source.path}: got rows of shape {list(got)}, expected {list(expected)}. Use the optimiser that "
                "it was saved with."
            )


def _shard(move: Move, name: str) -> contextlib.AbstractContextManager[ShardReader]:
    return read_shard(move.source.path / name, move.source.manifest["files"][name])


def _taken(move: Move, ids: np.ndarray, vocabularies: np.ndarray) -> np.ndarray:
    """bool: whether the row's vocabulary is taken and this rank owns the row."""
    here = move.here[vocabularies]
    ranks = owner(torch.from_numpy(ids), torch.from_numpy(here), move.world_size).numpy()
    return (here >= 0) & (ranks == move.rank)  # torch would start threads


def _write_(target: Tensor, rows: np.ndarray | range, values: np.ndarray) -> None:
    where = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
    if target.device.type == "cpu":
        target.numpy()[where] = values  # torch would start threads
    else:
        target[where] = torch.from_numpy(values).to(target.device)


def _candidates(moves: list[Move]) -> list[Tensor]:
    """Ids without a row that this rank owns, their vocabularies here and their counts."""
    found = []
    for move in moves:
        name, small = f"table.{move.table}.candidates", move.source.small
        if f"{name}.ids" in small:
            id, vocabulary, count = (small[f"{name}.{field}"] for field in CANDIDATE_FIELDS)
            taken = torch.from_numpy(_taken(move, id.numpy(), vocabulary.numpy()))
            found.append((id[taken], torch.from_numpy(move.here)[vocabulary[taken].long()], count[taken]))
    return [torch.cat(columns) for columns in zip(*found, strict=True)]


def _rows_here(there: Tensor, ids: Tensor, vocabularies: Tensor, plan: TablePlan, seed: int, move: Move) -> Tensor:
    """The rows with their columns in the model's order; columns that are not taken are as in a new row."""
    keys, params = initializer_tensors(plan, seed)
    vocabulary = torch.from_numpy(move.here)[vocabularies.long()].long()
    here_width = plan.width
    there_width = max(first + dim for _, first, dim in move.columns_there(0))
    per_table = (there.shape[2] - there_width) // len(move.columns_there(0))  # row slots, after the weights
    here = there.new_zeros(len(there), there.shape[1], here_width + per_table * len(plan.dims))
    here[:, 0, :here_width] = initial_values(ids, keys[vocabulary].cpu(), params[vocabulary].cpu())
    for piece in move.pieces:
        rows = (vocabulary == piece.here).nonzero()[:, 0]
        firsts = [first for _, first, _ in move.columns_there(piece.there)]
        for first, column in piece.columns:
            from_slot, to_slot = (
                width + per_table * k
                for width, k in (
                    (there_width, firsts.index(first)),
                    (here_width, plan.vocabularies[piece.here].index(column)),
                )
            )
            for source, target, dim in ((first, column.first, column.dim), (from_slot, to_slot, per_table)):
                here[rows, :, target : target + dim] = there[rows, :, source : source + dim]
    return here
