"""Checks of a reader's arguments, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow.compute as pc
import torch
from pyarrow import parquet as pq
from torch import Tensor

from recfx.checks import check_choice, check_function, check_int, check_type
from recfx.data.columns import Column
from recfx.types import NUM_SAMPLES, Ragged

__all__ = [
    "Filter",
    "check_columns",
    "check_reading",
    "check_transform",
    "check_transformed",
    "expression_of",
]

Filter: TypeAlias = "pc.Expression | list[tuple] | list[list[tuple]]"


def _check_numbers(arguments: Mapping[str, int], least: int) -> None:
    """Raises when one is not an int, or below the least."""
    for name, value in arguments.items():
        check_int(name, value, least)


def check_reading(
    columns: Sequence[Column],
    *,
    batch_size: int,
    epochs: int | None,
    seed: int,
    threads: int,
    prefetch: int,
    on_bad: str,
    pin_memory: bool,
) -> None:
    """Raises when an argument that `reader` and `from_arrays` share is out of range."""
    _check_numbers({"batch_size": batch_size, "epochs": 1 if epochs is None else epochs, "threads": threads}, 1)
    _check_numbers({"seed": seed, "prefetch": prefetch}, 0)
    check_choice("on_bad", on_bad, ("raise", "skip"))
    if pin_memory and not torch.cuda.is_available():
        raise ValueError("pin_memory: got True, expected False. torch finds no CUDA device here.")
    check_columns(columns)


def check_columns(columns: Sequence[Column]) -> None:
    """Raises when they are not columns, when there is none, or when two have one name."""
    if isinstance(columns, Column):
        raise TypeError(f"columns: got {columns!r}, expected a list of columns. Put it into a list.")
    check_type("columns", columns, list | tuple, "They are read more than once.")
    for column in columns:
        if not isinstance(column, Column):
            raise TypeError(f"columns: got {column!r} among them, expected fixedlen, varlen or hashed columns.")
    names = [column.name for column in columns]
    if not names or len(set(names)) < len(names) or NUM_SAMPLES in names:
        raise ValueError(f"columns: got {names}, expected distinct names, at least one, and not '{NUM_SAMPLES}'.")


def expression_of(filter: Filter | None) -> pc.Expression | None:
    """The filter as an expression of pyarrow.

    Raises:   ValueError when it is neither an expression nor a list of conditions.
    """
    if filter is None or isinstance(filter, pc.Expression):
        return filter
    try:
        return pq.filters_to_expression(filter)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"filter: got {filter!r} ({error}), expected an expression of pyarrow.dataset, or a list such as "
            "[('clicks', '>', 0)]."
        ) from error


def check_transform(transform: Callable[..., Any] | None) -> None:
    """Raises TypeError when it is not a function of one argument."""
    if transform is not None:
        check_function("transform", transform, "columns", "dict of tensors by column name")


def check_transformed(columns: Any, batch_size: int) -> None:
    """Raises when a transform returned something other than a dict, or another number of samples than it was given."""
    if not isinstance(columns, dict):
        raise TypeError(f"transform: got {type(columns).__name__}, expected a dict of tensors by column name.")
    for name, column in columns.items():
        if name != NUM_SAMPLES and isinstance(column, Tensor | Ragged):
            size = column.num_samples if isinstance(column, Ragged) else len(column)
            if size != batch_size:
                raise ValueError(
                    f"transform: got {size} samples in '{name}', expected {batch_size}, as many as it was given. "
                    "`num_samples` is the number of real ones. To leave rows out, use `filter`."
                )
