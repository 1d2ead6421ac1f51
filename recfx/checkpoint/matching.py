"""Matches a checkpoint's tables and parameters to a model's by name and shape, before any rows are read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from recfx.checkpoint.contents import dense_tensors
from recfx.checkpoint.files import read_checked
from recfx.checkpoint.folders import STATE, Part, parts_of, read_ranks
from recfx.embeddings import LogicalTable, TablePlan
from recfx.step import Step, TrainState

__all__ = [
    "Held",
    "Move",
    "OpenCheckpoint",
    "check_arguments",
    "check_distinct",
    "check_names",
    "dense_pairs",
    "held",
    "moves_of",
    "world_of",
]


class OpenCheckpoint(NamedTuple):
    """A checkpoint opened for reading: its manifest, and everything but rows."""

    path: Path
    manifest: dict
    small: dict[str, Tensor]

    @staticmethod
    def open(part: Part) -> OpenCheckpoint:
        """The folder of one process or rank.

        Raises:   ValueError naming the file when it is missing, damaged, or of another format.
        """
        path, manifest = part.path, part.manifest()
        return OpenCheckpoint(
            path, manifest, safetensors.torch.load(read_checked(path / STATE, manifest["files"][STATE]))
        )

    @staticmethod
    def open_all(path: str | Path) -> list[OpenCheckpoint]:
        """The folders of all ranks that saved it, by rank. Raises: as `open`."""
        return [OpenCheckpoint.open(part) for part in parts_of(Path(path))]


class Held(NamedTuple):
    """The contents of a checkpoint by name."""

    tables: dict[str, int]  # width of each logical table
    dense: dict[str, torch.Size]  # shape of each dense parameter
    world_size: int = 1  # ranks that saved it together
    streams: int = 1  # of their data, see `recfx.dist`


def held(path: str | Path) -> Held:
    """The tables and dense parameters of a checkpoint, to select those that fit a new model.

    Raises:   ValueError naming the file when it is missing, damaged, or newer than this version.
    Example:  >>> there = held(path)                                                            # doctest: +SKIP
              >>> tables = there.tables.keys() & step.plan.widths.keys()                        # doctest: +SKIP
              >>> dense = [n for n, p in state.params.items() if there.dense.get(n) == p.shape] # doctest: +SKIP
              >>> state, _ = load(path, step, state, tables=tables, dense=dense)                # doctest: +SKIP
    """
    ranks, prefix = read_ranks(Path(path)), "params."
    source = OpenCheckpoint.open(parts_of(Path(path))[0])
    tables = {name: width for table in source.manifest["tables"] for columns in table for name, _, width in columns}
    dense = {n.removeprefix(prefix): t.shape for n, t in source.small.items() if n.startswith(prefix)}
    together = () if ranks is None else (len(ranks["ranks"]), ranks["streams"])
    return Held(tables, dict(sorted(dense.items())), *together)


class Piece(NamedTuple):
    """A vocabulary of a checkpoint's table that is loaded into a vocabulary of the model's table."""

    there: int
    here: int
    columns: tuple[tuple[int, LogicalTable], ...]  # first column there, and the logical table here


@dataclass(frozen=True, kw_only=True)
class Move:
    """Everything that one table of a checkpoint contributes to one table of the model."""

    source: OpenCheckpoint
    table: int
    pieces: tuple[Piece, ...]
    rank: int
    world_size: int

    @functools.cached_property
    def here(self) -> np.ndarray:
        """For each vocabulary there: the vocabulary here, -1: not taken."""
        here = np.full(len(self.source.manifest["tables"][self.table]), -1, np.int32)
        here[[piece.there for piece in self.pieces]] = [piece.here for piece in self.pieces]
        return here

    def columns_there(self, vocabulary: int) -> list[list]:
        """Name, first column and width of its logical tables."""
        return self.source.manifest["tables"][self.table][vocabulary]

    @property
    def keeps_vocabularies(self) -> bool:
        """Whether vocabularies here have the numbers that they have there: they decide which rank owns an id."""
        return all(piece.there == piece.here for piece in self.pieces)

    @property
    def everything(self) -> bool:
        """Whether every row there gets a row here."""
        return self.world_size == 1 and bool((self.here >= 0).all())

    def keeps_layout(self, width: int) -> bool:
        """Whether rows there have the layout of rows here."""
        there = max(first + dim for v in self.source.manifest["tables"][self.table] for _, first, dim in v)
        return there == width and all(
            sum(column.dim for _, column in piece.columns) == width
            and all(first == column.first for first, column in piece.columns)
            for piece in self.pieces
        )


def world_of(step: Step, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The rank that loads, and of how many: as given, or as the step's group has them."""
    group = step.group
    default = (0, 1) if group is None else (group.rank, group.world_size)
    if rank is None and world_size is None:
        return default
    return 0 if rank is None else rank, 1 if world_size is None else world_size


