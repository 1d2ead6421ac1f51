"""What a user says about embeddings, and the plan of physical tables that follows from it. No tensors here."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from recfx.checks import check_number, check_type, said

__all__ = [
    "Embedding",
    "Initializer",
    "Lookup",
    "Plan",
    "TablePlan",
    "Tile",
    "constant",
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "plan_tables",
    "tile",
    "truncated_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
]


MAX_VOCABULARIES = 65_535  # of a physical table: 16 bits of a slot


class Initializer(NamedTuple):
    """Distribution of a new weight: loc + scale * q(x), x uniform in (-1, 1).

    cover 0: q is the identity; otherwise the quantile function of the normal's central share `cover`.
    """

    loc: float
    scale: float
    cover: float


def constant(value: float) -> Initializer:
    """Every new weight is `value`."""
    return Initializer(value, 0.0, 0.0)


def uniform(low: float, high: float) -> Initializer:
    """Uniform in (low, high).

    Raises:   ValueError when high is below low.
    Example:  >>> uniform(-0.5, 0.5)
              Initializer(loc=0.0, scale=0.5, cover=0.0)
    """
    if not low <= high:
        raise ValueError(f"high: got {high}, expected at least low, which is {low}.")
    return Initializer((low + high) / 2, (high - low) / 2, 0.0)


def normal(std: float, mean: float = 0.0) -> Initializer:
    """Normal with the given standard deviation and mean.

    Raises:   ValueError when std is below 0.
    """
    if not std >= 0:
        raise ValueError(f"std: got {std}, expected >= 0.")
    return Initializer(mean, std, 1.0)


def truncated_normal(std: float, mean: float = 0.0, bound: float = 2.0) -> Initializer:
    """Normal cut at `bound` standard deviations on both sides, by inversion: no weight lies outside.

    Differs:  from torch.nn.init.trunc_normal_, whose bounds are absolute: 2 there is 2000 of these at std 0.001.
    Raises:   ValueError when std is below 0 or bound is not above 0.
    Example:  >>> truncated_normal(0.001).scale
              0.001
    """
    if not std >= 0:
        raise ValueError(f"std: got {std}, expected >= 0.")
    if not bound > 0:
        raise ValueError(f"bound: got {bound}, expected > 0. It is the number of standard deviations that are kept.")
    return Initializer(mean, std, math.erf(bound / math.sqrt(2)))


InitializerOf = Callable[[int], Initializer]  # dim -> Initializer


def xavier_uniform(gain: float = 1.0) -> InitializerOf:
    """torch.nn.init.xavier_uniform_ of a row [1, dim]: uniform in +-gain sqrt(6 / (dim + 1)).

    Example:  >>> Embedding("item", dim=5, init=xavier_uniform()).initializer.scale
              1.0
    """
    return lambda dim: uniform(-gain * math.sqrt(6 / (dim + 1)), gain * math.sqrt(6 / (dim + 1)))


def xavier_normal(gain: float = 1.0) -> InitializerOf:
    """torch.nn.init.xavier_normal_ of a row [1, dim]: normal, standard deviation gain sqrt(2 / (dim + 1))."""
    return lambda dim: normal(gain * math.sqrt(2 / (dim + 1)))


def kaiming_uniform(gain: float = math.sqrt(2)) -> InitializerOf:
    """torch.nn.init.kaiming_uniform_ of a row [1, dim]: uniform in +-gain sqrt(3 / dim). The default gain is ReLU's."""
    return lambda dim: uniform(-gain * math.sqrt(3 / dim), gain * math.sqrt(3 / dim))


def kaiming_normal(gain: float = math.sqrt(2)) -> InitializerOf:
    """torch.nn.init.kaiming_normal_ of a row [1, dim]: normal, standard deviation gain / sqrt(dim)."""
    return lambda dim: normal(gain / math.sqrt(dim))


class Tile(NamedTuple):
    """Combines nothing: a list's first `length` rows side by side, zeros behind the last one."""

    length: int


def tile(length: int) -> Tile:
    """The combiner that keeps a list's first `length` rows apart: [B, length, dim]. Ids behind them are not looked up.

    Raises:   ValueError when length is below 1.
    Example:  >>> Embedding("history", dim=8, combiner=tile(50)).combiner
              Tile(length=50)
    """
    if length < 1:
        raise ValueError(f"length: got {length}, expected at least 1.")
    return Tile(length)


ReadAs = tuple[str, bool, int, bool, int | None]


