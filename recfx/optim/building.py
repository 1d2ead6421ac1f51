"""What optimisers are, and what all have in common: slots, the scalars of a step, the walk over its rows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recfx.checks import check_number, check_type, said
from recfx.kernels.rows.optimizer_rows import RowOptimizer, updated_rows
from recfx.table import Occurrences, RowLayout, TableState
from recfx.types import Params

__all__ = [
    "Checked",
    "DenseOptimizer",
    "Fused",
    "Rate",
    "Scalars",
    "Schedule",
    "SparseOptimizer",
    "check_ranges",
    "dense_optimizer",
    "rate_at",
    "row_optimizer",
    "scheduled_rate",
    "with_rates_times",
]

Schedule = Callable[[Tensor], Tensor]  # steps taken before this one, f64 [] -> learning rate, f64 []
Rate = float | Tensor | Schedule
# (t f64 [], learning rate f64, weight decay) -> decay, rate and then the formula's own scalars, f64. The first step is
# t = 1. Decay and rate are elementwise in the learning rate and the weight decay.
Scalars = Callable[[Tensor, Tensor, Tensor | float], list[Tensor]]


class DenseOptimizer(NamedTuple):
    """An optimiser of parameters: functions of a state that holds what it keeps by parameter name.

    init:       (params) -> state, a NamedTuple of which a field `step` i64 [] is the steps taken.
    update:     (state, params, grads, scale f32 [], due bool [] | None) -> (state, params); pure: the specification.
                Gradients are multiplied by `scale`; nothing moves unless `due`. None: always due, and cheaper.
    update_:    the same; writes into state and params. A caller uses only what comes back.
    """

    init: Callable[[Params], Any]
    update: Callable[[Any, Params, Params, Tensor, Tensor | None], tuple[Any, Params]]
    update_: Callable[[Any, Params, Params, Tensor, Tensor | None], tuple[Any, Params]]


class Fused(NamedTuple):
    """`Table.add_grads_` and an optimiser's `apply_` in one, for a step that is one batch.

    of:         that `apply_`. An optimiser whose `apply_` was replaced is another one, and is not fused.
    apply_:     (TableState, Occurrences, scale, due) -> TableState; for rows without separate learning rates.
    """

    of: Callable[..., TableState]
    apply_: Callable[[TableState, Occurrences, Tensor, Tensor], TableState]


class Checked(NamedTuple):
    """An optimiser's `apply_` that also checks whether the gradients it reads are finite. For tables on a CPU.

    of:         that `apply_`, as of `Fused`.
    apply_:     (TableState, scale, due, other tensors f32 to check) -> (TableState, whether all is finite, bool []);
                for rows without separate learning rates.
    """

    of: Callable[..., TableState]
    apply_: Callable[[TableState, Tensor, Tensor, Sequence[Tensor]], tuple[TableState, Tensor]]


class SparseOptimizer(NamedTuple):
    """An optimiser of the rows one step touched. It declares what it keeps next to a weight; the table owns the memory.

    slots:      names of what is kept per weight: a row is f32 [1 + slots, W].
    row_slots:  names of what is kept per row of each logical table, after the weights: [1 + slots, W + row slots].
    update:     (rows f32 [U, 1 + slots, W + row slots], grads f32 [U, W], step i64 [], scale f32 []) -> rows; pure:
                the specification, for rows of one logical table.
    apply_:     (TableState, scale, due bool [], RowLayout | None, most rows | None) -> TableState; in place, on the
                rows of the step in progress: this is what a capture traces. Without columns a row is one logical table.
                Most rows: an int that the step's rows do not exceed, fixed when a step is captured; None: as many as
                the state has room for.
    fused:      `apply_` with the sum of the gradients, where a kernel does both.
    checked:    `apply_` with a check whether gradients are finite, where a kernel does both.
    needs_bound: whether `apply_` makes tensors of as many rows as it is given for "most rows".
    """

    slots: tuple[str, ...]
    row_slots: tuple[str, ...]
    update: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    apply_: Callable[..., TableState]
    fused: Fused | None = None
    checked: Checked | None = None
    needs_bound: bool = False

    def fused_for(self, columns: RowLayout) -> Callable[..., TableState] | None:
        """`fused.apply_` where it does to rows of these columns what `apply_` does."""
        if self.fused is None or self.fused.of is not self.apply_ or columns.rates is not None:
            return None
        return self.fused.apply_

    def checked_for(self, columns: RowLayout) -> Callable[..., tuple[TableState, Tensor]] | None:
        """`checked.apply_` where it does to rows of these columns what `apply_` does."""
        if self.checked is None or self.checked.of is not self.apply_ or columns.rates is not None:
            return None
        return self.checked.apply_


_factor: list[Tensor] = []  # of all learning rates, of the step that runs or is traced now; a list, as dynamo traces it


def with_rates_times(factor: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in which optimisers multiply their learning rates by factor f64 []."""
    _factor.append(factor)
    try:
        return function(*args)
    finally:
        _factor.pop()


def rate_at(lr: Rate, t: Tensor) -> Tensor:
    """The learning rate of step t f64 [], f64 []: that of `lr`, times the factor of `with_rates_times`."""
    rate = scheduled_rate(lr, t)
    return rate * _factor[-1].double() if _factor else rate


