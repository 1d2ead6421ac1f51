"""Loading: a checkpoint into the state it came from, or what two models have in common into another one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from recfx.checkpoint.contents import WORKERS, dense_tensors
from recfx.checkpoint.files import STATE, ShardReader, read_checked, read_manifest, read_some
from recfx.embeddings import Column, TablePlan
from recfx.kernels.initial import initial_values
from recfx.kernels.owner import owner
from recfx.step import Step, TrainState
from recfx.table import CANDIDATE_FIELDS, COUNTERS, ROW_FIELDS, TableState, initializer_tensors, restore_

__all__ = ["Held", "Source", "check_arguments", "check_names", "held", "load"]


class Source(NamedTuple):
    """A checkpoint opened for reading: its manifest, and all that is not a row."""

    path: Path
    manifest: dict
    small: dict[str, Tensor]

    @staticmethod
    def open(path: str | Path) -> Source:
        """Raises: ValueError naming the file when it is missing, damaged, or of another format."""
        path = Path(path)
        manifest = read_manifest(path)
        return Source(
            path, manifest, safetensors.torch.load(bytes(read_checked(path / STATE, manifest["files"][STATE])))
        )


class Held(NamedTuple):
    """What a checkpoint holds, by name."""

    tables: dict[str, int]  # width of each logical table
    dense: dict[str, torch.Size]  # shape of each dense parameter


def held(path: str | Path) -> Held:
    """The tables and dense parameters of a checkpoint, so that a new model can be given what fits it.

    Raises:   ValueError naming the file when it is missing, damaged, or newer than this version.
    Example:  >>> there = held(path)                                                            # doctest: +SKIP
              >>> tables = there.tables.keys() & step.plan.widths.keys()                        # doctest: +SKIP
              >>> dense = [n for n, p in state.params.items() if there.dense.get(n) == p.shape] # doctest: +SKIP
              >>> state, _ = load(path, step, state, tables=tables, dense=dense)                # doctest: +SKIP
    """
    source, prefix = Source.open(path), "params."
    tables = {name: width for table in source.manifest["tables"] for columns in table for name, _, width in columns}
    dense = {n.removeprefix(prefix): t.shape for n, t in source.small.items() if n.startswith(prefix)}
    return Held(tables, dict(sorted(dense.items())))


class Piece(NamedTuple):
    """A vocabulary of a checkpoint's table that becomes one of the model's table."""

    there: int
    here: int
    columns: tuple[tuple[int, Column], ...]  # first column there, and what it is here


@dataclass(frozen=True, kw_only=True)
class Move:
    """All that one table of a checkpoint gives to one table of the model."""

    source: Source
    table: int
    pieces: tuple[Piece, ...]
    rank: int
    world_size: int

    @functools.cached_property
    def here(self) -> np.ndarray:
        """By vocabulary there: the one here, -1 not taken."""
        here = np.full(len(self.source.manifest["tables"][self.table]), -1, np.int32)
        here[[piece.there for piece in self.pieces]] = [piece.here for piece in self.pieces]
        return here

    def columns_there(self, vocabulary: int) -> list[list]:
        """Name, first column and width of its logical tables."""
        return self.source.manifest["tables"][self.table][vocabulary]

    @property
    def everything(self) -> bool:
        """Whether every row there gets a row here."""
        return self.world_size == 1 and bool((self.here >= 0).all())

    def keeps_layout(self, width: int) -> bool:
        """Whether rows there are rows here as they are."""
        there = max(first + dim for v in self.source.manifest["tables"][self.table] for _, first, dim in v)
        return there == width and all(
            sum(column.dim for _, column in piece.columns) == width
            and all(first == column.first for first, column in piece.columns)
            for piece in self.pieces
        )


def load(
    path: str | Path | Sequence[str | Path],
    step: Step,
    state: TrainState,
    *,
    tables: Collection[str] | None = None,
    dense: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[TrainState, dict]:
    """Fills a freshly initialised `state`; returns it and the `loop` dict that was saved.

    What is not taken keeps its initial value. Rows keep their numbers where all of a table is taken; otherwise they are
    numbered anew in their order. Table capacities may differ from what was saved.

    Args:     path: a checkpoint's folder; or the folders of all ranks of one checkpoint.
              tables: logical tables of the model to take, by name ('<group>/<feature>', or the shared name); default
              all, () none. Columns of a vocabulary that are not taken are initialised as new rows are.
              dense: dense parameters to take, with their optimiser's state; default all, () none.
              names: name in the checkpoint, of a table or dense parameter that has another one in the model.
              rank, world_size: take the rows that `recfx.kernels.owner.owner` gives to this rank.
    Cost:     reads every byte once, one pass; rebuilds the index.
    Raises:   ValueError naming the file when it is missing, damaged, or newer than this version; naming the table or
              parameter when the checkpoint lacks it, has it in another shape, or was made with another seed or
              optimiser; when `state` has rows already. `state` is then as it was.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
    check_arguments(paths, state, rank, world_size)
    sources, names = [Source.open(p) for p in paths], dict(names or {})
    for source in sources:
        if source.manifest["seed"] != step.seed:
            raise ValueError(
                f"{source.path}: got seed {source.manifest['seed']}, expected the step's, {step.seed}. New rows would "
                "be drawn differently. Build the step with the checkpoint's seed."
            )
        if source.manifest["slots"] != list(step.slots) and (tables is None or tables):
            raise ValueError(
                f"{source.path}: got an optimiser that keeps {source.manifest['slots']} beside the weights, expected "
                f"{list(step.slots)}. Use the optimiser that it was saved with, or take weights alone with "
                "recfx.rows.export_parquet and import_parquet_."
            )
    known = step.plan.widths.keys()
    check_names("tables", tables, known)
    check_names("names", names.keys(), known | state.params.keys())
    dense_pairs, table_moves = _dense_pairs(state, sources[0], dense, names), []
    for number, (plan, table) in enumerate(zip(step.plan.tables, state.tables, strict=True)):
        moves = [move for s in sources for move in _moves(plan, s, tables, names, (rank, world_size))]
        table_moves.append(TableMoves(table, plan, moves, *_places(moves)))
        if (num := table_moves[-1].num_rows) > (most := table.ids.numel()):
            raise ValueError(f"table {number}: got {num} rows, expected at most {most}. Raise max_rows.")
    try:
        for table_move in table_moves:
            _put_rows_(table_move, step.seed)
    except BaseException:
        for table_move in table_moves:
            for field in ROW_FIELDS:
                getattr(table_move.table, field)[: table_move.num_rows] = 0
        raise
    for table_move in table_moves:
        _restore_(table_move)
    for target, saved in dense_pairs:
        target.copy_(saved)
    return state, sources[0].manifest["loop"]


