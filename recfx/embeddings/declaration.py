"""What a user specifies about the embedding of a feature. It contains no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from recfx.checks import check_function, check_int, check_number, check_type, said
from recfx.embeddings.initializers import Initializer, InitializerOf, truncated_normal

__all__ = ["Combiner", "Embedding", "ReadAs", "Tile", "combine", "tile"]


class Tile(NamedTuple):
    """A combiner that keeps a list's first `length` rows side by side, with zeros after the last one."""

    length: int


def tile(length: int) -> Tile:
    """The combiner that keeps a list's first `length` rows separate: [B, length, dim]. Later ids are not looked up.

    Raises:   TypeError when length is not an int, ValueError when it is below 1.
    Example:  >>> Embedding("history", dim=8, combiner=tile(50)).combiner
              Tile(length=50)
    """
    check_int("length", length, 1)
    return Tile(length)


@dataclass(frozen=True, eq=False)
class Combiner:
    """A combiner that a user wrote. Two are equal when they are the same object."""

    function: Callable[..., Any]
    length: int

    def __repr__(self) -> str:
        return f"combine({getattr(self.function, '__name__', said(self.function))}, {self.length})"


def combine(function: Callable[..., Any], length: int) -> Combiner:
    """The combiner that applies `function` to a list's first `length` rows. Ids after them are not looked up.

        def max_pool(rows, is_there):
            largest = rows.masked_fill(~is_there[:, :, None], -torch.inf).amax(dim=1)
            return torch.where(is_there.any(dim=1, keepdim=True), largest, 0.0)

        Embedding("history", dim=8, combiner=combine(max_pool, 50))

    Args:     function: (rows f32 [B, length, dim], is_there bool [B, length]) -> f32 [B, dim], in torch operations that
              a graph can hold and that have gradients. Rows are already multiplied by the ids' weights. Where a list
              has ended, and at an id that is padding, `is_there` is False and the row is zeros. An id without a row has
              its `unknown` value, and is there.
    Cost:     rows of all B x length places are made, as by `tile`: a kernel's sum makes B.
    Raises:   TypeError when it is not a function of two arguments or length is not an int, ValueError when length is
              below 1. When a step is traced: TypeError or ValueError on a result of another kind, dtype or shape.
    Example:  >>> def first(rows, is_there):
              ...     return rows[:, 0]
              >>> combine(first, 3)
              combine(first, 3)
    """
    check_function("function", function, "rows, is_there", "f32 [B, dim]", "It combines the rows of each list.")
    check_int("length", length, 1)
    return Combiner(function, length)


ReadAs = tuple[str, bool, int, bool, int | None]


@dataclass(frozen=True)
class Embedding:
    """One embedding table read through one sparse feature.

    Args:     feature: name of the i64 feature that holds the ids: Ragged, or dense [B, n] for lists of n. A dense
              feature reads every id except `padding_id`.
              dim: width of a weight row.
              shared_name: embeddings of one shared name use one table. Default: a separate table, '<group>/<feature>'.
              combiner: how the rows of a sample's list become one; empty lists give zeros. With w the feature's
              weights, or 1: "sum" is sum(w e), "mean" sum(w e) / sum(w), "sqrtn" sum(w e) / sqrt(sum(w^2)), where a
              divisor of 0 counts as 1; `tile(n)` keeps the first n rows w e separate, as n cells of the group;
              `combine(function, n)` applies a user's function to the first n rows w e. None: the rows w e of whole
              lists, as a `recfx.types.Ragged` with values f32 [P, dim], which `recfx.ragged` has functions for; the
              embedding is then alone in its group. P is the size of the feature's values, with zeros at the end.
              init: distribution of a new row, which depends only on (seed, table name, id, column).
              device: where the table lives; features must be there too.
              lr_scale: factor of the sparse optimiser's learning rate for this table, >= 0.
              weight_decay: of this table, in place of the optimiser's, >= 0.
              frozen: rows are inserted and read, but never updated.
              unknown: the value of an id without a row (never seen, not admitted, or rejected by a full table), in
              training, evaluation and prediction: "zeros", or "initial" for the initial values of its row.
              read_only: this feature only reads rows that others insert (under the same shared_name) or that were
              loaded: it inserts no rows, sends them no gradient, and does not count them as seen.
              trainable: False: this feature inserts and reads rows, which count as seen, but sends them no gradient. A
              row that a step reads only through such features is not updated: no decay, no change of moments. Other
              features of the same shared_name train it. `frozen` does the same for a whole table.
              padding_id: an id that pads lists, such as 0. This feature ignores it: no row, no gradient, and no part in
              a combiner or its divisor. In a tiled list its cell is zeros, and other ids keep their cells. None: no
              id is padding.
    Raises:   ValueError on a dim below 1, an unknown combiner or value of `unknown`, a rate below 0, or a padding_id
              beyond int64.
    Example:  >>> Embedding("item", dim=8, init=truncated_normal(0.01)).combiner
              'sum'
    """

    feature: str
    dim: int = field(kw_only=True)
    shared_name: str | None = field(default=None, kw_only=True)
    combiner: Literal["sum", "mean", "sqrtn"] | Tile | Combiner | None = field(default="sum", kw_only=True)
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
        if self.combiner not in ("sum", "mean", "sqrtn", None) and not isinstance(self.combiner, Tile | Combiner):
            got = repr(self.combiner) if isinstance(self.combiner, str) else said(self.combiner)
            raise ValueError(
                f"feature '{self.feature}': got combiner {got}, expected 'sum', 'mean', 'sqrtn', None or one "
                "of recfx.embeddings: combine(function, n) or tile(n)."
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
        except Exception as error:  # of any function, such as one of torch.nn.init
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
        """Factor of the learning rate, and the weight decay; None: the optimiser's."""
        return (0.0, 0.0) if self.frozen else (self.lr_scale, self.weight_decay)

    @property
    def read_as(self) -> ReadAs:
        """How ids are read: feature, read_only, `Lookup.length`, trainable, and padding_id."""
        length = self.combiner.length if isinstance(self.combiner, Tile | Combiner) else 0
        length = -1 if self.combiner is None else length
        return self.feature, self.read_only, length, self.trainable, self.padding_id

    @property
    def of_table(self) -> tuple:
        """What all embeddings of one table must agree on."""
        return self.dim, self.initializer, self.device, self.rates, self.frozen, self.unknown
