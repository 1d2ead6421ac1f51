"""One micro-batch of training: `update_` as a capture traces it, and its pure form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recfx.context import Stats
from recfx.dist.exchange import Requests
from recfx.dist.group import exchanging
from recfx.kernels.definitions import definitions
from recfx.optim.building import with_rates_times
from recfx.step.finite import clean_padding, count_nonfinite_, gradients_finite, outputs_finite, untouch_
from recfx.step.forward import aux_of, context_of, look_up, num_ids, read, real_samples, total_loss
from recfx.step.parts import Features, StepParts
from recfx.step.state import Aux, Batch, TrainState, Window
from recfx.step.tasks import Outputs
from recfx.table import Found, TableState
from recfx.types import NUM_SAMPLES, Params

__all__ = ["flush_", "grow_", "in_graph_", "is_void_", "update", "update_"]

FUSED_ON = ("cuda",)  # devices on which `SparseOptimizer.fused` is faster than the two kernels it replaces

# (parts, params, pooled rows of each table, found, features, context) -> ((dense gradients, row gradients), (outputs,
# loss of each sample, that of each task, statistics))
gradients = torch.func.grad(total_loss, argnums=(1, 2), has_aux=True)


class Pass(NamedTuple):
    """What the forward and backward pass of one micro-batch gave."""

    found: Sequence[Found]  # by table
    grads: list[Params]  # of the parameters, summed over the samples; of each rank or of all, to be added in this order
    row_grads: Sequence[Sequence[Tensor]]  # of the pooled rows, by table; where ranks share tables, summed by id
    outputs: Outputs  # by task
    losses: Tensor  # f32 [B, 1], of the samples
    stats: Stats
    num_samples: Tensor  # i32 [], of all ranks i64 []
    valid: Tensor  # bool [B, 1], samples that count
    counts: Tensor | None  # bool [], whether the micro-batch counts; None: it does
    loss: Tensor | None  # f32 [], sum over the samples of all ranks; None: one process
    is_good: Tensor | None  # bool [], whether all of this is finite; None: not checked so far


class Move(NamedTuple):
    """Whether and how far the optimisers move."""

    grads: Params  # sums over the window
    num_samples: Tensor  # i64 [], of the window with this micro-batch
    num_batches: Tensor  # i64 [], likewise
    is_last: Tensor  # bool [], whether this micro-batch ends the optimiser step
    due: Tensor  # bool [], whether the optimisers move
    scale: Tensor  # f32 [], what gradients are multiplied by: sums become means


def update(parts: StepParts, state: TrainState, batch: Batch) -> tuple[TrainState, Aux]:
    """The specification: `update_` on a copy of the state, every operator of recfx in plain torch."""
    parts.check(state)
    with definitions():
        while True:
            feats = read(parts, batch)
            new = grow_(parts, tree_map(Tensor.clone, state), num_ids(parts, feats))
            new, aux = _learn_(parts, new, feats)
            if not is_void_(parts, new):
                return new, aux


def update_(parts: StepParts, state: TrainState, batch: Batch) -> tuple[TrainState, Aux]:
    """Makes room for the batch's ids, then `in_graph_`."""
    parts.check(state)
    with torch.no_grad(), parts.draws.watched(state.step.device), exchanging():
        while True:
            feats = read(parts, batch)
            state, aux = _learn_(parts, grow_(parts, state, num_ids(parts, feats)), feats)
            if not is_void_(parts, state):
                return state, aux


def in_graph_(parts: StepParts, state: TrainState, batch: Batch) -> tuple[TrainState, Aux]:
    """What a capture traces."""
    parts.check(state)
    return _learn_(parts, state, read(parts, batch))


def grow_(parts: StepParts, state: TrainState, ids: Sequence[int]) -> TrainState:
    """Makes room for that many new ids per table."""
    for t, s, num in zip(parts.tables, state.tables, ids, strict=True):
        t.grow_(s, num)
    return state


def _learn_(parts: StepParts, state: TrainState, feats: Features) -> tuple[TrainState, Aux]:
    if isinstance(state.rate, Tensor):
        return with_rates_times(state.rate, _learned_, parts, state, feats)
    return _learned_(parts, state, feats)


