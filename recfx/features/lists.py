"""Ops on the lists of a column: select, truncate, flatten, to dense and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from recfx.features.columns import expect_ragged, of_one_or_many
from recfx.kernels.take_lists import take_lists
from recfx.types import Ragged

__all__ = [
    "check_length",
    "flatten",
    "from_dense",
    "select_dense",
    "select_ragged",
    "to_dense",
    "truncate",
    "truncate_lists",
]

Side = Literal["left", "right"]


def select_dense(column: Tensor | Ragged, dim: int = 1, *, fill: float = 0.0) -> Tensor:
    """The first `dim` numbers of each sample, `fill` where there are fewer.

    Shapes:   Ragged f32 or Tensor [B, >= dim] -> f32 [B, dim].
    Example:  >>> select_dense(Ragged(torch.tensor([5.0, 7.0]), torch.tensor([0, 1, 1, 2]).int())).tolist()
              [[5.0], [0.0], [7.0]]
    """
    return column[:, :dim] if isinstance(column, Tensor) else to_dense(column, dim, fill=fill)


def select_ragged(column: Ragged) -> Ragged:
    """The column as it is, for an embedding to read.

    Raises:   TypeError when the column is dense.
    """
    return expect_ragged("column", column)


def to_dense(column: Ragged, width: int, *, fill: float = 0) -> Tensor:
    """Each list's first `width` values, then `fill`: what "tile" does to values.

    Shapes:   Ragged -> [lists, width]; nested lists keep their own level, [lists of the innermost level, width].
    Example:  >>> to_dense(Ragged(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]).int()), 2, fill=-1).tolist()
              [[5, -1], [6, 7]]
    """
    column = expect_ragged("column", column)
    first, last = column.offsets[:-1, None].long(), column.offsets[1:, None]
    place = first + torch.arange(width, device=first.device)
    values = column.values if column.values.numel() else column.values.new_zeros(1)
    value = values[place.clamp(max=values.numel() - 1)]
    return torch.where(place < last, value, fill)


def from_dense(x: Tensor) -> Ragged:
    """A dense column as lists that all have d values: for an embedding to read, or to cross.

    Shapes:   [B, d] -> Ragged of B lists.
    Example:  >>> from_dense(torch.tensor([[5, 6], [7, 8]])).offsets.tolist()
              [0, 2, 4]
    """
    batch_size, dim = x.shape
    return Ragged(x.flatten(), torch.arange(batch_size + 1, dtype=torch.int32, device=x.device) * dim)


def flatten(column: Ragged) -> Ragged:
    """One level less: each sample's lists become one list, in order.

    Raises:   ValueError when there is no outer level.
    """
    column = expect_ragged("column", column)
    if not column.outer:
        raise ValueError("column: got lists nested 1 level, expected 2 at least. There is no level to remove.")
    return column._replace(offsets=column.offsets[column.outer[-1].long()], outer=column.outer[:-1])


def truncate(columns: Ragged | Mapping[str, Ragged], longest: int, *, side: Side) -> Any:
    """Each innermost list cut to `longest` values, weights with them. Shorter lists stay: nothing is padded.

    Args:     columns: a column, or a dict of them, which one kernel cuts together.
              side: "left" drops from the left and keeps the last values, "right" keeps the first.
    Raises:   ValueError when longest is below 0.
    Example:  >>> ids = Ragged(torch.tensor([-7, -1, -2, -3]), torch.tensor([0, 1, 4]).int())
              >>> truncate(ids, 2, side="left").values.tolist()
              [-7, -2, -3, 0]
    """
    _check_count("longest", longest)

    def cut(columns: Mapping[str, Ragged]) -> dict[str, Ragged]:
        parts = {}
        for name, column in columns.items():
            length = expect_ragged(name, column).offsets.diff()
            kept = length.clamp(max=longest)
            first = column.offsets[1:] - kept if side == "left" else column.offsets[:-1]
            capacity = min(column.values.numel(), length.numel() * longest)
            parts[name] = first, kept, capacity
        return _take(columns, parts)

    return of_one_or_many(columns, cut)


def truncate_lists(column: Ragged, count: int, *, side: Side, pad: Side = "right") -> Ragged:
    """Each sample's list of lists cut, or filled up with empty lists, to exactly `count` lists.

    Args:     side: "left" drops lists from the left, "right" from the right.
              pad: where the empty lists go.
    Shapes:   the innermost level gets (lists of the level above) * count lists.
    Raises:   ValueError when there is no outer level, or count is below 1.
    """
    column = expect_ragged("column", column)
    if not column.outer:
        raise ValueError("column: got lists nested 1 level, expected 2 at least. Use truncate.")
    _check_count("count", count, least=1)
    outer = column.outer[-1]
    held = outer.diff()[:, None]
    kept = held.clamp(max=count)
    slot = torch.arange(count, dtype=outer.dtype, device=outer.device)
    nth = slot if pad == "right" else slot - (count - kept)
    source = (outer[1:, None] - kept if side == "left" else outer[:-1, None]) + nth
    is_list = ((nth >= 0) & (nth < kept)).flatten()
    source = torch.where(is_list, source.flatten(), 0).long()
    first, last = (torch.nn.functional.pad(o, (0, 1))[source] for o in (column.offsets[:-1], column.offsets[1:]))
    parts = {"column": (first, torch.where(is_list, last - first, 0), column.values.numel())}
    ends = torch.arange(0, held.numel() * count + 1, count, dtype=outer.dtype, device=outer.device)
    return _take({"column": column}, parts)["column"]._replace(outer=(*column.outer[:-1], ends))


def check_length(column: Ragged, longest: int, name: str = "column") -> Tensor:
    """How many innermost lists are longer than `longest`, i64 []. Report it under `recfx.types.COUNTS`.

    Raises:   ValueError when there is one, in eager code. Inside a capture nothing can raise.
    """
    length = expect_ragged(name, column).offsets.diff()
    count = (length > longest).sum()
    if not _is_captured(count) and int(count):
        raise ValueError(
            f"{name}: got a list of {int(length.max())} values, expected at most {longest}. Truncate it, or raise the "
            "length."
        )
    return count


def _is_captured(t: Tensor) -> bool:
    is_cuda_graph = t.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or type(t) is not Tensor or is_cuda_graph


def _take(columns: Mapping[str, Ragged], parts: Mapping[str, tuple[Tensor, Tensor, int]]) -> dict[str, Ragged]:
    """Each column with list l = values[first[l] : first[l] + length[l]], weights with them, by one kernel."""
    wanted = [(name, t) for name, c in columns.items() for t in (c.values, c.weights) if t is not None]
    out = take_lists(
        [t.contiguous() for _, t in wanted],
        [parts[name][0].contiguous() for name, _ in wanted],
        [parts[name][1].contiguous() for name, _ in wanted],
        [parts[name][2] for name, _ in wanted],
    )
    taken: dict[str, list[Tensor]] = {}
    for (name, _), values, offsets in zip(wanted, out[::2], out[1::2], strict=True):
        taken.setdefault(name, [offsets]).append(values)
    return {
        name: Ragged(values, offsets, weights[0] if weights else None, columns[name].outer)
        for name, (offsets, values, *weights) in taken.items()
    }


def _check_count(name: str, value: int, *, least: int = 0) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}.")
