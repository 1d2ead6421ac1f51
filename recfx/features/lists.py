"""Ops on the lists of a column: select, truncate, flatten, to dense and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from recfx.features.columns import can_be_read, expect_ragged, join_and_split, of_one_or_many
from recfx.kernels.lists.select_lists import select_lists
from recfx.kernels.lists.take_lists import take_lists
from recfx.types import Ragged

__all__ = [
    "check_length",
    "flatten",
    "from_dense",
    "select_dense",
    "select_ragged",
    "split_dense",
    "to_dense",
    "truncate",
    "truncate_lists",
]

Side = Literal["left", "right"]


def select_dense(column: Tensor | Ragged | list[Ragged], dim: int = 1, *, fill: float = 0.0) -> Tensor:
    """The first `dim` numbers of each sample, `fill` where it has fewer. A list of columns is put side by side.

    Shapes:   Ragged f32 or Tensor [B, >= dim] -> f32 [B, dim]; a list of Ragged f32 -> f32 [B, columns * dim].
    Raises:   TypeError when a column of a list is not a Ragged f32, ValueError when they differ in samples.
    Example:  >>> x = Ragged(torch.tensor([5.0, 7.0]), torch.tensor([0, 1, 1, 2]).int())
              >>> select_dense(x).tolist(), select_dense([x, x], fill=-1.0).tolist()
              ([[5.0], [0.0], [7.0]], [[5.0, 5.0], [-1.0, -1.0], [7.0, 7.0]])
    """
    if isinstance(column, Tensor):
        return column[:, :dim]
    if isinstance(column, Ragged):
        return to_dense(column, dim, fill=fill)
    for c in column:
        if expect_ragged("column", c, depth=1).values.dtype != torch.float32:
            raise TypeError(f"column: got {c.values.dtype} values, expected torch.float32 in a list of columns.")
        if c.num_samples != column[0].num_samples:
            raise ValueError(f"column: got {c.num_samples} samples, expected {column[0].num_samples}, as in the first.")
    return select_lists([c.values.contiguous() for c in column], [c.offsets.contiguous() for c in column], dim, fill)


def select_ragged(column: Ragged) -> Ragged:
    """The column unchanged, for an embedding to read.

    Raises:   TypeError when the column is dense.
    """
    return expect_ragged("column", column)


def to_dense(column: Ragged, width: int, *, fill: float = 0) -> Tensor:
    """Each list's first `width` values, then `fill`: the values that `tile` reads.

    Shapes:   Ragged -> [lists, width]; for nested lists [lists of the innermost level, width].
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
    """A dense column as lists of d values each: for an embedding to read, or for `cross`.

    Shapes:   [B, d] -> Ragged of B lists.
    Raises:   TypeError when x is not a tensor [B, d], ValueError when it has 2**31 numbers or more: offsets are
              i32.
    Example:  >>> from_dense(torch.tensor([[5, 6], [7, 8]])).offsets.tolist()
              [0, 2, 4]
    """
    batch_size, dim = _matrix(x)
    if batch_size * dim >= 2**31:
        raise ValueError(f"x: got {list(x.shape)}, expected fewer than 2**31 numbers. Offsets are 32-bit.")
    return Ragged(x.flatten(), torch.arange(batch_size + 1, dtype=torch.int32, device=x.device) * dim)


def split_dense(x: Tensor, names: Sequence[str]) -> dict[str, Ragged]:
    """ColumnT k of a matrix as the feature names[k] with one value per sample: the inverse of select_dense of a list.

    Shapes:   [B, columns] -> Ragged of B lists of length 1, for each name.
    Raises:   TypeError when x is not a tensor [B, d], ValueError when its columns are not as many as the names.
    Example:  >>> columns = split_dense(torch.tensor([[5, 6], [7, 8]]), ["a", "b"])
              >>> columns["a"].values.tolist(), columns["b"].values.tolist()
              ([5, 7], [6, 8])
    """
    if _matrix(x)[1] != len(names):
        raise ValueError(f"x: got {x.shape[1]} columns, expected {len(names)}, one per name.")
    offsets = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    return {name: Ragged(column, offsets) for name, column in zip(names, x.T.contiguous().unbind(), strict=True)}


def flatten(column: Ragged) -> Ragged:
    """One level less: each sample's lists become one list, in order.

    Raises:   ValueError when the lists are not nested.
    """
    column = expect_ragged("column", column)
    if not column.outer:
        raise ValueError("column: got lists nested 1 level, expected at least 2. There is no level to remove.")
    return column._replace(offsets=column.offsets[column.outer[-1].long()], outer=column.outer[:-1])