def scheduled_rate(lr: Rate, t: Tensor) -> Tensor:
    """The learning rate that `lr` gives for step t f64 [], f64 []."""
    if isinstance(lr, Tensor):
        return lr.double()
    if not callable(lr):
        return torch.full_like(t, lr)
    rate = lr(t - 1)
    check_type("lr", rate, Tensor, "A schedule is traced once, so it must compute: torch.full_like(step, 0.1).")
    return rate.double()


def check_ranges(lr: Rate, **ranges: tuple[float, float, float]) -> None:
    """Raises ValueError when a value of (value, low, high) is not in [low, high), or lr is a float below 0; TypeError
    when one is not a number, or lr nothing that gives one."""
    is_function = callable(lr) and not isinstance(lr, type | nn.Module)
    if isinstance(lr, int | float) and not isinstance(lr, bool):
        ranges["lr"] = (lr, 0, math.inf)
    elif not is_function and not isinstance(lr, Tensor | numbers.Real):
        raise TypeError(
            f"lr: got {said(lr)}, expected a number, a tensor [] or a function of the steps taken. An optimiser is "
            "built without parameters: step.init takes them. See recfx.optim.schedules."
        )
    if isinstance(lr, Tensor) and lr.dim():
        raise ValueError(f"lr: got a tensor {list(lr.shape)}, expected [], one rate. Use lr[0].")
    for name, (value, low, high) in ranges.items():
        check_number(name, value)
        if not low <= value < high:
            raise ValueError(f"{name}: got {value}, expected {low} <= {name} < {high}.")


def row_optimizer(
    kernel: RowOptimizer,
    scalars: Scalars,
    lr: Rate,
    weight_decay: float,
    *,
    slots: tuple[str, ...] = (),
    row_slots: tuple[str, ...] = (),
) -> SparseOptimizer:
    """The optimiser of rows that `kernel` does, with the scalars of each step from `scalars`."""

    def hyper(t: Tensor, scale: Tensor) -> Tensor:
        decay, rate, *own = scalars(t, rate_at(lr, t), weight_decay)
        return torch.stack([decay, rate, scale.double(), *own])

    def arguments(
        s: TableState, scale: Tensor, columns: RowLayout | None
    ) -> tuple[Tensor, Sequence[int], Tensor | None]:
        t = (s.step + 1).double()
        if columns is None or columns.rates is None:
            return hyper(t, scale), s.grads.shape[1:] if columns is None else columns.dims, None
        lr_scale, own_decay = columns.rates.unbind(1)
        decay = torch.where(own_decay.isnan(), weight_decay, own_decay)
        rates = torch.stack(scalars(t, rate_at(lr, t) * lr_scale, decay)[:2], dim=1)
        return hyper(t, scale), columns.dims, rates.float()

    def update(rows: Tensor, grads: Tensor, step: Tensor, scale: Tensor) -> Tensor:
        return updated_rows(kernel.formula, rows, grads, hyper((step + 1).double(), scale), grads.shape[1:])

    def apply_(
        state: TableState, scale: Tensor, due: Tensor, columns: RowLayout | None = None, most_rows: int | None = None
    ) -> TableState:
        touched = (state.counters, state.unique_rows, state.vocabularies)
        scalars, dims, rates = arguments(state, scale, columns)
        kernel.op_(state.rows, state.grads, *touched, scalars, due, dims, rates)
        return state

    return SparseOptimizer(slots, row_slots, update, apply_)


def dense_optimizer(state_type: Any, formula: Callable, hyper: Callable[[Tensor, Tensor], Tensor]) -> DenseOptimizer:
    """The optimiser of parameters whose state holds a dict per slot, and the steps taken.

    Args:     state_type: a NamedTuple of slots by parameter name, and of `step` i64 [].
              formula: (w, *slots, g, scalars) -> (w, *slots), elementwise.
              hyper: (t i64 [], scale of the gradients f32 []) -> f64 [n], the scalars.
    """
    slots = [name for name in state_type._fields if name != "step"]

    def slots_of(state: Any) -> list[Params]:
        return [getattr(state, slot) for slot in slots]

    def init(params: Params) -> Any:
        device = next((p.device for p in params.values()), None)
        zeros = {slot: {name: torch.zeros_like(p) for name, p in params.items()} for slot in slots}
        return state_type(**zeros, step=torch.zeros((), dtype=torch.int64, device=device))

    def update(state: Any, params: Params, grads: Params, scale: Tensor, due: Tensor | None) -> tuple[Any, Params]:
        if type(state) is not state_type:
            raise TypeError(
                f"state.dense: got {said(state)}, expected {state_type.__name__}. It was made by a step of another "
                "dense optimiser. Use the state of this step's init."
            )
        scalars = hyper(state.step + 1, scale).float().unbind()
        held = slots_of(state)
        new: list[Params] = [{} for _ in ("params", *slots)]
        for name, w in params.items():
            old = (w, *(of_slot[name] for of_slot in held))
            for part, before, after in zip(new, old, formula(*old, grads[name], scalars), strict=True):
                part[name] = after if due is None else torch.where(due, after, before)
        step = state.step + (1 if due is None else due)
        return state_type(**dict(zip(slots, new[1:], strict=True)), step=step), new[0]

    def update_(state: Any, params: Params, grads: Params, scale: Tensor, due: Tensor | None) -> tuple[Any, Params]:
        new_state, new_params = update(state, params, grads, scale, due)
        for target, source in zip((params, *slots_of(state)), (new_params, *slots_of(new_state)), strict=True):
            for name in target:
                target[name].copy_(source[name])
        state.step.copy_(new_state.step)
        return state, params

    return DenseOptimizer(init, update, update_)
