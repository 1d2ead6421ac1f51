"""A sparse optimiser from a formula in plain torch: no kernel to write, captured like the others, and slower."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.checks import check_function, check_type, said
from recfx.optim.building import Rate, SparseOptimizer, check_ranges, rate_at
from recfx.table import RowLayout, TableState

__all__ = ["sparse_optimizer"]

TAKEN_NAMES = ("id", "weight", "first_step", "last_step", "num_steps")  # columns of `recfx.rows.export_parquet`


class _Rates(NamedTuple):
    """Learning rate and weight decay of one logical table: f64 [], or f32 [U, 1] where tables have separate ones."""

    lr: Tensor
    decay: Tensor
    is_frozen: Tensor | None = None  # bool [U, 1]


class _Formula(NamedTuple):
    """A user's formula and the names of what it keeps."""

    function: Callable[..., Any]
    slots: tuple[str, ...]
    row_slots: tuple[str, ...]

    def one_table(self, old: list[Tensor], g: Tensor, rates: _Rates, t: Tensor) -> list[Tensor]:
        """The new parts of one logical table's rows: (weights, *slots) f32 [U, dim], then row slots f32 [U, 1]."""
        copies = [part.clone() for part in old]  # a formula may write into what it is given; a graph drops the copy
        made = self.function(*copies, g, rates.lr, rates.decay, t)
        new = _checked(made, dict(zip(("w", *self.slots, *self.row_slots), old, strict=True)))
        if rates.is_frozen is None:
            return new
        return [torch.where(rates.is_frozen, before, after) for before, after in zip(old, new, strict=True)]

    def rows(self, rows: Tensor, grads: Tensor, rates: Sequence[_Rates], t: Tensor, dims: Sequence[int]) -> Tensor:
        """New rows. Shapes: rows f32 [U, 1 + slots, W + row slots], grads f32 [U, W]; rates: by logical table."""
        per_weight, per_row = rows.split([sum(dims), rows.shape[2] - sum(dims)], dim=2)
        num, weights, row_values = len(self.row_slots), [], []
        tables = zip(per_weight.split(list(dims), dim=2), grads.split(list(dims), dim=1), rates, strict=True)
        for k, (part, g, of_table) in enumerate(tables):
            own = per_row[:, 0, k * num : (k + 1) * num].split(1, dim=1) if num else ()
            new = self.one_table([*part.unbind(1), *own], g, of_table, t)
            weights.append(torch.stack(new[: part.shape[1]], dim=1))
            row_values += new[part.shape[1] :]
        if not num:
            return torch.cat(weights, dim=2)
        beyond = torch.cat([torch.cat(row_values, dim=1)[:, None], per_row[:, 1:]], dim=1)
        return torch.cat([*weights, beyond], dim=2)


def sparse_optimizer(
    formula: Callable[..., Any],
    lr: Rate,
    *,
    slots: Sequence[str] = (),
    row_slots: Sequence[str] = (),
    weight_decay: float = 0.0,
) -> SparseOptimizer:
    """The optimiser that applies `formula` to the rows a step touched; every other row is left alone.

        def lion(w, m, g, lr, decay, t):
            w = w - lr * ((0.9 * m + 0.1 * g).sign() + decay * w)
            return w, 0.99 * m + 0.01 * g

        train_step(sparse_optimizer=sparse_optimizer(lion, 1e-4, slots=["m"], weight_decay=0.01), ...)

    Args:     formula: (w, *slots, *row_slots, g, lr, decay, t) -> (w, *slots, *row_slots), in torch operations that a
              graph can hold. It is called once for each logical table of a row, so a mean or a norm over dim 1 is of
              one table's weights.
                  w, g and slots: f32 [U, dim], weights, mean gradients after clipping, and what is kept per weight.
                  row_slots: f32 [U, 1], what is kept per row.
                  lr, decay: [] or [U, 1], of the step and the table (`Embedding(lr_scale=, weight_decay=)`).
                  t: f64 [], the number of the step, from 1.
              U is the most rows that a step can touch: the ids of a batch, or `max_unique`. Places after the last row
              in use hold another row and zeros for its gradient; what the formula makes of them is dropped, and so is
              what it makes of rows of a frozen table.
              lr: step size, >= 0: a float, a 0-d tensor, or a function of the steps taken (`recfx.optim.schedules`).
              slots, row_slots: names of what the formula keeps; in a new row it is zeros.
              weight_decay: the `decay` of tables without a separate one, >= 0.
    Slots:    4 W bytes per slot; 4 bytes per row slot and logical table, and as many for each slot.
    Cost:     reads and writes U rows, not only the unique ones, with temporaries of that size; never syncs. See
              docs/extending.md for the ratio to a kernel. With accumulation the formula runs in every micro-batch.
    Raises:   ValueError on a value outside its range or a name that is not one; TypeError when the formula does not
              take these arguments. ValueError when a step is built with accumulation above 1 and without `max_unique`.
              TypeError or ValueError when it is traced and a result is of another kind, dtype or shape.
    Example:  >>> def sgd(w, g, lr, decay, t):
              ...     return w - lr * (g + decay * w)
              >>> sparse_optimizer(sgd, 0.1).slots
              ()
    """
    check_ranges(lr, weight_decay=(weight_decay, 0, math.inf))
    slots, row_slots = _names("slots", slots), _names("row_slots", row_slots)
    kept = ("w", *slots, *row_slots)
    if len(set(kept)) < len(kept):
        raise ValueError(f"slots, row_slots: got {[*kept[1:]]}, expected different names. Checkpoints hold them.")
    advice = "It is called with its arguments by position."
    check_function("formula", formula, ", ".join([*kept, "g", "lr", "decay", "t"]), f"({', '.join(kept)})", advice)
    new_rows = _Formula(formula, slots, row_slots).rows

    def update(rows: Tensor, grads: Tensor, step: Tensor, scale: Tensor) -> Tensor:
        t = (step + 1).double()
        rate = rate_at(lr, t)
        rates = [_Rates(rate, torch.full_like(rate, weight_decay))]
        return new_rows(rows, grads * scale, rates, t, grads.shape[1:])

    def apply_(
        state: TableState, scale: Tensor, due: Tensor, columns: RowLayout | None = None, most_rows: int | None = None
    ) -> TableState:
        dims = state.grads.shape[1:] if columns is None else columns.dims
        num = state.unique_rows.numel() if most_rows is None else min(max(most_rows, 1), state.unique_rows.numel())
        t = (state.step + 1).double()
        in_use, row = _places(state, due, num)
        rates = _rates(rate_at(lr, t), weight_decay, dims, columns, state.vocabularies[row].long())
        old = state.rows[row]
        new = torch.where(in_use[:, None, None], new_rows(old, state.grads[:num] * scale, rates, t, dims), old)
        state.rows[row] = new
        state.rows[row[:1]] = new[:1]  # last: every place that is not in use has just written this row
        state.grads[:num].masked_fill_(due, 0)
        state.num_unique.mul_(~due)
        state.step.add_(due)
        return state

    return SparseOptimizer(slots, row_slots, update, apply_, needs_bound=True)