def truncate(columns: Ragged | Mapping[str, Ragged], longest: int, *, side: Side) -> Any:
    """Each innermost list cut to `longest` values and their weights. Shorter lists are not padded.

    Args:     columns: a column, or a dict of columns, cut by one kernel.
              side: "left" drops values from the left and keeps the last ones, "right" keeps the first ones.
    Raises:   ValueError when longest is below 0.
    Example:  >>> ids = Ragged(torch.tensor([-7, -1, -2, -3]), torch.tensor([0, 1, 4]).int())
              >>> truncate(ids, 2, side="left").values.tolist()
              [-7, -2, -3, 0]
    """
    _check_count("longest", longest)

    def length(offsets: Tensor) -> Tensor:  # one more item than lists: ends of several columns may be joined
        return F.pad(offsets.diff(), (0, 1)).clamp(max=longest)

    def cut(columns: Mapping[str, Ragged]) -> dict[str, Ragged]:
        offsets = [expect_ragged(name, column).offsets for name, column in columns.items()]
        kept = join_and_split(offsets, length)
        first = offsets if side == "right" else join_and_split(offsets, lambda o: F.pad(o[1:], (0, 1)) - length(o))
        capacity = [min(c.values.numel(), (c.offsets.numel() - 1) * longest) for c in columns.values()]
        parts = ((f[:-1], k[:-1], size) for f, k, size in zip(first, kept, capacity, strict=True))
        return _take(columns, dict(zip(columns, parts, strict=True)))

    return of_one_or_many(columns, cut)


def truncate_lists(column: Ragged, count: int, *, side: Side, pad: Side = "right") -> Ragged:
    """Each sample's list of lists cut, or padded with empty lists, to exactly `count` lists.

    Args:     side: "left" drops lists from the left, "right" from the right.
              pad: where the empty lists go.
    Shapes:   the innermost level gets (lists of the level above) * count lists.
    Raises:   ValueError when the lists are not nested, count is below 1, or the result has 2**31 lists or more.
    """
    column = expect_ragged("column", column)
    if not column.outer:
        raise ValueError("column: got lists nested 1 level, expected at least 2. Use truncate.")
    _check_count("count", count, least=1)
    outer = column.outer[-1]
    if (outer.numel() - 1) * count >= 2**31:
        raise ValueError(f"count: got {count} of {outer.numel() - 1} lists, expected fewer than 2**31 in all.")
    held = outer.diff()[:, None]
    kept = held.clamp(max=count)
    slot = torch.arange(count, dtype=outer.dtype, device=outer.device)
    nth = slot if pad == "right" else slot - (count - kept)
    source = (outer[1:, None] - kept if side == "left" else outer[:-1, None]) + nth
    is_list = ((nth >= 0) & (nth < kept)).flatten()
    source = torch.where(is_list, source.flatten(), 0).long()
    first, last = (F.pad(o, (0, 1))[source] for o in (column.offsets[:-1], column.offsets[1:]))
    parts = {"column": (first, torch.where(is_list, last - first, 0), column.values.numel())}
    ends = torch.arange(0, held.numel() * count + 1, count, dtype=outer.dtype, device=outer.device)
    return _take({"column": column}, parts)["column"]._replace(outer=(*column.outer[:-1], ends))


def check_length(column: Ragged, longest: int, name: str = "column", *, level: int = 0) -> Tensor:
    """The number of lists of one level that are longer than `longest`, i64 []. Report it under `recfx.types.COUNTS`.

    Args:     column: lists nested to any depth.
              longest: of a list, in items: values of an innermost list, lists of any other.
              name: of the column, for the error.
              level: of the lists. 0: those of samples, which RecIS checks; -1: the innermost, which `truncate` cuts.
              Both are the same when lists are not nested.
    Raises:   ValueError when there is one, in eager code only: inside a capture nothing can raise. TypeError when the
              column is not a Ragged, ValueError when it has no such level or longest is below 0.
    Example:  >>> x = Ragged(torch.arange(4), torch.tensor([0, 1, 4]).int(), None, (torch.tensor([0, 2]).int(),))
              >>> int(check_length(x, 2)), int(check_length(x, 3, level=-1))  # one sample of 2 lists, of 1 and 3 values
              (0, 0)
    """
    _check_count("longest", longest)
    column = expect_ragged(name, column)
    levels = (*column.outer, column.offsets)
    if not -len(levels) <= level < len(levels):
        raise ValueError(
            f"level: got {level}, expected {-len(levels)} to {len(levels) - 1}. Lists of '{name}' are nested "
            f"{len(levels)} level{'s' * (len(levels) > 1)}."
        )
    length = levels[level].diff()
    too_long = length > longest
    count = too_long.sum()
    if can_be_read(count) and int(count):
        first = int(too_long.int().argmax())
        items = "values" if level in (-1, len(levels) - 1) else "lists"
        where = "sample" if level in (0, -len(levels)) else "list"
        raise ValueError(
            f"{name}: got a list of {int(length[first])} {items}, expected at most {longest}. Truncate it, or raise "
            f"the length; the first is {where} {first}."
        )
    return count


def _take(columns: Mapping[str, Ragged], parts: Mapping[str, tuple[Tensor, Tensor, int]]) -> dict[str, Ragged]:
    """Each column with list l = values[first[l] : first[l] + length[l]], with its weights, by one kernel."""
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


def _matrix(x: Any) -> tuple[int, int]:
    """The shape of a matrix. Raises TypeError when it is not a tensor [B, d]."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, expected Tensor [B, d].")
    return x.shape[0], x.shape[1]


def _check_count(name: str, value: int, *, least: int = 0) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}.")