def _learned_(parts: StepParts, state: TrainState, feats: Features) -> tuple[TrainState, Aux]:
    """One micro-batch, and an optimiser step where it is the last of its window. Writes into the state."""
    valid = real_samples(parts, feats)
    feats = clean_padding(feats, valid)
    touched = [s.num_unique.clone() for s in state.tables] if parts.skips else []

    rows, found, requests = look_up(parts, state, feats, inserts=True)
    context = context_of(parts, state, valid, training=True, requests=requests)
    (grads, row_grads), (outputs, loss_B, losses, stats) = gradients(parts, state.params, rows, found, feats, context)
    if parts.exchange is not None:
        row_grads = parts.exchange.sum_by_id(state.tables, found, row_grads)
    got = Pass(found, [grads], row_grads, outputs, loss_B, stats, feats[NUM_SAMPLES], valid, None, None, None)
    got = _checked_early(parts, got)
    got = got if requests is None else _of_all_ranks(parts, state, got, requests)
    got = _left_out_(got, state, touched) if parts.skips else got

    fused = [_fused_for(parts, i, s) for i, s in enumerate(state.tables)]
    _add_grads_(parts, state, got, fused)
    move = _move_of(parts, state, got)
    due = None if parts.accumulation == 1 and not parts.skips and requests is None else move.due
    dense, params = parts.dense.update_(state.dense, state.params, move.grads, move.scale, due)
    _next_window_(state.window, move)
    _count_steps_(parts, state, move)
    tables, is_good = _update_rows_(parts, state, got, move, fused)

    mean_loss = None if got.loss is None else got.loss / got.num_samples.clamp(min=1)
    if is_good is not None:
        is_bad = ~is_good if got.counts is None else ~is_good & got.counts
        count_nonfinite_(state.nonfinite, is_bad, state.step + 1, move.num_batches - 1)
    parts.tasks.count_(state.metrics, outputs, feats, losses, got.valid)
    for name, new in got.stats.items():
        state.stats[name].copy_(new)
    state.step.copy_(state.step + move.is_last)
    return state._replace(params=params, dense=dense, tables=tables), aux_of(parts, outputs, loss_B, feats, mean_loss)


def is_void_(parts: StepParts, state: TrainState) -> bool:
    """Whether the last step changed nothing, and has to be repeated, see `recfx.dist.exchange`."""
    return parts.exchange is not None and parts.exchange.look_(state.exchange)


def flush_(parts: StepParts, state: TrainState) -> TrainState:
    """An optimiser step on an incomplete window, with its true number of samples."""
    parts.check(state)
    if parts.accumulation == 1:
        return state
    window = state.window
    is_open = window.num_batches > 0
    due = is_open & (window.num_samples > 0) if parts.skips else is_open
    scale = 1.0 / window.num_samples.clamp(min=1).float()
    scale = scale if parts.clip is None else parts.clip(window.grads, state.tables, scale)
    if isinstance(state.rate, Tensor):
        with_rates_times(state.rate, _apply_window_, parts, state, scale, due)
    else:
        _apply_window_(parts, state, scale, due)
    state.step.add_(is_open)
    for tensor in (*window.grads.values(), window.num_samples, window.num_batches):
        tensor.zero_()
    return state


def _apply_window_(parts: StepParts, state: TrainState, scale: Tensor, due: Tensor) -> None:
    parts.dense.update_(state.dense, state.params, state.window.grads, scale, due)
    for t, s in zip(parts.tables, state.tables, strict=True):
        if parts.life is not None:
            t.count_steps_(s, due)
        parts.sparse.apply_(s, scale, due, t.columns, s.unique_rows.numel())


def _checked_early(parts: StepParts, got: Pass) -> Pass:
    """With the verdict on the micro-batch, where it is needed before its gradients are summed with others."""
    is_early = parts.accumulation > 1 or parts.exchange is not None
    if parts.skips or (parts.on_nonfinite == "stop" and is_early):
        is_good = outputs_finite(got.outputs, got.losses, got.valid) & gradients_finite(got.grads[0], got.row_grads)
        return got._replace(is_good=is_good)
    return got


def _of_all_ranks(parts: StepParts, state: TrainState, got: Pass, requests: Requests) -> Pass:
    """The pass with the dense gradients, numbers and statistics of all ranks; none where it does not count."""
    assert parts.exchange is not None
    agreed = parts.exchange.agree(
        got.grads[0],
        num_samples=got.num_samples,
        loss=got.losses.sum(),
        is_good=got.is_good,
        counts=requests.counts,
        stats=got.stats,
        old_stats=state.stats,
    )
    return got._replace(
        grads=agreed.grads,
        stats=agreed.stats,
        num_samples=agreed.num_samples,
        loss=agreed.loss,
        is_good=None if got.is_good is None else agreed.is_good,
        counts=requests.counts,
        valid=got.valid & requests.counts,
    )


def _left_out_(got: Pass, state: TrainState, touched: Sequence[Tensor]) -> Pass:
    """The pass without its micro-batch, unless that is good: it has no gradient, no sample, and touches no row.

    Args:     touched: rows of each table that the step had touched before.
    """
    good = got.is_good
    assert good is not None
    return got._replace(
        grads=[{name: torch.where(good, g, 0.0) for name, g in grads.items()} for grads in got.grads],
        stats={name: torch.where(good, new, state.stats[name]) for name, new in got.stats.items()},
        found=[untouch_(s, f, n, good) for s, f, n in zip(state.tables, got.found, touched, strict=True)],
        num_samples=got.num_samples * good,
        valid=got.valid & good,
    )


