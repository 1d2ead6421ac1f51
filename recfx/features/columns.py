"""What the ops share: a column is a dense tensor [B, d] or a Ragged, and a dict of columns is computed in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from recfx.kernels.join import join, split
from recfx.types import Ragged

__all__ = ["Column", "expect_ragged", "join_and_split", "of_one_or_many", "on_values"]

Column = TypeVar("Column", bound=Tensor | Ragged | Mapping[str, Any])


def on_values(columns: Column, function: Callable[[Tensor], Tensor]) -> Column:
    """The column with every value replaced; offsets and weights are shared. Of a dict, all columns by one call."""

    def replace(columns: Mapping[str, Any]) -> dict[str, Any]:
        values = [c.values if isinstance(c, Ragged) else c for c in columns.values()]
        done = zip(columns.items(), join_and_split(values, function), strict=True)
        return {name: c._replace(values=v) if isinstance(c, Ragged) else v for (name, c), v in done}

    return of_one_or_many(columns, replace)


def join_and_split(parts: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """An elementwise function of each part; of several, one call on all of them end to end.

    Raises:   TypeError when they differ in dtype.
    """
    if len(parts) < 2:
        return [function(part) for part in parts]
    if len({part.dtype for part in parts}) > 1:
        raise TypeError(f"columns: got {sorted({str(part.dtype) for part in parts})}, expected one dtype in a dict.")
    return split(function(join([part.contiguous() for part in parts])), parts)


def of_one_or_many(columns: Any, function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """`function` of a dict of columns; of a single one, as a dict of one."""
    return function(columns) if isinstance(columns, Mapping) else function({"column": columns})["column"]


def expect_ragged(name: str, column: Any, *, depth: int | None = None) -> Ragged:
    """Raises TypeError when the column is no Ragged, ValueError when its lists are not nested `depth` levels."""
    if not isinstance(column, Ragged):
        raise TypeError(f"{name}: got {type(column).__name__}, expected Ragged. Declare it varlen in the reader.")
    if depth is not None and len(column.outer) + 1 != depth:
        raise ValueError(
            f"{name}: got lists nested {len(column.outer) + 1} levels, expected {depth}. Flatten or truncate it first."
        )
    return column
