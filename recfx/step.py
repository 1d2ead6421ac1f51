"""The training step: features -> lookup -> pool -> forward and backward -> row gradients -> optimisers -> metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recfx.checks import check_choice, check_int
from recfx.context import Context, Stats, with_context
from recfx.describe import or_plain, state_text, step_text
from recfx.embeddings import Combiner, Embedding, Plan, Tile, plan_tables
from recfx.finite import NonFinite, clean_padding, counts_after, gradients_finite, outputs_finite, untouch_
from recfx.generators import Draws
from recfx.kernels.lists.order_lists import list_sums
from recfx.kernels.rows.add_row_grads import add_row_grads_
from recfx.layers import in_bf16
from recfx.losses import bce_with_logits
from recfx.metrics import BinaryCounts, binary_metrics
from recfx.optim import SparseOptimizer
from recfx.step_checks import (
    check_batch,
    check_bound,
    check_features,
    check_functions,
    check_kinds,
    check_logit,
    check_loss,
    check_state,
    params_of,
    stats_of,
    with_names,
)
from recfx.table import Found, Table, TableState, copy_of, ids_of, is_full, is_sweep_due, table
from recfx.table import sweep_ as sweep_table_
from recfx.table.combining import combined
from recfx.table.policies import Life
from recfx.types import COUNTS, NUM_SAMPLES, Params, Ragged, Transform

__all__ = ["Aux", "NonFinite", "OnNonFinite", "Step", "TrainState", "Window", "train_step"]

FUSED_ON = ("cuda",)  # devices on which `SparseOptimizer.fused` is faster than the two kernels it replaces
Precision = Literal["fp32", "tf32", "bf16"]
OnNonFinite = Literal["stop", "skip", "ignore"]


class Window(NamedTuple):
    """Gradient accumulation in progress; all zero between optimiser steps."""

    grads: Params  # sums over the window's samples; empty when accumulation is 1
    num_samples: Tensor  # i64 []
    num_batches: Tensor  # i64 []


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Tensor  # i64 [], optimiser steps since the model began: goes on after a load
    params: Params
    stats: Stats  # what `forward` keeps without training it
    dense: Any  # the dense optimiser's state, which ends in the steps that it took
    tables: tuple[TableState, ...]
    metrics: BinaryCounts
    window: Window
    nonfinite: NonFinite

    def __repr__(self) -> str:
        return or_plain(state_text)(self)


class Aux(NamedTuple):
    """What a step says of its batch. Valid until the next call of the captured step."""

    loss: Tensor  # f32 [], mean over the batch's samples, nats
    logit: Tensor  # f32 [B, 1]
    num_samples: Tensor  # i32 []
    counts: dict[str, Tensor]  # what the feature function put under `recfx.types.COUNTS`


class Step(NamedTuple):
    """The functions of one training program. Those ending in `_` write into the state they are given.

    init:       (params, stats={}) -> TrainState; stats: what `forward` keeps without training it, by name; copied.
    update:     (state, batch) -> (state, aux); pure, plain torch: the specification, for tests and small tables.
    update_:    the same in place. It first makes room for the batch's ids in the tables, as a captured step does.
    in_graph_:  `update_` without making room, which reads the state on the host: what a capture traces.
    evaluate_:  (state, batch) -> (state, aux); changes `metrics` alone, inserts nothing.
    predict:    (state, batch) -> logit f32 [B, 1], of the real samples first; changes and inserts nothing. A batch
                without columns of the names `label` and `sample_weight` is given zeros for them, so that one feature
                function will do.
    flush_:     (state) -> state; applies an incomplete accumulation window with its true count.
    ids_in:     (batch) -> most ids per table that batches of this layout hold.
    grow_:      (state, ids) -> state; makes room for that many new ids per table. Runs between steps, on the host.
    sweep_:     (state, number) -> state; deletes rows where the step's `Life` says so after step `number`. Call it
                after every optimiser step, with the steps taken so far.
    read:       (batch) -> features by name, `recfx.types.NUM_SAMPLES` among them.
    plan:       the physical tables, one per entry of TrainState.tables.
    accumulation: micro-batches per optimiser step.
    sweep_every: `sweep_` has work only after step numbers that this divides: 1 where it looks at every step's end, as
                with a Life that evicts or stops at the cap; 0: never.
    seed: of the tables' initial weights.
    slots: what the sparse optimiser keeps beside a weight and, then, per row.
    precision: of the dense part's products, as `train_step` was asked.
    on_nonfinite: what a micro-batch with NaN or infinity leads to, as `train_step` was asked.
    label: name of the feature that holds the target.
    draws: whether the step draws from torch's generators.
    """

    init: Callable[..., TrainState]
    update: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    update_: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    in_graph_: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    evaluate_: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    predict: Callable[[TrainState, Mapping[str, Any]], Tensor]
    flush_: Callable[[TrainState], TrainState]
    ids_in: Callable[[Mapping[str, Any]], tuple[int, ...]]
    grow_: Callable[[TrainState, Sequence[int]], TrainState]
    sweep_: Callable[[TrainState, int], TrainState]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    plan: Plan
    accumulation: int
    sweep_every: int
    seed: int
    slots: tuple[str, ...]
    precision: Precision
    on_nonfinite: OnNonFinite
    label: str
    draws: Draws

    def __repr__(self) -> str:
        return or_plain(step_text)(self)


class _Spelling(NamedTuple):
    """The functions that differ between the pure and the in-place step."""

    insert: Callable[[Table], Callable]
    add_grads: Callable[[Table], Callable]
    count_steps: Callable[[Table], Callable]
    sparse: Callable
    dense: Callable
    metrics: Callable
    store: Callable[[Tensor, Tensor], Tensor]


def train_step(
    *,
    features: Callable[[Any], dict[str, Any]],
    embeddings: Mapping[str, Sequence[Embedding]],
    forward: Callable[..., Any],
    sparse_optimizer: SparseOptimizer,
    dense_optimizer: Transform,
    loss: Callable[[Tensor, Tensor], Tensor] = bce_with_logits,
    label: str = "label",
    sample_weight: str | None = None,
    accumulation: int = 1,
    max_rows: int = 2**26,
    max_bytes: int | None = None,
    max_unique: int | None = None,
    life: Life | None = None,
    seed: int = 42,
    metrics: Transform | None = None,
    clip: Callable[[Params, Sequence[TableState], Tensor], Tensor] | None = None,
    sum_row_grads: Callable[..., None] = add_row_grads_,
    precision: Precision = "fp32",
    on_nonfinite: OnNonFinite = "stop",
    check_labels: bool | None = None,
) -> Step:
    """Composes feature function, embeddings, model and optimisers into one step.

    Args:     features: batch -> features by name; ids for `embeddings` as Ragged i64, whatever `forward` wants besides;
              under `recfx.types.COUNTS` tensors by name for `aux.counts`.
              embeddings: by group; a group reaches the model as one tensor [B, len(group), dim], a tiled embedding as
              n of its cells, or as [B, sum of dims] where its dims differ.
              forward: (params, embeddings by group, features) -> logit f32 [B, 1]. With a fourth parameter it is given
              a `recfx.context.Context`: training or not, random numbers, the real samples, statistics. It may return
              (logit, stats).
              loss: (logit, label) -> loss per sample [B, 1]; label: name of the feature [B, 1] that holds the target.
              sample_weight: name of a feature [B, 1] that multiplies each sample's loss. The mean stays one over the
              number of samples, as with torch's `weight`; metrics show the weighted loss, and AUC without weights.
              accumulation: micro-batches per optimiser step. The step equals one on their concatenation: gradients are
              summed over valid samples and divided by their total.
              max_rows, max_bytes, max_unique, seed: of every physical table, see `recfx.table.functions`.
              life: which ids get a row and which rows are deleted, see `recfx.table.policies`. None: all, and none.
              clip: (dense gradients, tables, scale) -> scale of all gradients, such as `recfx.optim.clip_global_norm`.
              sum_row_grads: how the gradients of a row are summed, in f32: of 2**24 occurrences or more in a step small
              terms may be lost. The default adds occurrences in order, the same bytes from run to run; on a GPU, where
              nothing comes between the sum and the optimiser, the two are one kernel.
              `recfx.kernels.rows.add_row_grads.add_row_grads_atomic_` adds them as they come on a GPU.
              precision: of the products of matrices in `forward` and its gradients; all else is f32. "bf16": see
              `recfx.layers.in_bf16`. "tf32": on CUDA, in captured steps, operands keep 10 bits of their mantissa.
              on_nonfinite: what follows when a loss, a logit or a gradient is NaN or infinite. "stop": the state says
              in which step it happened first, and `recfx.train` raises before it saves or logs. "skip": the micro-batch
              is left out. Parameters, rows, optimiser states, statistics and metrics stay as they were, its samples
              are not counted, and rows that it inserted keep their initial value. "ignore": nothing is looked for.
              check_labels: whether labels of real samples that are not in [0, 1], NaN too, are counted, so that
              `recfx.train` raises before it saves or logs, and after an evaluation. None: with the default loss, which
              has no minimum at such a label. False accepts them; True checks them with another loss too.
    Raises:   ValueError when accumulation is below 1 or precision or on_nonfinite is another word; TypeError when
              a part is another kind of thing, such as an optimiser of `torch.optim`.
    """
    check_functions(features=features, forward=forward, loss=loss, clip=clip)
    check_kinds(
        sparse_optimizer=sparse_optimizer, dense_optimizer=dense_optimizer, metrics=metrics, life=life, label=label,
        sample_weight=sample_weight, check_labels=check_labels,
    )  # fmt: skip
    check_int("accumulation", accumulation, 1)
    check_choice("precision", precision, get_args(Precision))
    check_choice("on_nonfinite", on_nonfinite, get_args(OnNonFinite))
    check_bound(sparse_optimizer, accumulation, max_unique)
    plan = plan_tables(embeddings)
    check = functools.partial(
        check_state, kind=TrainState, plan=plan, optimizer=sparse_optimizer, accumulation=accumulation
    )
    features = with_names("features", features, "columns")
    forward = with_names("forward", with_context(forward), "params", "embeddings", "features")
    forward = in_bf16(forward) if precision == "bf16" else forward
    settings: dict[str, Any] = {
        "optimizer_slots": len(sparse_optimizer.slots),
        "row_slots": len(sparse_optimizer.row_slots),
        "seed": seed,
        "max_rows": max_rows,
        "max_bytes": max_bytes,
        "max_unique": max_unique,
        "life": life,
        "sum_row_grads": sum_row_grads,
    }
    tables = [table(t, **settings) for t in plan.tables]
    counts = metrics or binary_metrics()
    counts_labels = loss is bce_with_logits if check_labels is None else check_labels
    in_place = _Spelling(
        lambda t: t.insert_, lambda t: t.add_grads_, lambda t: t.count_steps_, sparse_optimizer.apply_,
        dense_optimizer.update_, counts.update_, Tensor.copy_,
    )  # fmt: skip
    pure = _Spelling(
        lambda t: t.insert, lambda t: t.add_grads, lambda t: t.count_steps, sparse_optimizer.apply,
        dense_optimizer.update, counts.update, lambda _, new: new,
    )  # fmt: skip

    skips = on_nonfinite == "skip"
    nothing_between = accumulation == 1 and clip is None and sum_row_grads is add_row_grads_ and not skips
    draws = Draws()

    def init(params: Params, *, stats: Stats | None = None) -> TrainState:
        params = params_of(params, [t.device for t in plan.tables])
        device = next((p.device for p in params.values()), torch.device(plan.tables[0].device))

        def counter() -> Tensor:
            return torch.zeros((), dtype=torch.int64, device=device)

        window = {name: torch.zeros_like(p) for name, p in params.items()} if accumulation > 1 else {}
        return TrainState(
            step=counter(),
            params=params,
            stats=stats_of({} if stats is None else stats, device),
            dense=tree_map(lambda t: t.to(device), dense_optimizer.init(params)),
            tables=tuple(t.init() for t in tables),
            metrics=_counts_of(counts.init(device), labels=counts_labels),
            window=Window(window, counter(), counter()),
            nonfinite=NonFinite(counter(), counter(), counter()),
        )

    def read(batch: Mapping[str, Any]) -> dict[str, Any]:
        check_batch(batch)
        feats = features(batch)
        check_features(feats, label, sample_weight)
        return {NUM_SAMPLES: batch[NUM_SAMPLES], **feats}

    def context_of(state: TrainState, valid: Tensor, *, training: bool) -> Context:
        sample = torch.arange(len(valid), device=valid.device)
        return Context(
            training=training,
            valid=valid,
            stats=state.stats,
            seed=seed,
            step=state.step + 1 if training else state.step,
            sample=state.window.num_samples + sample if training else sample,
        )

    def total_loss(
        params: Params, blocks: list[list[Tensor]], found: list[Found], feats: dict, context: Context
    ) -> tuple[Tensor, Any]:
        logit, stats = forward(params, _groups(plan, blocks, found), feats, context)
        check_logit(logit, feats, label, sample_weight)
        # A logit of padding may be NaN: no multiple of its slope is 0.
        loss_B = loss(torch.where(context.valid, logit, 0.0), feats[label].float())
        check_loss(loss_B, logit)
        loss_B = loss_B if sample_weight is None else loss_B * feats[sample_weight]
        loss_B = torch.where(context.valid, loss_B, 0.0)
        return loss_B.sum(), (logit, loss_B, stats)

    gradients = torch.func.grad(total_loss, argnums=(0, 1), has_aux=True)

    def spell(do: _Spelling) -> Callable[[TrainState, dict], tuple[TrainState, Aux]]:
        def fused(t: Table, s: TableState) -> Callable[..., TableState] | None:
            """The sum of row gradients and the sparse optimiser as one kernel, where that is faster."""
            is_faster = do is in_place and nothing_between and s.rows.device.type in FUSED_ON
            return sparse_optimizer.fused_for(t.columns) if is_faster else None

        def checked(states: list[TableState], grads: Params) -> list[Callable] | None:
            """The sparse optimiser of each table that looks at all gradients of a step, where it can."""
            on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in grads.values())
            on_cpu = on_cpu and all(s.rows.device.type == "cpu" for s in states)
            steps = [sparse_optimizer.checked_for(t.columns) for t in tables]
            return [c for c in steps if c] if do is in_place and nothing_between and on_cpu and all(steps) else None

        def update(state: TrainState, feats: dict) -> tuple[TrainState, Aux]:
            valid = _valid(feats, label)
            feats = clean_padding(feats, valid)
            context = context_of(state, valid, training=True)
            touched = [s.num_unique.clone() for s in state.tables] if skips else []
            inserted = [do.insert(t)(s, feats) for t, s in zip(tables, state.tables, strict=True)]
            found = [f for _, f in inserted]
            blocks = [t.pool(s, f) for t, (s, f) in zip(tables, inserted, strict=True)]
            (grads, block_grads), (logit, loss_B, stats) = gradients(state.params, blocks, found, feats, context)

            num_samples, in_metrics = feats[NUM_SAMPLES], valid
            is_good: Tensor | None = None
            if skips or (on_nonfinite == "stop" and accumulation > 1):
                is_good = outputs_finite(logit, loss_B, valid) & gradients_finite(grads, block_grads)
            if skips:
                assert is_good is not None
                grads = {name: torch.where(is_good, g, 0.0) for name, g in grads.items()}
                stats = {name: torch.where(is_good, new, state.stats[name]) for name, new in stats.items()}
                # In place in the pure step too: `insert` has copied the table.
                inserted = [untouch_(s, f, n, is_good) for (s, f), n in zip(inserted, touched, strict=True)]
                found = [f for _, f in inserted]
                num_samples, in_metrics = num_samples * is_good, valid & is_good
            states = [
                s if fused(t, s) else do.add_grads(t)(s, f, g)
                for t, (s, f), g in zip(tables, inserted, block_grads, strict=True)
            ]

            window = state.window
            total, num_batches = window.num_samples + num_samples, window.num_batches + 1
            due = num_batches >= accumulation
            moves = due if is_good is None or not skips else due & (is_good | (total > 0))
            scale = 1.0 / total.clamp(min=1).float()
            if accumulation > 1:
                grads = {name: window.grads[name] + g for name, g in grads.items()}
            scale = scale if clip is None else clip(grads, states, scale)
            always_moves = accumulation == 1 and not skips
            dense, params = do.dense(state.dense, state.params, grads, scale, None if always_moves else moves)
            left = {name: do.store(g, torch.where(due, 0.0, grads[name])) for name, g in window.grads.items()}
            window = Window(
                left, do.store(window.num_samples, total * ~due), do.store(window.num_batches, num_batches * ~due)
            )
            if life is not None:
                states = [do.count_steps(t)(s, moves) for t, s in zip(tables, states, strict=True)]
            one_kernel = any(map(fused, tables, states))
            looks = on_nonfinite == "stop" and is_good is None
            if looks and not one_kernel and (steps := checked(states, grads)):
                others = [[*grads.values()], *([] for _ in steps[1:])]
                both = [c(s, scale, moves, o) for c, s, o in zip(steps, states, others, strict=True)]
                states = [s for s, _ in both]
                is_good = functools.reduce(Tensor.logical_and, [ok for _, ok in both])
                is_good = is_good & outputs_finite(logit, loss_B, valid)
            else:
                if looks:
                    is_good = gradients_finite(grads, block_grads, None if one_kernel else states)
                    is_good = is_good & outputs_finite(logit, loss_B, valid)
                states = [
                    one(s, t.occurrences(f, g), scale, due)
                    if (one := fused(t, s))
                    else do.sparse(s, scale, moves, t.columns, f.inverse.numel() if accumulation == 1 else None)
                    for t, s, f, g in zip(tables, states, found, block_grads, strict=True)
                ]
            nonfinite = state.nonfinite
            if is_good is not None:
                new = counts_after(nonfinite, ~is_good, state.step + 1, num_batches - 1)
                nonfinite = NonFinite(*map(do.store, nonfinite, new))
            counted = do.metrics(state.metrics, logit, feats[label], loss_B, in_metrics)
            kept = {name: do.store(state.stats[name], new) for name, new in stats.items()}
            number = do.store(state.step, state.step + due)
            aux = _aux(logit, loss_B, feats)
            return TrainState(number, params, kept, dense, tuple(states), counted, window, nonfinite), aux

        return update

    pure_update, in_place_update = spell(pure), spell(in_place)

    def num_ids(feats: dict) -> tuple[int, ...]:
        return tuple(sum(ids_of(feats, l.feature).values.numel() for l in t.lookups) for t in plan.tables)

    def update(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Aux]:
        check(state)
        feats, state = read(batch), state._replace(tables=tuple(map(copy_of, state.tables)))
        return pure_update(grow_(state, num_ids(feats)), feats)

    def update_(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Aux]:
        check(state)
        with torch.no_grad(), draws.watched(state.step.device):
            feats = read(batch)
            return in_place_update(grow_(state, num_ids(feats)), feats)

    def in_graph_(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Aux]:
        check(state)
        return in_place_update(state, read(batch))

    def look_up(state: TrainState, feats: dict) -> tuple[list[list[Tensor]], list[Found]]:
        found = [t.find(s, feats) for t, s in zip(tables, state.tables, strict=True)]
        return [t.pool(s, f) for t, s, f in zip(tables, state.tables, found, strict=True)], found

    def evaluate_(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Aux]:
        check(state)
        feats = read(batch)
        valid = _valid(feats, label)
        context = context_of(state, valid, training=False)
        _, (logit, loss_B, _) = total_loss(state.params, *look_up(state, feats), feats, context)
        counts.update_(state.metrics, logit, feats[label], loss_B, valid)
        return state, _aux(logit, loss_B, feats)

    def predict(state: TrainState, batch: Mapping[str, Any]) -> Tensor:
        check(state)
        feats = read(_filled(batch, label, sample_weight))
        context = context_of(state, _valid(feats, label), training=False)
        logit, _ = forward(state.params, _groups(plan, *look_up(state, feats)), feats, context)
        check_logit(logit, feats, label, None)
        return logit

    def flush_(state: TrainState) -> TrainState:
        check(state)
        due = state.window.num_batches > 0
        scale = 1.0 / state.window.num_samples.clamp(min=1).float()
        if accumulation > 1:
            moves = due & (state.window.num_samples > 0) if skips else due
            scale = scale if clip is None else clip(state.window.grads, state.tables, scale)
            dense_optimizer.update_(state.dense, state.params, state.window.grads, scale, moves)
            for t, s in zip(tables, state.tables, strict=True):
                if life is not None:
                    t.count_steps_(s, moves)
                sparse_optimizer.apply_(s, scale, moves, t.columns)
            state.step.add_(due)
            for tensor in (*state.window.grads.values(), *state.window[1:]):
                tensor.zero_()
        return state

    def ids_in(batch: Mapping[str, Any]) -> tuple[int, ...]:
        return num_ids(read(_filled(batch, label, sample_weight)))

    def grow_(state: TrainState, ids: Sequence[int]) -> TrainState:
        for t, s, num_ids in zip(tables, state.tables, ids, strict=True):
            t.grow_(s, num_ids)
        return state

    def sweep_(state: TrainState, number: int) -> TrainState:
        if life is None:
            return state
        for i, s in enumerate(state.tables):
            if life.at_cap == "stop" and int(s.num_refused) and is_full(s):
                raise RuntimeError(
                    f"table {i}: got {int(s.num_refused)} ids without room, expected none. Its cap is "
                    f"{s.ids.numel()} rows. They were not trained. Raise max_rows, or give a Life that evicts."
                )
            if is_sweep_due(s, life, number):
                sweep_table_(s, life)
        return state

    return Step(
        init=init,
        update=update,
        update_=update_,
        in_graph_=in_graph_,
        evaluate_=evaluate_,
        predict=predict,
        flush_=flush_,
        ids_in=ids_in,
        grow_=grow_,
        sweep_=sweep_,
        read=read,
        plan=plan,
        accumulation=accumulation,
        sweep_every=0 if life is None else life.every if life.at_cap == "refuse" else 1,
        seed=seed,
        slots=(*sparse_optimizer.slots, *sparse_optimizer.row_slots),
        precision=precision,
        on_nonfinite=on_nonfinite,
        label=label,
        draws=draws,
    )


def _counts_of(counts: BinaryCounts, *, labels: bool) -> BinaryCounts:
    """The metrics with the count of labels that are not in [0, 1], or without."""
    return counts if labels else counts._replace(sums=counts.sums[:5].clone())


def _valid(feats: dict, label: str) -> Tensor:
    """bool [B, 1]: the samples that are not padding."""
    return torch.arange(feats[label].shape[0], device=feats[label].device)[:, None] < feats[NUM_SAMPLES]


def _aux(logit: Tensor, loss_B: Tensor, feats: dict) -> Aux:
    num_samples = feats[NUM_SAMPLES]
    return Aux(loss_B.sum() / num_samples.clamp(min=1), logit, num_samples.clone(), feats.get(COUNTS, {}))


def _filled(batch: Mapping[str, Any], *names: str | None) -> dict[str, Any]:
    """The batch with zeros f32 [B, 1] where it lacks a column of that name, as a request lacks its label."""
    check_batch(batch)
    column = next(column for name, column in batch.items() if name != NUM_SAMPLES)
    num = column.num_samples if isinstance(column, Ragged) else column.shape[0]
    return {name: torch.zeros(num, 1, device=batch[NUM_SAMPLES].device) for name in names if name} | {**batch}


def _groups(plan: Plan, blocks: list[list[Tensor]], found: list[Found]) -> dict[str, Tensor]:
    """Each group's embeddings in its order, as one tensor: [B, cells, dim], or [B, sum of dims] if they differ."""
    groups = {}
    for name, cells in plan.groups.items():
        block = blocks[cells[0].table][cells[0].column]
        whole = [(cells[0].table, cells[0].column, l, "sum") for l in range(block.shape[1])]
        if [tuple(c) for c in cells] == whole and all(map(plan.learns, cells)):
            groups[name] = block
            continue
        parts = []
        for c in cells:
            part = blocks[c.table][c.column][:, plan.tables[c.table].cells_of(c.lookup)]
            part = part if plan.learns(c) else part.detach()
            lookup, ids = plan.tables[c.table].lookups[c.lookup], found[c.table].ragged[c.lookup]
            if isinstance(c.combiner, Combiner):
                parts.append(combined(c.combiner, part, ids, lookup))
                continue
            divisor = _divisor(c.combiner, ids, lookup.padding_id)
            parts.append(part if divisor is None else part / divisor[:, None, None])
        same = len({part.shape[2] for part in parts}) == 1
        groups[name] = torch.cat(parts if same else [part.flatten(1) for part in parts], dim=1)
    return groups


def _divisor(combiner: str | Tile | Combiner, ids: Ragged, padding_id: int | None) -> Tensor | None:
    """What the sum of each list's weighted rows is divided by, [B]."""
    if combiner not in ("mean", "sqrtn"):
        return None
    if ids.weights is None and padding_id is None:
        count = ids.offsets.diff().clamp(min=1)
        return count if combiner == "mean" else count.sqrt()
    weights = torch.ones_like(ids.values, dtype=torch.float32) if ids.weights is None else ids.weights
    weights = weights if padding_id is None else torch.where(ids.values == padding_id, 0.0, weights)
    sums = list_sums(weights if combiner == "mean" else weights.square(), ids.offsets)
    sums = sums if combiner == "mean" else sums.sqrt()
    return torch.where(sums == 0, 1, sums)
