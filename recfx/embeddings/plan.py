"""The plan of the physical tables for a step's embeddings. It contains no tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from recfx.checks import said
from recfx.embeddings.declaration import Combiner, Embedding, ReadAs, Tile
from recfx.embeddings.initializers import Initializer

__all__ = ["Cell", "LogicalTable", "Lookup", "Plan", "TablePlan", "plan_tables"]


MAX_VOCABULARIES = 65_535  # of a physical table: 16 bits of a slot


class LogicalTable(NamedTuple):
    """A logical table: its columns in a physical row, for one vocabulary, and how they are trained."""

    name: str
    first: int
    dim: int
    init: Initializer
    lr_scale: float = 1.0
    weight_decay: float | None = None  # None: the optimiser's
    unknown: Literal["zeros", "initial"] = "zeros"


class Lookup(NamedTuple):
    """A feature whose ids are looked up in a vocabulary of a physical table."""

    feature: str
    vocabulary: int
    read_only: bool = False
    length: int = 0  # of a list whose rows are kept apart, by `tile` or `combine`; 0: pooled; -1: rows stay lists
    trainable: bool = True
    padding_id: int | None = None

    @property
    def num_cells(self) -> int:
        """Rows [dim] per sample that the lookup returns."""
        return max(self.length, 1)

    @property
    def is_kept(self) -> bool:
        """Whether its rows stay lists, by `combiner=None`. Its cell of a sample is empty then."""
        return self.length < 0


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """A physical table: vocabularies of equal row shape. A row holds its logical tables side by side."""

    device: str
    dims: tuple[int, ...]
    vocabularies: tuple[tuple[LogicalTable, ...], ...]
    lookups: tuple[Lookup, ...]  # the read-only ones come last

    @property
    def width(self) -> int:
        return sum(self.dims)

    @property
    def firsts(self) -> tuple[int, ...]:
        return tuple(sum(self.dims[:k]) for k in range(len(self.dims)))

    @property
    def cell_vocabularies(self) -> tuple[int, ...]:
        """The vocabulary of each cell of a sample: those of the first lookup, of the second, and so on."""
        return tuple(lookup.vocabulary for lookup in self.lookups for _ in range(lookup.num_cells))

    @functools.cached_property
    def first_cells(self) -> tuple[int, ...]:
        """The first cell of each lookup in a sample, then the number of cells."""
        return tuple(itertools.accumulate((lookup.num_cells for lookup in self.lookups), initial=0))

    @property
    def keeps(self) -> bool:
        """Whether the rows of a lookup stay lists."""
        return any(lookup.is_kept for lookup in self.lookups)

    def check_batch(self, num_samples: int, num_ids: int = 0) -> None:
        """Raises ValueError where a batch has more cells, or more ids in all lookups, than 32 bits can number."""
        num_cells = self.first_cells[-1]
        for got, what in ((num_samples * num_cells, "cells"), (num_ids, "ids")):
            if got >= 2**31:
                raise ValueError(
                    f"features '{self.lookups[0].feature}' to '{self.lookups[-1].feature}': got {got} {what} of "
                    f"{num_samples} samples with {num_cells} cells, expected fewer than 2**31 in a batch. They have "
                    "32-bit numbers. Use smaller batches, or shorter tiles."
                )

    def cells_of(self, lookup: int) -> slice:
        """The cells of a lookup in a sample."""
        return slice(*self.first_cells[lookup : lookup + 2])


class Cell(NamedTuple):
    """The place of an embedding in the pooled rows: logical table `column` of table `table`, lookup `lookup`."""

    table: int
    column: int
    lookup: int
    combiner: str | Tile | Combiner | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Physical tables, and for each group of embeddings the cells of its stacked tensor."""

    tables: tuple[TablePlan, ...]
    groups: dict[str, tuple[Cell, ...]]

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the logical tables by name."""
        return {c.name: c.dim for t in self.tables for vocabulary in t.vocabularies for c in vocabulary}

    def learns(self, cell: Cell) -> bool:
        """Whether a gradient of the cell reaches rows: not if its lookup is read-only or not trainable, or its table
        frozen."""
        table = self.tables[cell.table]
        lookup = table.lookups[cell.lookup]
        column = table.vocabularies[lookup.vocabulary][cell.column]
        trains = lookup.trainable and not lookup.read_only
        return trains and (column.lr_scale, column.weight_decay) != (0, 0)


def plan_tables(groups: Mapping[str, Sequence[Embedding]]) -> Plan:
    """Coalesces embeddings into as few physical tables and lookups as possible without changing results.

    Logical tables that are read through the same features share keys: their columns are side by side in one row, and
    one lookup serves them all (embedding and bias of a column). Vocabularies of equal row shape on one device share a
    physical table, which still distinguishes equal ids of different vocabularies.

    Args:     groups: embeddings by group name; a group is one tensor [B, len(group), dim] for the model, where a
              tiled embedding counts as its n cells; or, when dims differ, their concatenation [B, sum of dims]. An
              embedding without a combiner is alone in its group, which is lists of rows.
    Cost:     linear in the embeddings.
    Raises:   ValueError when a group is empty or has more than an embedding without a combiner, one shared name
              has two dims, initialisers, devices, rates or values of `unknown`, a physical table has more than 65 535
              vocabularies, or a sample 2**31 cells of one.
    Example:  >>> plan = plan_tables({"emb": [Embedding("c1", dim=8), Embedding("c2", dim=8)],
              ...                     "bias": [Embedding("c1", dim=1), Embedding("c2", dim=1)]})
              >>> [(t.dims, len(t.vocabularies), len(t.lookups)) for t in plan.tables]
              [((8, 1), 2, 2)]
    """
    _check_groups(groups)
    logical: dict[str, Embedding] = {}
    readers: dict[str, list[ReadAs]] = {}
    for group, embeddings in groups.items():
        for e in embeddings:
            name = _name(group, e)
            known = logical.setdefault(name, e)
            if known.of_table != e.of_table:
                raise ValueError(
                    f"table '{name}': got {e} and {known}, expected one dim, init, device, lr_scale, weight_decay, "
                    "frozen and unknown per name."
                )
            if e.read_as not in readers.setdefault(name, []):
                readers[name].append(e.read_as)

    names_of: dict[tuple[tuple[ReadAs, ...], str], list[str]] = {}
    for name, e in logical.items():
        names_of.setdefault(
            (tuple(sorted(readers[name], key=lambda how: (*how[:-1], *_in_order(how[-1])))), e.device), []
        ).append(name)
    keys_of: dict[tuple[tuple[int, ...], str], list[tuple]] = {}  # of each physical table: its vocabularies
    for key, names in names_of.items():
        keys_of.setdefault((tuple(logical[n].dim for n in names), key[1]), []).append(key)

    features = dict.fromkeys(e.feature for embeddings in groups.values() for e in embeddings)
    feature_order = {feature: i for i, feature in enumerate(features)}
    tables, place = [], {}
    for t, ((dims, device), keys) in enumerate(keys_of.items()):
        lookups = sorted(
            (Lookup(f, v, *rest) for v, (how, _) in enumerate(keys) for f, *rest in how),
            key=lambda l: (
                l.read_only,
                feature_order[l.feature],
                l.vocabulary,
                l.length,
                not l.trainable,
                *_in_order(l.padding_id),
            ),
        )
        names_in = [names_of[key] for key in keys]
        for l, lookup in enumerate(lookups):
            for k, name in enumerate(names_in[lookup.vocabulary]):
                place[name, lookup.feature, *lookup[2:]] = (t, k, l)
        firsts = [sum(dims[:k]) for k in range(len(dims))]
        vocabularies = tuple(
            tuple(
                LogicalTable(name, first, dim, logical[name].initializer, *logical[name].rates, logical[name].unknown)
                for name, first, dim in zip(names, firsts, dims, strict=True)
            )
            for names in names_in
        )
        tables.append(TablePlan(device=device, dims=dims, vocabularies=vocabularies, lookups=tuple(lookups)))
        _check_size(tables[-1])
    cells = {
        group: tuple(Cell(*place[_name(group, e), *e.read_as], e.combiner) for e in embeddings)
        for group, embeddings in groups.items()
    }
    return Plan(tables=tuple(tables), groups=cells)


def _check_groups(groups: Any) -> None:
    """Raises the errors of `plan_tables` about the types and numbers of its arguments."""
    expected = "expected lists of recfx.embeddings.Embedding by group name, such as {'emb': [Embedding('item', dim=8)]}"
    if not isinstance(groups, Mapping):
        raise TypeError(f"embeddings: got {said(groups)}, {expected}. `forward` is given them by group.")
    for group, embeddings in groups.items():
        if not isinstance(embeddings, list | tuple):
            raise TypeError(f"group '{group}': got {said(embeddings)}, {expected}.")
        if not embeddings:
            raise ValueError(f"group '{group}': got no embeddings, expected at least one.")
        for e in embeddings:
            if not isinstance(e, Embedding):
                raise TypeError(f"group '{group}': got {said(e)} among them, {expected}.")
            if e.combiner is None and len(embeddings) > 1:
                raise ValueError(
                    f"group '{group}': got {len(embeddings)} embeddings, expected feature '{e.feature}' alone. With "
                    "combiner=None its rows stay lists, of different lengths. Give it a group that has no other."
                )


def _check_size(plan: TablePlan) -> None:
    """Raises when a table is too large for the 16-bit and 32-bit numbers of the kernels."""
    if len(plan.vocabularies) > MAX_VOCABULARIES:
        raise ValueError(
            f"table '{plan.vocabularies[0][0].name}' and those of its row shape {plan.dims}: got "
            f"{len(plan.vocabularies)} vocabularies, expected at most {MAX_VOCABULARIES} in a physical table. The "
            "index has 16 bits for them. Let features share a table by shared_name, or give some another dim."
        )
    plan.check_batch(1)


def _in_order(padding_id: int | None) -> tuple[bool, int]:
    """A key to sort by, where None comes first."""
    return padding_id is not None, padding_id or 0


def _name(group: str, e: Embedding) -> str:
    return e.shared_name or f"{group}/{e.feature}"