@dataclass(frozen=True)
class Embedding:
    """One embedding table read through one sparse feature.

    Args:     feature: name of the i64 feature that holds the ids: Ragged, or dense [B, n] for lists of n. Every id of
              a dense feature counts but `padding_id`.
              dim: width of a weight row.
              shared_name: tables of one name are one table. Default: '<group>/<feature>', a table of its own.
              combiner: how the rows of a sample's list become one; empty lists give zeros. With w the feature's
              weights, or 1: "sum" is sum(w e), "mean" sum(w e) / sum(w), "sqrtn" sum(w e) / sqrt(sum(w^2)), where a
              divisor of 0 counts as 1; `tile(n)` keeps the first n rows w e apart, as n cells of the group.
              init: distribution of a new row, a function of (seed, table name, id, column) alone.
              device: where the table lives; features must be there too.
              lr_scale: factor of the sparse optimiser's learning rate for this table, >= 0.
              weight_decay: of this table in place of the optimiser's, >= 0.
              frozen: rows are inserted and read, but never updated.
              unknown: the value of an id without a row (never seen, not admitted, or refused by a full table), in
              training, evaluation and prediction alike: "zeros", or "initial" for what its row would start with.
              read_only: this feature reads rows that others insert (under the same shared_name) or that were loaded:
              nothing is inserted, no gradient reaches the rows, and none counts as seen.
              trainable: if not, this feature inserts rows and reads them, and they count as seen, but no gradient
              reaches them through it. A row that a step reads through such features alone is not updated: no decay, no
              moment moves. Other features of the same shared_name train it. `frozen` is that for a whole table.
              padding_id: an id that fills lists up, such as 0. This feature reads a list as if it did not hold it: no
              row, no gradient, and no part in a combiner or its divisor. A tiled list keeps its places: a cell of
              padding is zeros. None: every id counts.
    Raises:   ValueError on a dim below 1, an unknown combiner or word for `unknown`, a rate below 0, or a padding_id
              beyond int64.
    Example:  >>> Embedding("item", dim=8, init=uniform(-0.1, 0.1)).combiner
              'sum'
    """

    feature: str
    dim: int = field(kw_only=True)
    shared_name: str | None = field(default=None, kw_only=True)
    combiner: Literal["sum", "mean", "sqrtn"] | Tile = field(default="sum", kw_only=True)
    init: Initializer | InitializerOf = field(default=truncated_normal(0.001), kw_only=True)
    device: str = field(default="cpu", kw_only=True)
    lr_scale: float = field(default=1.0, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)
    frozen: bool = field(default=False, kw_only=True)
    unknown: Literal["zeros", "initial"] = field(default="zeros", kw_only=True)
    read_only: bool = field(default=False, kw_only=True)
    trainable: bool = field(default=True, kw_only=True)
    padding_id: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_type("feature", self.feature, str, "It is the name of a feature.")
        if type(self.dim) is not int:
            raise TypeError(f"feature '{self.feature}': got dim {said(self.dim)}, expected an int. It is a width.")
        if self.dim < 1:
            raise ValueError(f"feature '{self.feature}': got dim {self.dim}, expected at least 1.")
        if self.combiner not in ("sum", "mean", "sqrtn") and not isinstance(self.combiner, Tile):
            raise ValueError(
                f"feature '{self.feature}': got combiner '{self.combiner}', expected 'sum', 'mean', 'sqrtn' or tile(n)."
            )
        if self.unknown not in ("zeros", "initial"):
            raise ValueError(
                f"feature '{self.feature}': got unknown {self.unknown!r}, expected 'zeros' or 'initial'. It is the "
                "value of an id without a row."
            )
        for name, value in (("lr_scale", self.lr_scale), ("weight_decay", self.weight_decay)):
            if value is None and name == "weight_decay":
                continue
            check_number(f"feature '{self.feature}', {name}", value)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"feature '{self.feature}': got {name} {value}, expected 0 <= {name} < inf.")
        self._check_padding()
        self._check_init()

    def _check_padding(self) -> None:
        if self.padding_id is None:
            return
        if type(self.padding_id) is not int:
            raise TypeError(f"feature '{self.feature}': got padding_id {said(self.padding_id)}, expected an int.")
        if not -(2**63) <= self.padding_id < 2**63:
            raise ValueError(
                f"feature '{self.feature}': got padding_id {self.padding_id}, expected -2**63 to 2**63 - 1. Ids are "
                "int64: subtract 2**64 from larger ones."
            )

    def _check_init(self) -> None:
        try:
            made: Any = self.initializer
        except Exception as error:  # of whatever was given, as a function of torch.nn.init
            made = error
        if not isinstance(made, Initializer):
            raise TypeError(
                f"feature '{self.feature}': got init {said(self.init)}, expected recfx.embeddings.Initializer, or a "
                "function of dim that returns one. Rows are drawn by id. Use one such as normal(0.01)."
            )

    @property
    def initializer(self) -> Initializer:
        """`init` for this width."""
        return self.init if isinstance(self.init, Initializer) else self.init(self.dim)

    @property
    def rates(self) -> tuple[float, float | None]:
        """Factor of the learning rate, and weight decay or None for the optimiser's."""
        return (0.0, 0.0) if self.frozen else (self.lr_scale, self.weight_decay)

    @property
    def read_as(self) -> ReadAs:
        """How its ids are read: feature, read only, how many of a list's ids, 0 for all, trainable, and padding."""
        length = self.combiner.length if isinstance(self.combiner, Tile) else 0
        return self.feature, self.read_only, length, self.trainable, self.padding_id

    @property
    def of_table(self) -> tuple:
        """What all that read one table must agree on."""
        return self.dim, self.initializer, self.device, self.rates, self.frozen, self.unknown


