"""The training step: features -> lookup -> pool -> forward and backward -> row gradients -> optimisers -> metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from recfx.checks import check_int
from recfx.describe import or_plain, state_text, step_text
from recfx.embeddings import Embedding, Plan, Tile, plan_tables
from recfx.kernels.add_row_grads import add_row_grads_
from recfx.kernels.order_lists import list_sums
from recfx.layers import in_bf16
from recfx.losses import bce_with_logits
from recfx.metrics import BinaryCounts, binary_metrics
from recfx.optim import SparseOptimizer
from recfx.policies import Life
from recfx.step_checks import (
    check_batch,
    check_features,
    check_functions,
    check_kinds,
    check_logit,
    check_loss,
    check_state,
    params_of,
    with_names,
)
from recfx.table import Found, Table, TableState, ids_of, is_full, is_sweep_due, table
from recfx.table import sweep_ as sweep_table_
from recfx.types import COUNTS, NUM_SAMPLES, Params, Ragged, Transform

__all__ = ["Aux", "Step", "TrainState", "Window", "train_step"]

FUSED_ON = ("cuda",)  # devices on which `SparseOptimizer.fused` is faster than the two kernels it replaces
Precision = Literal["fp32", "tf32", "bf16"]


class Window(NamedTuple):
    """Gradient accumulation in progress; all zero between optimiser steps."""

    grads: Params  # sums over the window's samples; empty when accumulation is 1
    num_samples: Tensor  # i64 []
    num_batches: Tensor  # i64 []


class TrainState(NamedTuple):
    """Everything that training changes."""

    params: Params
    dense: Any  # the dense optimiser's state, which ends in `step`
    tables: tuple[TableState, ...]
    metrics: BinaryCounts
    window: Window

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

    init:       (params) -> TrainState
    update:     (state, batch) -> (state, aux); pure, plain torch: the specification, for tests and small tables.
    update_:    the same in place: what is captured.
    evaluate_:  (state, batch) -> (state, aux); changes `metrics` alone, inserts nothing.
    predict:    (state, batch) -> logit f32 [B, 1], of the real samples first; changes and inserts nothing. A batch
                without columns of the names `label` and `sample_weight` is given zeros for them, so that one feature
                function will do.
    flush_:     (state) -> state; applies an incomplete accumulation window with its true count.
    ids_in:     (batch) -> most ids per table that batches of this layout hold.
    grow_:      (state, ids) -> state; makes room for that many new ids per table. Runs between steps, on the host.
    sweep_:     (state, number) -> state; deletes rows where the step's `Life` says so after step `number`. Call it
                after every optimiser step, with the steps taken so far.
    plan:       the physical tables, one per entry of TrainState.tables.
    accumulation: micro-batches per optimiser step.
    sweep_every: `sweep_` has work only after step numbers that this divides: 1 where it looks at every step's end, as
                with a Life that evicts or stops at the cap; 0: never.
    seed: of the tables' initial weights.
    slots: what the sparse optimiser keeps beside a weight and, then, per row.
    precision: of the dense part's products, as `train_step` was asked.
    """

    init: Callable[[Params], TrainState]
    update: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    update_: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    evaluate_: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]
    predict: Callable[[TrainState, Mapping[str, Any]], Tensor]
    flush_: Callable[[TrainState], TrainState]
    ids_in: Callable[[Mapping[str, Any]], tuple[int, ...]]
    grow_: Callable[[TrainState, Sequence[int]], TrainState]
    sweep_: Callable[[TrainState, int], TrainState]
    plan: Plan
    accumulation: int
    sweep_every: int
    seed: int
    slots: tuple[str, ...]
    precision: Precision

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
    forward: Callable[[Params, dict[str, Tensor], dict], Tensor],
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
) -> Step:
    """Composes feature function, embeddings, model and optimisers into one step.

    Args:     features: batch -> features by name; ids for `embeddings` as Ragged i64, whatever `forward` wants besides;
              under `recfx.types.COUNTS` tensors by name for `aux.counts`.
              embeddings: by group; a group reaches the model as one tensor [B, len(group), dim], a tiled embedding as
              n of its cells, or as [B, sum of dims] where its dims differ.
              forward: (params, embeddings by group, features) -> logit f32 [B, 1].
              loss: (logit, label) -> loss per sample [B, 1]; label: name of the feature [B, 1] that holds the target.
              sample_weight: name of a feature [B, 1] that multiplies each sample's loss. The mean stays one over the
              number of samples, as with torch's `weight`; metrics show the weighted loss, and AUC without weights.
              accumulation: micro-batches per optimiser step. The step equals one on their concatenation: gradients are
              summed over valid samples and divided by their total.
              max_rows, max_bytes, max_unique, seed: of every physical table, see `recfx.table.table`.
              life: which ids get a row and which rows are deleted, see `recfx.policies`. None: all, and none.
              clip: (dense gradients, tables, scale) -> scale of all gradients, such as `recfx.optim.clip_global_norm`.
              sum_row_grads: how the gradients of a row are summed. The default adds occurrences in order, the same
              bytes from run to run; on a GPU, where nothing comes between the sum and the optimiser, the two are one
              kernel. `recfx.kernels.add_row_grads.add_row_grads_atomic_` adds them as they come on a GPU.
              precision: of the products of matrices in `forward` and its gradients; all else is f32. "bf16": see
              `recfx.layers.in_bf16`. "tf32": on CUDA, in captured steps, operands keep 10 bits of their mantissa.
    Raises:   ValueError when accumulation is below 1 or precision is another word; TypeError when a part is another
              kind of thing, such as an optimiser of `torch.optim`.
    """
    check_functions(features=features, forward=forward, loss=loss, clip=clip)
    check_kinds(
        sparse_optimizer=sparse_optimizer, dense_optimizer=dense_optimizer, metrics=metrics, life=life, label=label,
        sample_weight=sample_weight,
    )  # fmt: skip
    check_int("accumulation", accumulation, 1)
    if precision not in get_args(Precision):
        raise ValueError(f"precision: got {precision!r}, expected one of {get_args(Precision)}.")
    plan = plan_tables(embeddings)
    features = with_names("features", features, "columns")
    forward = with_names("forward", forward, "params", "embeddings", "features")
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
    in_place = _Spelling(
        lambda t: t.insert_, lambda t: t.add_grads_, lambda t: t.count_steps_, sparse_optimizer.apply_,
        dense_optimizer.update_, counts.update_, Tensor.copy_,
    )  # fmt: skip
    pure = _Spelling(
        lambda t: t.insert, lambda t: t.add_grads, lambda t: t.count_steps, sparse_optimizer.apply,
        dense_optimizer.update, counts.update, lambda _, new: new,
    )  # fmt: skip

    nothing_between = accumulation == 1 and clip is None and sum_row_grads is add_row_grads_

    def init(params: Params) -> TrainState:
        params = params_of(params, [t.device for t in plan.tables])
        device = next(iter(params.values())).device
        window = {name: torch.zeros_like(p) for name, p in params.items()} if accumulation > 1 else {}
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return TrainState(
            params=params,
            dense=dense_optimizer.init(params),
            tables=tuple(t.init() for t in tables),
            metrics=counts.init(device),
            window=Window(window, zero, zero.clone()),
        )

    def read(batch: Mapping[str, Any]) -> dict[str, Any]:
        check_batch(batch)
        feats = features(batch)
        check_features(feats, label, sample_weight)
        return {NUM_SAMPLES: batch[NUM_SAMPLES], **feats}

    def total_loss(params: Params, blocks: list[list[Tensor]], found: list[Found], feats: dict, valid: Tensor) -> Any:
        emb = _groups(plan, blocks, found)
        logit = forward(params, emb, feats)
        check_logit(logit, feats, label, sample_weight)
        loss_B = loss(logit, feats[label].float())
        check_loss(loss_B, logit)
        loss_B = loss_B if sample_weight is None else loss_B * feats[sample_weight]
        loss_B = torch.where(valid, loss_B, 0.0)
        return loss_B.sum(), (logit, loss_B)

    gradients = torch.func.grad(total_loss, argnums=(0, 1), has_aux=True)

    def spell(do: _Spelling) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Aux]]:
        def fused(t: Table, s: TableState) -> Callable[..., TableState] | None:
            """The sum of row gradients and the sparse optimiser as one kernel, where that is faster."""
            is_faster = do is in_place and nothing_between and s.rows.device.type in FUSED_ON
            return sparse_optimizer.fused_for(t.columns) if is_faster else None

        def update(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Aux]:
            check_state(state, TrainState, plan, sparse_optimizer, accumulation)
            feats = read(batch)
            valid = _valid(feats, label)
            inserted = [do.insert(t)(s, feats) for t, s in zip(tables, state.tables, strict=True)]
            found = [f for _, f in inserted]
            blocks = [t.pool(s, f) for t, (s, f) in zip(tables, inserted, strict=True)]
            (grads, block_grads), (logit, loss_B) = gradients(state.params, blocks, found, feats, valid)
            states = [
                s if fused(t, s) else do.add_grads(t)(s, f, g)
                for t, (s, f), g in zip(tables, inserted, block_grads, strict=True)
            ]

            window, num_samples = state.window, batch[NUM_SAMPLES]
            total, num_batches = window.num_samples + num_samples, window.num_batches + 1
            due = num_batches >= accumulation
            scale = 1.0 / total.clamp(min=1).float()
            if accumulation > 1:
                grads = {name: window.grads[name] + g for name, g in grads.items()}
            scale = scale if clip is None else clip(grads, states, scale)
            dense, params = do.dense(state.dense, state.params, grads, scale, due if accumulation > 1 else None)
            left = {name: do.store(g, torch.where(due, 0.0, grads[name])) for name, g in window.grads.items()}
            window = Window(
                left, do.store(window.num_samples, total * ~due), do.store(window.num_batches, num_batches * ~due)
            )
            if life is not None:
                states = [do.count_steps(t)(s, due) for t, s in zip(tables, states, strict=True)]
            states = [
                one(s, t.occurrences(f, g), scale, due) if (one := fused(t, s)) else do.sparse(s, scale, due, t.columns)
                for t, s, f, g in zip(tables, states, found, block_grads, strict=True)
            ]
            counted = do.metrics(state.metrics, logit, feats[label], loss_B, valid)
            aux = Aux(loss_B.sum() / num_samples.clamp(min=1), logit, num_samples.clone(), feats.get(COUNTS, {}))
            return TrainState(params, dense, tuple(states), counted, window), aux

        return update

    def look_up(state: TrainState, feats: dict) -> tuple[list[list[Tensor]], list[Found]]:
        found = [t.find(s, feats) for t, s in zip(tables, state.tables, strict=True)]
        return [t.pool(s, f) for t, s, f in zip(tables, state.tables, found, strict=True)], found

    def evaluate_(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Aux]:
        check_state(state, TrainState, plan, sparse_optimizer, accumulation)
        feats = read(batch)
        valid = _valid(feats, label)
        _, (logit, loss_B) = total_loss(state.params, *look_up(state, feats), feats, valid)
        counts.update_(state.metrics, logit, feats[label], loss_B, valid)
        loss_mean = loss_B.sum() / batch[NUM_SAMPLES].clamp(min=1)
        return state, Aux(loss_mean, logit, batch[NUM_SAMPLES].clone(), feats.get(COUNTS, {}))

    def predict(state: TrainState, batch: Mapping[str, Any]) -> Tensor:
        check_state(state, TrainState, plan, sparse_optimizer, accumulation)
        feats = read(_filled(batch, label, sample_weight))
        logit = forward(state.params, _groups(plan, *look_up(state, feats)), feats)
        check_logit(logit, feats, label, None)
        return logit

    def flush_(state: TrainState) -> TrainState:
        due = state.window.num_batches > 0
        scale = 1.0 / state.window.num_samples.clamp(min=1).float()
        if accumulation > 1:
            scale = scale if clip is None else clip(state.window.grads, state.tables, scale)
            dense_optimizer.update_(state.dense, state.params, state.window.grads, scale, due)
            for t, s in zip(tables, state.tables, strict=True):
                if life is not None:
                    t.count_steps_(s, due)
                sparse_optimizer.apply_(s, scale, due, t.columns)
            for tensor in (*state.window.grads.values(), *state.window[1:]):
                tensor.zero_()
        return state

    def ids_in(batch: Mapping[str, Any]) -> tuple[int, ...]:
        feats = read(_filled(batch, label, sample_weight))
        return tuple(sum(ids_of(feats, l.feature).values.numel() for l in t.lookups) for t in plan.tables)

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

    functions = init, spell(pure), spell(in_place), evaluate_, predict, flush_, ids_in, grow_, sweep_
    kept = (*sparse_optimizer.slots, *sparse_optimizer.row_slots)
    sweep_every = 0 if life is None else life.every if life.at_cap == "refuse" else 1
    return Step(*functions, plan, accumulation, sweep_every, seed, kept, precision)


def _valid(feats: dict, label: str) -> Tensor:
    """bool [B, 1]: the samples that are not padding."""
    return torch.arange(feats[label].shape[0], device=feats[label].device)[:, None] < feats[NUM_SAMPLES]


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
            divisor = _divisor(c.combiner, found[c.table].ragged[c.lookup])
            parts.append(part if divisor is None else part / divisor[:, None, None])
        same = len({part.shape[2] for part in parts}) == 1
        groups[name] = torch.cat(parts if same else [part.flatten(1) for part in parts], dim=1)
    return groups


def _divisor(combiner: str | Tile, ids: Ragged) -> Tensor | None:
    """What the sum of each list's weighted rows is divided by, [B]."""
    if combiner not in ("mean", "sqrtn"):
        return None
    if ids.weights is None:
        count = ids.offsets.diff().clamp(min=1)
        return count if combiner == "mean" else count.sqrt()
    sums = list_sums(ids.weights if combiner == "mean" else ids.weights.square(), ids.offsets)
    sums = sums if combiner == "mean" else sums.sqrt()
    return torch.where(sums == 0, 1, sums)
