"""The nouns of a step: what it changes, what it returns, and its functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from recfx.context import Stats
from recfx.describe import or_plain, state_text, step_text
from recfx.dist import Group
from recfx.dist.exchange import Exchange, ExchangeState
from recfx.embeddings import Plan
from recfx.generators import Draws
from recfx.table import TableState
from recfx.types import Params

__all__ = ["Aux", "Batch", "NonFinite", "OnNonFinite", "Precision", "Step", "TrainState", "Window"]

Precision = Literal["fp32", "tf32", "bf16"]
OnNonFinite = Literal["stop", "skip", "ignore"]
Batch = Mapping[str, Any]  # columns by name


class Window(NamedTuple):
    """Gradient accumulation in progress; all zero between optimiser steps."""

    grads: Params  # sums over the window's samples; empty when accumulation is 1
    num_samples: Tensor  # i64 []
    num_batches: Tensor  # i64 []


class NonFinite(NamedTuple):
    """Micro-batches whose loss, logit or gradient was NaN or infinite, since the state was made."""

    first_step: Tensor  # i64 [], optimiser step of the first one, from 1; 0: there was none
    first_batch: Tensor  # i64 [], its place among the micro-batches of that step, from 0
    num_batches: Tensor  # i64 [], how many there were


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Tensor  # i64 [], optimiser steps since the model began: goes on after a load
    params: Params
    stats: Stats  # what `forward` keeps without training it
    dense: Any  # the dense optimiser's state, see `recfx.optim.DenseOptimizer`; its `step` i64 [] is the steps it took
    tables: tuple[TableState, ...]
    metrics: Any  # what has been counted, such as `recfx.metrics.BinaryCounts`; of several tasks a dict of them
    window: Window
    nonfinite: NonFinite
    exchange: ExchangeState | tuple[()] = ()  # between ranks; () in one process
    rate: Tensor | tuple[()] = ()  # f64 [], factor of all learning rates; () without train_step(rate_factor=True)

    def __repr__(self) -> str:
        return or_plain(state_text)(self)


class Aux(NamedTuple):
    """What a step returns about its batch. Valid until the next call of the captured step."""

    loss: Tensor  # f32 [], mean over the batch's samples, of training on many ranks over those of all ranks; nats
    logit: Any  # f32 [B, 1]; what `forward` returned for tasks: a dict by task, a dict of tensors for a batch loss
    num_samples: Tensor  # i32 []
    counts: dict[str, Tensor]  # what the feature function put under `recfx.types.COUNTS`


Trains = Callable[[TrainState, Batch], tuple[TrainState, Aux]]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Step:
    """The functions of one training program. Those ending in `_` write into the state they are given.

    init:       (params, stats={}) -> TrainState; stats: what `forward` keeps without training it, by name; copied.
    update:     (state, batch) -> (state, aux); pure: `update_` on a copy of the state, every operator of recfx in plain
                torch. The specification, for tests and small tables.
    update_:    the same in place. It first makes room for the batch's ids in the tables, as a captured step does.
    in_graph_:  `update_` without making room, which reads the state on the host: what a capture traces.
    evaluate_:  (state, batch) -> (state, aux); changes `metrics` alone, inserts nothing.
    predict:    (state, batch) -> logit f32 [B, 1], of the real samples first; of tasks, what `forward` returns
                for them. Changes and inserts nothing. A batch without columns of the names of labels, sample weights
                and masks is given zeros for them, so that one feature function will do.
    flush_:     (state) -> state; applies an incomplete accumulation window with its true count.
    ids_in:     (batch) -> most ids per table that batches of this layout hold.
    grow_:      (state, ids) -> state; makes room for that many new ids per table. Runs between steps, on the host.
    sweep_:     (state, number) -> state; deletes rows that the step's `Life` expires after step `number`. Call it
                after every optimiser step, with the steps taken so far.
    gradient_norms: (state, batch) -> norms by "parameter 'w'" and "feature 'item'": Euclidean, of the gradient of the
                batch's mean loss, NaN where it is not finite; of a feature over the rows of all its ids, and of ids
                without one. Changes nothing. On ranks it is of a rank's samples, and all must call it.
    read:       (batch) -> features by name, `recfx.types.NUM_SAMPLES` among them.
    plan:       the physical tables, one per entry of TrainState.tables.
    accumulation: micro-batches per optimiser step.
    sweep_every: `sweep_` has work only after step numbers that this divides: 1 where it looks at every step's end, as
                with a Life that evicts or stops at the cap; 0: never.
    seed:       of the tables' initial weights.
    slots:      what the sparse optimiser keeps next to a weight and, then, per row.
    precision:  of the dense part's products, see `train_step`.
    on_nonfinite: what a micro-batch with NaN or infinity leads to, see `train_step`.
    tasks:      what it trains for, see `recfx.step.Task`.
    draws:      whether the step draws from torch's generators.
    evaluate_in_graph_, predict_in_graph: what a capture traces of `evaluate_` and `predict`. In one process they are
                the same functions; where ranks share tables, those repeat a batch for which a bucket was too small.
    exchange:   what ranks exchange within the step; None: one process.
    """

    init: Callable[..., TrainState]
    update: Trains
    update_: Trains
    in_graph_: Trains
    evaluate_: Trains
    predict: Callable[[TrainState, Batch], Any]
    flush_: Callable[[TrainState], TrainState]
    ids_in: Callable[[Batch], tuple[int, ...]]
    grow_: Callable[[TrainState, Sequence[int]], TrainState]
    sweep_: Callable[[TrainState, int], TrainState]
    gradient_norms: Callable[[TrainState, Batch], dict[str, float]]
    read: Callable[[Batch], dict[str, Any]]
    plan: Plan
    accumulation: int
    sweep_every: int
    seed: int
    slots: tuple[str, ...]
    precision: Precision
    on_nonfinite: OnNonFinite
    tasks: Any  # `recfx.step.tasks.Tasks`, which is made of this module
    draws: Draws
    evaluate_in_graph_: Trains
    predict_in_graph: Callable[[TrainState, Batch], Any]
    exchange: Exchange | None

    @property
    def group(self) -> Group | None:
        """The ranks that share the tables; None: one process."""
        return None if self.exchange is None else self.exchange.group

    def __repr__(self) -> str:
        return or_plain(step_text)(self)
