"""What the ops share: a column is a dense tensor [B, d] or a Ragged, and some ops take a dict of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from recfx.types import Ragged

__all__ = ["Column", "expect_ragged", "of_one_or_many", "on_values"]

Column = TypeVar("Column", bound=Tensor | Ragged)


def on_values(column: Column, function: Callable[[Tensor], Tensor]) -> Column:
    """The column with every value replaced; offsets and weights are shared."""
    if isinstance(column, Ragged):
        return column._replace(values=function(column.values))
    return function(column)  # type: ignore[return-value]


def of_one_or_many(columns: Any, function: Callable[[Mapping[str, Ragged]], dict[str, Any]]) -> Any:
    """`function` of a dict of columns, also for a single one: what is many in one call runs as one kernel."""
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
