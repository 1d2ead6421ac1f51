"""Helpers of the ops: a column is a dense tensor [B, d] or a Ragged; a dict of columns is computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from recfx.kernels.lists.check_columns import check_columns, check_forms
from recfx.kernels.lists.join import join, split
from recfx.types import Ragged

__all__ = ["ColumnT", "can_be_read", "expect_ragged", "join_and_split", "of_one_or_many", "on_values"]

ColumnT = TypeVar("ColumnT", bound=Tensor | Ragged | Mapping[str, Any])


def on_values(columns: ColumnT, function: Callable[[Tensor], Tensor]) -> ColumnT:
    """The column with `function` applied to its values; offsets and weights are shared. A dict takes one call."""

    def replace(columns: Mapping[str, Any]) -> dict[str, Any]:
        values = [c.values if isinstance(c, Ragged) else c for c in columns.values()]
        done = zip(columns.items(), join_and_split(values, function), strict=True)
        return {name: c._replace(values=v) if isinstance(c, Ragged) else v for (name, c), v in done}

    return of_one_or_many(columns, replace)


def join_and_split(parts: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """An elementwise function of each part, computed by one call on all parts end to end.

    Raises:   TypeError when they differ in dtype.
    """
    if len(parts) < 2:
        return [function(part) for part in parts]
    if len({part.dtype for part in parts}) > 1:
        raise TypeError(f"columns: got {sorted({str(part.dtype) for part in parts})}, expected one dtype in a dict.")
    return split(function(join([part.contiguous() for part in parts])), parts)


def can_be_read(t: Tensor) -> bool:
    """Whether the host may read its values: not while a graph is traced."""
    is_cuda_graph = t.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or type(t) is not Tensor or is_cuda_graph)


def of_one_or_many(columns: Any, function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """`function` of a dict of columns, or of a single column as a dict of one."""
    return function(columns) if isinstance(columns, Mapping) else function({"column": columns})["column"]


def expect_ragged(name: str, column: Any, *, depth: int | None = None) -> Ragged:
    """The column, checked as kernels require.

    Raises:   TypeError when the column is not a Ragged, ValueError when its lists are not nested `depth` levels; and
              the errors of `recfx.types.pack` for a column that was made by hand. Inside a capture, and on a GPU, only
              dtypes and shapes are checked here: kernels check the offsets, or read nothing outside the values.
    """
    if not isinstance(column, Ragged):
        raise TypeError(f"{name}: got {type(column).__name__}, expected Ragged. Declare it varlen in the reader.")
    parts = {(name, part): t for part, t in column.parts.items()}
    if can_be_read(column.values) and column.offsets.device.type == "cpu":
        check_columns(parts)
    else:
        check_forms({key: (t.dtype, tuple(t.shape)) for key, t in parts.items()})
    if depth is not None and len(column.outer) + 1 != depth:
        raise ValueError(
            f"{name}: got lists nested {len(column.outer) + 1} levels, expected {depth}. Flatten or truncate it first."
        )
    return column