def check_arguments(paths: list[Path], state: TrainState, rank: int, world_size: int) -> None:
    """Raises the errors of `load` about its paths, ranks, and a state that has rows."""
    check_distinct(paths)
    if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank!r} of world_size {world_size!r}, expected ints, 0 <= rank < world_size.")
    num_rows = sum(int(t.num_rows) for t in state.tables)
    if num_rows:
        raise ValueError(f"state: got one with {num_rows} rows, expected a new one. They would be lost. Use step.init.")


def check_distinct(paths: list[Path]) -> None:
    """Raises ValueError when there is no folder, or one occurs twice."""
    if not paths or len({p.resolve() for p in paths}) < len(paths):
        raise ValueError(f"path: got {list(map(str, paths))}, expected one folder or more, each once.")


def check_names(argument: str, got: Collection[str] | None, known: Collection[str]) -> None:
    """Raises: ValueError naming the argument when it holds an unknown name, TypeError when it is a str."""
    if isinstance(got, str):
        raise TypeError(f"{argument}: got the str '{got}', expected a list of names.")
    unknown = sorted(set(got or ()) - set(known))
    if unknown:
        raise ValueError(f"{argument}: got {unknown}, expected some of {sorted(known)}.")


def dense_pairs(
    state: TrainState, source: OpenCheckpoint, taken: Collection[str] | None, names: dict[str, str]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the state, and their new values."""
    check_names("dense", taken, state.params)
    if taken is None or taken:
        _check_optimizer(state, source)
    pairs = []
    for part, param, target in dense_tensors(state):
        if taken is not None and (part == "stats" or (param not in taken if param is not None else not taken)):
            continue
        name = part if param is None else f"{part}.{names.get(param, param)}"
        saved = source.small.get(name)
        if saved is None or saved.shape != target.shape:
            raise ValueError(
                f"{source.path / STATE}: no tensor '{name}' of shape {list(target.shape)}. It is of another model "
                "or optimiser. Name what to take in `dense`, see `held`."
            )
        pairs.append((target, saved))
    return pairs


def _check_optimizer(state: TrainState, source: OpenCheckpoint) -> None:
    """Raises ValueError when the saved dense optimiser kept more state than this one: it would be lost silently."""
    params = [name.removeprefix("params.") for name in source.small if name.startswith("params.")]
    kept = [(part, param) for part, param, _ in dense_tensors(state) if part not in ("params", "stats")]
    known = {part for part, param in kept if param is None}
    known |= {f"{part}.{p}" for part, param in kept if param is not None for p in params}
    more = sorted(name for name in source.small if name.startswith("dense.") and name not in known)
    if more:
        parts = sorted({part for part, _ in kept})
        raise ValueError(
            f"{source.path / STATE}: got an optimiser that keeps '{more[0]}', expected one that keeps {parts} and no "
            "more. Use the optimiser that it was saved with."
        )


def moves_of(
    plan: TablePlan,
    source: OpenCheckpoint,
    taken: Collection[str] | None,
    names: Mapping[str, str],
    world: tuple[int, int],
) -> list[Move]:
    """What a checkpoint contributes to the model's table `plan`, for each table of the checkpoint."""
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