class Column(NamedTuple):
    """A logical table's place in a physical row, for one vocabulary."""

    name: str
    first: int
    dim: int
    init: Initializer
    lr_scale: float = 1.0
    weight_decay: float | None = None  # the optimiser's
    unknown: Literal["zeros", "initial"] = "zeros"


class Lookup(NamedTuple):
    """A feature read in a vocabulary of a physical table."""

    feature: str
    vocabulary: int
    read_only: bool = False
    length: int = 0  # of a tiled list; 0: lists are pooled
    trainable: bool = True
    padding_id: int | None = None

    @property
    def num_cells(self) -> int:
        """Rows [dim] that come out of it per sample."""
        return max(self.length, 1)


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """A physical table: vocabularies of equal row shape, whose rows hold their logical tables side by side."""

    device: str
    dims: tuple[int, ...]
    vocabularies: tuple[tuple[Column, ...], ...]
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
        """The first cell of each lookup in a sample; then how many there are."""
        return tuple(itertools.accumulate((lookup.num_cells for lookup in self.lookups), initial=0))

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
        """Which cells of a sample are the lookup's."""
        return slice(*self.first_cells[lookup : lookup + 2])


class Cell(NamedTuple):
    """Where an embedding comes out of the pooled blocks: block `column` of table `table`, lookup `lookup`."""

    table: int
    column: int
    lookup: int
    combiner: str | Tile


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Physical tables, and for each group of embeddings the cells that its stacked tensor is made of."""

    tables: tuple[TablePlan, ...]
    groups: dict[str, tuple[Cell, ...]]

    @property
    def widths(self) -> dict[str, int]:
        """Of the logical tables, by name."""
        return {c.name: c.dim for t in self.tables for vocabulary in t.vocabularies for c in vocabulary}

    def learns(self, cell: Cell) -> bool:
        """Whether a gradient of the cell reaches rows: not through a lookup that is read-only or not trainable, nor
        those of a frozen table."""
        table = self.tables[cell.table]
        lookup = table.lookups[cell.lookup]
        column = table.vocabularies[lookup.vocabulary][cell.column]
        trains = lookup.trainable and not lookup.read_only
        return trains and (column.lr_scale, column.weight_decay) != (0, 0)


def plan_tables(groups: Mapping[str, Sequence[Embedding]]) -> Plan:
    """Coalesces embeddings into as few physical tables and as few lookups as exactness allows.

    Logical tables read through the same features share keys: their columns lie side by side in one row and one lookup
    serves them all (embedding and bias of a column). Vocabularies of equal row shape on one device share a physical
    table, where an id is still told apart from the same id of another vocabulary.

    Args:     groups: embeddings by group name; a group reaches the model as one tensor [B, len(group), dim], where a
              tiled embedding counts as its n cells; or, where dims differ, as their concatenation [B, sum of dims].
    Cost:     linear in the embeddings.
    Raises:   ValueError when a group is empty, one shared name is given two dims, initialisers, devices, rates or
              words for `unknown`, a physical table has more than 65 535 vocabularies, or a sample 2**31 cells of one.
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
                Column(name, first, dim, logical[name].initializer, *logical[name].rates, logical[name].unknown)
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
    """Raises what `plan_tables` raises about the kind and number of what it is given."""
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


def _check_size(plan: TablePlan) -> None:
    """What the kernels number with 16 and with 32 bits."""
    if len(plan.vocabularies) > MAX_VOCABULARIES:
        raise ValueError(
            f"table '{plan.vocabularies[0][0].name}' and those of its row shape {plan.dims}: got "
            f"{len(plan.vocabularies)} vocabularies, expected at most {MAX_VOCABULARIES} in a physical table. The "
            "index has 16 bits for them. Let features share a table by shared_name, or give some another dim."
        )
    plan.check_batch(1)


def _in_order(padding_id: int | None) -> tuple[bool, int]:
    """To sort by: None, which is not a number, comes first."""
    return padding_id is not None, padding_id or 0


def _name(group: str, e: Embedding) -> str:
    return e.shared_name or f"{group}/{e.feature}"


def column_key(seed: int, name: str, column: int) -> int:
    """Signed 64-bit key of one column of a logical table: the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/{name}/{column}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