def check_arguments(paths: list[Path], state: TrainState, rank: int, world_size: int) -> None:
    """Raises what `load` raises about its paths, ranks, and a state that has rows."""
    if not paths or len({p.resolve() for p in paths}) < len(paths):
        raise ValueError(f"path: got {list(map(str, paths))}, expected one folder or more, each once.")
    if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank!r} of world_size {world_size!r}, expected ints, 0 <= rank < world_size.")
    num_rows = sum(int(t.num_rows) for t in state.tables)
    if num_rows:
        raise ValueError(f"state: got one with {num_rows} rows, expected a new one. They would be lost. Use step.init.")


def check_names(argument: str, got: Collection[str] | None, known: Collection[str]) -> None:
    """Raises: ValueError naming the argument when it holds an unknown name, TypeError when it is a str."""
    if isinstance(got, str):
        raise TypeError(f"{argument}: got the str '{got}', expected a list of names.")
    unknown = sorted(set(got or ()) - set(known))
    if unknown:
        raise ValueError(f"{argument}: got {unknown}, expected some of {sorted(known)}.")


def _dense_pairs(
    state: TrainState, source: Source, taken: Collection[str] | None, names: dict[str, str]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the state, and what they are to become."""
    check_names("dense", taken, state.params)
    if taken is None or taken:
        _check_optimizer(state, source)
    pairs = []
    for part, param, target in dense_tensors(state):
        if taken is not None and (param not in taken if param is not None else not taken):
            continue
        name = part if param is None else f"{part}.{names.get(param, param)}"
        saved = source.small.get(name)
        if saved is None or saved.shape != target.shape:
            raise ValueError(
                f"{source.path / STATE}: no tensor '{name}' of shape {list(target.shape)}. Another model's or "
                "optimiser's; name what to take in `dense`, see `held`."
            )
        pairs.append((target, saved))
    return pairs


def _check_optimizer(state: TrainState, source: Source) -> None:
    """A dense optimiser that kept more cannot go on as this one: what it kept would be lost without notice."""
    params = [name.removeprefix("params.") for name in source.small if name.startswith("params.")]
    kept = [(part, param) for part, param, _ in dense_tensors(state) if part != "params"]
    known = {part if param is None else f"{part}.{p}" for part, param in kept for p in params}
    more = sorted(name for name in source.small if name.startswith("dense.") and name not in known)
    if more:
        parts = sorted({part for part, _ in kept})
        raise ValueError(
            f"{source.path / STATE}: got an optimiser that keeps '{more[0]}', expected one that keeps {parts} and no "
            "more. Use the optimiser that it was saved with."
        )


def _moves(
    plan: TablePlan,
    source: Source,
    taken: Collection[str] | None,
    names: Mapping[str, str],
    world: tuple[int, int],
) -> list[Move]:
    """What a checkpoint gives to the model's table `plan`, by table of the checkpoint."""
    places = {
        name: (t, v, first, dim)
        for t, table in enumerate(source.manifest["tables"])
        for v, columns in enumerate(table)
        for name, first, dim in columns
    }
    pieces: dict[int, list[Piece]] = {}
    for here, vocabulary in enumerate(plan.vocabularies):
        columns = [c for c in vocabulary if taken is None or c.name in taken]
        for column in columns:
            name = names.get(column.name, column.name)
            if name not in places or places[name][3] != column.dim:
                known = ", ".join(f"{n} of width {place[3]}" for n, place in places.items())
                raise ValueError(
                    f"{source.path}: no table '{name}' of width {column.dim} for '{column.name}', only {known}. Give "
                    "its name there in `names`, or what to take in `tables`."
                )
        found = [places[names.get(c.name, c.name)] for c in columns]
        keys = {(t, v) for t, v, _, _ in found}
        if len(keys) > 1:
            raise ValueError(
                f"{source.path}: got other ids for each of {[c.name for c in columns]}, expected the same. Here they "
                "share rows; take one of them in `tables`."
            )
        for t, there in keys:
            firsts = tuple((first, c) for (_, _, first, _), c in zip(found, columns, strict=True))
            if there in {piece.there for piece in pieces.setdefault(t, [])}:
                raise ValueError(f"{source.path}: table '{columns[0].name}' shares its rows there with another table.")
            pieces[t].append(Piece(there, here, firsts))
    return [
        Move(source=source, table=t, pieces=tuple(p), rank=world[0], world_size=world[1]) for t, p in pieces.items()
    ]


class TableMoves(NamedTuple):
    """All that becomes one table of the model."""

    table: TableState
    plan: TablePlan
    moves: list[Move]
    places: list[np.ndarray]  # by move: row here of each row there, -1: not taken
    num_rows: int
    free: np.ndarray


def _put_rows_(of: TableMoves, seed: int) -> None:
    """Fills rows, which are not in use yet."""
    for move, place in zip(of.moves, of.places, strict=True):
        workers = threading.local()  # each with a reader of its own

        def put(name: str, move: Move = move, place: np.ndarray = place, workers: threading.local = workers) -> None:
            if not hasattr(workers, "reader"):
                workers.reader = ShardReader()
            shard = workers.reader.read(move.source.path / name, move.source.manifest["files"][name])
            _put_(of.table, of.plan, seed, move, place, shard)

        with ThreadPoolExecutor(WORKERS) as pool:
            for names in move.source.manifest["parts"][move.table]:  # laid over each other, so one after the other
                list(pool.map(put, names))


def _restore_(of: TableMoves) -> None:
    """Takes the rows into use, with the table's counters and candidates."""
    table, moves = of.table, of.moves
    for name in COUNTERS:
        saved = [move.source.small[f"table.{move.table}.{name}"] for move in moves]
        if name == "step":
            table.step.fill_(max(map(int, saved), default=0))
        elif moves and moves[0].rank == 0:  # counted once, however many ranks there are
            getattr(table, name).copy_(torch.stack(saved).sum(0))
    restore_(table, of.num_rows, torch.from_numpy(of.free), _candidates(moves))


def _candidates(moves: list[Move]) -> list[Tensor]:
    """Ids without a row and their counts, where all of a table is taken and some were counted."""
    if len(moves) != 1 or not moves[0].everything:
        return []
    name, small = f"table.{moves[0].table}.candidates", moves[0].source.small
    if f"{name}.ids" not in small:
        return []
    id, vocabulary, count = (small[f"{name}.{field}"] for field in CANDIDATE_FIELDS)
    return [id, torch.from_numpy(moves[0].here)[vocabulary.long()], count]


def _places(moves: list[Move]) -> tuple[list[np.ndarray], int, np.ndarray]:
    """By move: row here of each row there, -1: not taken. And the number of rows here, and the free ones."""
    places, num_rows = [], 0
    for move in moves:
        free = move.source.small[f"table.{move.table}.free_rows"].numpy()
        if len(moves) == 1 and move.everything:
            place = np.arange(int(move.source.small[f"table.{move.table}.num_rows"]), dtype=np.int32)
            place[free] = -1
            return [place], len(place), free
        taken = _taken(move)
        taken[free] = False
        place = np.cumsum(taken, dtype=np.int32) + np.int32(num_rows - 1)
        num_rows += int(taken.sum())
        place[~taken] = -1
        places.append(place)
    return places, num_rows, np.zeros(0, np.int32)


def _taken(move: Move) -> np.ndarray:
    """bool [rows there]: whether a vocabulary that is taken holds the row, and this rank is its owner."""
    source, t = move.source, move.table
    taken = np.zeros(int(source.small[f"table.{t}.num_rows"]), bool)

    def look(name: str) -> None:
        shard = read_some(source.path / name, ("row", "ids", "vocabularies"))
        here = move.here[shard["vocabularies"]]
        ranks = owner(torch.from_numpy(shard["ids"]), torch.from_numpy(here), move.world_size).numpy()
        taken[shard["row"]] = (here >= 0) & (ranks == move.rank)  # torch would start threads of its own

    with ThreadPoolExecutor(WORKERS) as pool:
        for names in source.manifest["parts"][t]:
            list(pool.map(look, names))
    return taken


def _put_(table: TableState, plan: TablePlan, seed: int, move: Move, place: np.ndarray, shard: dict) -> None:
    """Some rows of a checkpoint to their places in the table."""
    at = place[shard["row"]]
    kept = np.flatnonzero(at >= 0)
    if len(kept) < len(at):
        at = at[kept]
        shard = {name: array.take(kept, axis=0) for name, array in shard.items()}
    if not len(at):
        return
    values = {name: torch.from_numpy(shard[name]) for name in ROW_FIELDS if name != "seen"}
    values["seen"] = torch.from_numpy(shard["last_seen"]).long() << 32
    if not move.keeps_layout(plan.width):
        values["rows"] = _rows_here(values, plan, seed, move)
    values["vocabularies"] = torch.from_numpy(move.here[shard["vocabularies"]])
    where = slice(int(at[0]), int(at[-1]) + 1) if at[-1] - at[0] + 1 == len(at) else torch.from_numpy(at).long()
    for name, value in values.items():
        getattr(table, name)[where] = value.to(table.ids.device)


def _rows_here(values: dict[str, Tensor], plan: TablePlan, seed: int, move: Move) -> Tensor:
    """The rows with their columns where the model has them; columns that are not taken as in a new row."""
    keys, params = initializer_tensors(plan, seed)
    vocabulary = torch.from_numpy(move.here)[values["vocabularies"].long()].long()
    there, here_width = values["rows"], plan.width
    there_width = max(first + dim for _, first, dim in move.columns_there(0))
    per_table = (there.shape[2] - there_width) // len(move.columns_there(0))  # row slots, behind the weights
    here = there.new_zeros(len(there), there.shape[1], here_width + per_table * len(plan.dims))
    here[:, 0, :here_width] = initial_values(values["ids"], keys[vocabulary].cpu(), params[vocabulary].cpu())
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