def _places(state: TableState, due: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Which of `num` places hold a row to update, bool [U], and the row of each place, i64 [U].

    A place that is not in use has the row of the first one: that of a step before, where this step has touched none.
    """
    in_use = due & (torch.arange(num, device=state.num_unique.device) < state.num_unique)
    return in_use, torch.where(in_use, state.unique_rows[:num], state.unique_rows[:1]).long()


def _rates(
    rate: Tensor, weight_decay: float, dims: Sequence[int], columns: RowLayout | None, vocabulary: Tensor
) -> list[_Rates]:
    """By logical table, for the rows of these vocabularies i64 [U]."""
    if columns is None or columns.rates is None:
        return [_Rates(rate, torch.full_like(rate, weight_decay))] * len(dims)
    of_each = [of_table[:, :, 0] for of_table in columns.rates.split(list(dims), dim=2)]  # alike over its columns
    factors, decays = torch.stack(of_each, dim=2).unbind(1)  # f64 [V, logical tables]
    is_frozen = (factors == 0) & (decays == 0)
    decays = torch.where(decays.isnan(), weight_decay, decays)
    by_table = [t[vocabulary].split(1, dim=1) for t in ((rate * factors).float(), decays.float(), is_frozen)]
    return [_Rates(*parts) for parts in zip(*by_table, strict=True)]


def _names(argument: str, names: Any) -> tuple[str, ...]:
    """As a tuple. Raises TypeError when they are not names, ValueError when one cannot be a column of a file."""
    check_type(argument, names, list | tuple, "Write ('m',) for one name.")
    for name in names:
        check_type(argument, name, str, "They are names of what the formula keeps.")
        if not name.isidentifier() or name in (*TAKEN_NAMES, "w"):
            raise ValueError(
                f"{argument}: got {name!r}, expected a name such as 'm'. Checkpoints and exported tables hold it. Use "
                f"letters, digits and _, and another name than w, {', '.join(TAKEN_NAMES)}."
            )
    return tuple(names)


def _checked(made: Any, old: dict[str, Tensor]) -> list[Tensor]:
    """What a formula returned, as a list. Raises TypeError or ValueError unless it is like what it was given."""
    parts = made if isinstance(made, tuple | list) else (made,)
    expected = f"expected ({', '.join(old)})"
    if len(parts) != len(old):
        raise ValueError(
            f"formula: got {said(made)} returned, {expected}. Return the new weights and what it keeps, in this order."
        )
    for (name, before), part in zip(old.items(), parts, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"formula: got {name} {said(part)} returned, {expected} as tensors.")
        if part.dtype != before.dtype or part.shape != before.shape:
            raise ValueError(
                f"formula: got {name} {part.dtype} {list(part.shape)} returned, expected {before.dtype} "
                f"{list(before.shape)}. It replaces what the row holds."
            )
        if part.device != before.device or part.layout != before.layout:
            raise ValueError(
                f"formula: got {name} {part.layout} on {part.device} returned, expected {before.layout} on "
                f"{before.device}. It replaces what the row holds."
            )
    return list(parts)