def _fused_for(parts: StepParts, table: int, s: TableState) -> Callable[..., TableState] | None:
    """The sum of row gradients and the sparse optimiser of a table as one kernel, where that is faster."""
    is_faster = parts.fuses and s.rows.device.type in FUSED_ON and not parts.plan.tables[table].keeps
    return parts.sparse.fused_for(parts.tables[table].columns) if is_faster else None


def _add_grads_(parts: StepParts, state: TrainState, got: Pass, fused: Sequence[Callable | None]) -> None:
    """Sums the row gradients by row, where no kernel does it together with the optimiser."""
    if parts.exchange is not None:
        parts.exchange.add_grads_(state.tables, got.found, got.row_grads)
        return
    for t, s, f, g, one in zip(parts.tables, state.tables, got.found, got.row_grads, fused, strict=True):
        if one is None:
            t.add_grads_(s, f, g)


def _move_of(parts: StepParts, state: TrainState, got: Pass) -> Move:
    """The window with this micro-batch, and what the optimisers do about it."""
    window = state.window
    num_samples = window.num_samples + got.num_samples
    num_batches = window.num_batches + (1 if got.counts is None else got.counts)
    is_last = num_batches >= parts.accumulation
    is_last = is_last if got.counts is None else is_last & got.counts
    due = is_last
    if parts.skips and got.is_good is not None:  # a window of micro-batches that were all left out moves nothing
        due = is_last & (got.is_good | (num_samples > 0))
    scale = 1.0 / num_samples.clamp(min=1).float()
    grads, *others = [window.grads, *got.grads] if parts.accumulation > 1 else got.grads
    for more in others:
        grads = {name: grads[name] + g for name, g in more.items()}
    scale = scale if parts.clip is None else parts.clip(grads, state.tables, scale)
    return Move(grads, num_samples, num_batches, is_last, due, scale)


def _next_window_(window: Window, move: Move) -> None:
    """Keeps the sums until the window's last micro-batch, which leaves it at zero."""
    for name, g in window.grads.items():
        g.copy_(torch.where(move.is_last, 0.0, move.grads[name]))
    window.num_samples.copy_(move.num_samples * ~move.is_last)
    window.num_batches.copy_(move.num_batches * ~move.is_last)


def _count_steps_(parts: StepParts, state: TrainState, move: Move) -> None:
    if parts.life is not None:
        for t, s in zip(parts.tables, state.tables, strict=True):
            t.count_steps_(s, move.due)


def _update_rows_(
    parts: StepParts, state: TrainState, got: Pass, move: Move, fused: Sequence[Callable | None]
) -> tuple[tuple[TableState, ...], Tensor | None]:
    """The sparse optimiser on the rows of the step; and whether the micro-batch is finite, None where that is ignored.

    On a CPU it reads the gradients anyway, and checks them where its kernel can.
    """
    is_good = got.is_good
    if parts.on_nonfinite == "stop" and is_good is None:
        if not any(fused) and (checking := _checking(parts, state, got.grads[0])):
            return _update_and_check_rows_(state, got, move, checking)
        is_good = gradients_finite(got.grads[0], got.row_grads, None if any(fused) else state.tables)
        is_good = is_good & outputs_finite(got.outputs, got.losses, got.valid)
    tables = []
    for t, s, f, g, one in zip(parts.tables, state.tables, got.found, got.row_grads, fused, strict=True):
        if one is not None:
            tables.append(one(s, *t.occurrences(f, g), move.scale, move.due))
        else:
            most = min(f.own.row.numel(), s.unique_rows.numel()) if parts.accumulation == 1 else s.unique_rows.numel()
            tables.append(parts.sparse.apply_(s, move.scale, move.due, t.columns, most))
    return tuple(tables), is_good


def _checking(parts: StepParts, state: TrainState, grads: Params) -> list[Callable]:
    """The sparse optimiser of each table that checks all gradients of a step; empty where one cannot."""
    on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in grads.values())
    on_cpu = on_cpu and all(s.rows.device.type == "cpu" for s in state.tables)
    steps = [parts.sparse.checked_for(t.columns) for t in parts.tables]
    return [c for c in steps if c] if parts.fuses and on_cpu and all(steps) else []


def _update_and_check_rows_(
    state: TrainState, got: Pass, move: Move, checking: Sequence[Callable]
) -> tuple[tuple[TableState, ...], Tensor]:
    others = [[*got.grads[0].values()], *([] for _ in checking[1:])]  # the first also checks the dense gradients
    both = [c(s, move.scale, move.due, o) for c, s, o in zip(checking, state.tables, others, strict=True)]
    is_good = functools.reduce(Tensor.logical_and, [ok for _, ok in both])
    return tuple(s for s, _ in both), is_good & outputs_finite(got.outputs, got.losses, got.valid)
