"""`train_step`: from a user's functions to the functions of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recfx.checks import check_choice, check_int, check_type
from recfx.context import Stats, with_context
from recfx.dist import Group, current
from recfx.dist.exchange import Exchange
from recfx.dist.group import exchanging
from recfx.embeddings import Embedding, plan_tables
from recfx.generators import Draws
from recfx.kernels.rows.add_row_grads import add_row_grads_
from recfx.layers import in_bf16
from recfx.losses import bce_with_logits
from recfx.metrics import Metric
from recfx.optim import DenseOptimizer, SparseOptimizer
from recfx.step.checks import check_bound, check_functions, check_kinds, params_of, stats_of, with_names
from recfx.step.forward import evaluate_, ids_in, predict, read
from recfx.step.gradients import gradient_norms
from recfx.step.parts import Clip, StepParts
from recfx.step.state import NonFinite, OnNonFinite, Precision, Step, TrainState, Window
from recfx.step.tasks import Task, tasks_of
from recfx.step.update import flush_, grow_, in_graph_, is_void_, update, update_
from recfx.table import Limits, is_full, is_sweep_due, table
from recfx.table import sweep_ as sweep_table_
from recfx.table.policies import Life
from recfx.types import Params

__all__ = ["train_step"]


# long: its arguments, and the Step by keyword
def train_step(
    *,
    features: Callable[[Any], dict[str, Any]],
    embeddings: Mapping[str, Sequence[Embedding]],
    forward: Callable[..., Any],
    sparse_optimizer: SparseOptimizer,
    dense_optimizer: DenseOptimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = bce_with_logits,
    label: str = "label",
    sample_weight: str | None = None,
    tasks: Task | Mapping[str, Task] | None = None,
    accumulation: int = 1,
    max_rows: int = 2**26,
    max_bytes: int | None = None,
    max_unique: int | None = None,
    life: Life | None = None,
    seed: int = 42,
    metrics: Metric | None = None,
    clip: Clip | None = None,
    sum_row_grads: Callable[..., None] = add_row_grads_,
    precision: Precision = "fp32",
    on_nonfinite: OnNonFinite = "stop",
    check_labels: bool | None = None,
    rate_factor: bool = False,
    group: Group | None = None,
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
              tasks: in place of loss, label, sample_weight, metrics and check_labels: a `recfx.step.Task`, or several
              by name. For several, `forward` returns a dict of outputs by task, and so do `predict` and `aux.logit`;
              metrics are named "click/auc".
              accumulation: micro-batches per optimiser step. The step equals one on their concatenation: gradients are
              summed over valid samples and divided by their total.
              max_rows, max_bytes, max_unique: of every physical table, see `recfx.table.Limits`.
              seed: of the tables' initial weights and of the random numbers of `recfx.context.Context`.
              metrics: what the step counts, such as `recfx.metrics.binary_metrics(2**10)`, see `recfx.metrics.Metric`;
              None: binary_metrics().
              life: which ids get a row and which rows are deleted, see `recfx.table.policies`. None: all, and none.
              clip: (dense gradients, tables, scale) -> scale of all gradients, such as `recfx.optim.clip_global_norm`.
              sum_row_grads: how the gradients of a row are summed, in f32: of 2**24 occurrences or more in a step small
              terms may be lost. The default adds occurrences in order, the same bytes from run to run; on a GPU, where
              nothing comes between the sum and the optimiser, the two are one kernel.
              `recfx.kernels.rows.add_row_grads.add_row_grads_atomic_` adds them as they come on a GPU.
              precision: of the products of matrices in `forward` and its gradients; all else is f32. "bf16": see
              `recfx.layers.in_bf16`. "tf32": on CUDA, in captured steps, operands keep 10 bits of their mantissa.
              on_nonfinite: what follows when a loss, a logit or a gradient is NaN or infinite. "stop": the state shows
              in which step it happened first, and `recfx.train` raises before it saves or logs. "skip": the micro-batch
              is left out. Parameters, rows, optimiser states, statistics and metrics stay as they were, its samples
              are not counted, and rows that it inserted keep their initial value. "ignore": nothing is looked for.
              check_labels: whether labels of real samples that are not in [0, 1], NaN too, are counted, so that
              `recfx.train` raises before it saves or logs, and after an evaluation. None: with the default loss, which
              has no minimum at such a label. False accepts them; True checks them with another loss too.
              rate_factor: whether the state holds `rate` f64 [], 1 at first, which multiplies all learning rates: a
              loop can lower them without another graph, see `recfx.train.TrainConfig.reduce_after`.
              group: the ranks that train this model together, see `recfx.dist`. None: the group that this process has
              joined, or one process.
    Raises:   ValueError when accumulation is below 1, precision or on_nonfinite is not one of the words above, or a
              table's limits or `life` do not fit; TypeError when a part is of another type, such as an optimiser of
              `torch.optim`.
    """
    check_functions(features=features, forward=forward, clip=clip)
    check_kinds(sparse_optimizer=sparse_optimizer, dense_optimizer=dense_optimizer, life=life)
    alone = {"label": label, "loss": loss, "sample_weight": sample_weight, "metrics": metrics}
    of_tasks = tasks_of(tasks, {**alone, "check_labels": check_labels})
    check_int("accumulation", accumulation, 1)
    check_type("rate_factor", rate_factor, bool)
    check_choice("precision", precision, get_args(Precision))
    check_choice("on_nonfinite", on_nonfinite, get_args(OnNonFinite))
    check_bound(sparse_optimizer, accumulation, max_unique)
    plan = plan_tables(embeddings)
    limits = Limits(max_rows=max_rows, max_bytes=max_bytes, max_unique=max_unique)
    table_of = partial(
        table, optimizer_slots=len(sparse_optimizer.slots), row_slots=len(sparse_optimizer.row_slots), seed=seed,
        limits=limits, life=life, sum_row_grads=sum_row_grads,
    )  # fmt: skip
    forward = with_names("forward", with_context(forward), "params", "embeddings", "features")
    group = current() if group is None else group
    tables = tuple(map(table_of, plan.tables))
    exchange = None
    if group is not None and (group.world_size > 1 or group.deterministic):
        counting = life is not None and life.admit is not None and life.candidates > 0
        exchange = Exchange(group, plan.tables, tables, sum_row_grads, distinct=not counting)
        accumulation *= group.rounds
        clip = _clip_of_all(clip, exchange)
    parts = StepParts(
        features=with_names("features", features, "columns"),
        forward=in_bf16(forward) if precision == "bf16" else forward,
        tasks=replace(of_tasks, sums_exactly=exchange is not None and exchange.group.deterministic),
        plan=plan,
        tables=tables,
        sparse=sparse_optimizer,
        dense=dense_optimizer,
        clip=clip,
        accumulation=accumulation,
        life=life,
        seed=seed,
        on_nonfinite=on_nonfinite,
        fuses=accumulation == 1
        and clip is None
        and sum_row_grads is add_row_grads_
        and on_nonfinite != "skip"
        and exchange is None,
        draws=Draws(),
        exchange=exchange,
        has_rate=rate_factor,
    )
    return _step_of(parts, precision)


def _step_of(parts: StepParts, precision: Precision) -> Step:
    life = parts.life
    return Step(
        init=partial(_init, parts),
        update=partial(update, parts),
        update_=partial(update_, parts),
        in_graph_=partial(in_graph_, parts),
        evaluate_=_knowing(parts, _repeating(parts, evaluate_)),
        predict=_repeating(parts, predict),
        flush_=partial(flush_, parts),
        ids_in=partial(ids_in, parts),
        grow_=partial(grow_, parts),
        sweep_=partial(_sweep_, parts),
        gradient_norms=partial(gradient_norms, parts),
        read=partial(read, parts),
        plan=parts.plan,
        accumulation=parts.accumulation,
        sweep_every=0 if life is None else life.every if life.at_cap == "refuse" else 1,
        seed=parts.seed,
        slots=(*parts.sparse.slots, *parts.sparse.row_slots),
        precision=precision,
        on_nonfinite=parts.on_nonfinite,
        tasks=parts.tasks,
        draws=parts.draws,
        evaluate_in_graph_=partial(evaluate_, parts),
        predict_in_graph=partial(predict, parts),
        exchange=parts.exchange,
    )


def _knowing(parts: StepParts, evaluate: Any) -> Callable:
    """`evaluate` with what `recfx.train.evaluate` has to know of its step, which it is not given."""
    evaluate.tasks, evaluate.read = parts.tasks, partial(read, parts)
    return evaluate


def _repeating(parts: StepParts, function: Callable) -> Callable:
    """`function` of a state and a batch, run again where ranks have found a bucket too small."""
    if parts.exchange is None:
        return partial(function, parts)

    def run(state: TrainState, batch: Any) -> Any:
        with exchanging():
            while True:
                ids_in(parts, batch)  # sets the capacities
                result = function(parts, state, batch)
                if not is_void_(parts, state):
                    return result

    return run


def _clip_of_all(clip: Clip | None, exchange: Exchange) -> Clip | None:
    """`clip` over the gradients of all ranks, each of which has the rows that it owns."""
    if clip is None or exchange.group.world_size == 1:
        return clip
    if "total" not in signature(clip).parameters:
        raise ValueError(
            "clip: got a function without a parameter 'total', expected one on several ranks. Each rank has the "
            "gradients of the rows that it owns only. Take `total`, a function that sums a number f64 [] over all "
            "ranks, as recfx.optim.clip_global_norm does."
        )
    of_all: Any = clip
    return partial(of_all, total=exchange.total)


def _as_on_first(parts: StepParts, params: Params, stats: Stats) -> tuple[Params, Stats]:
    """Rank 0's parameters and statistics. Raises ValueError when the ranks have built different steps."""
    assert parts.exchange is not None
    group = parts.exchange.group
    shapes = {name: tuple(t.shape) for name, t in {**params, **stats}.items()}
    same = {"seed": parts.seed, "accumulation": parts.accumulation, "embeddings": parts.plan.widths}
    for what, value in {**same, "parameters": shapes}.items():
        group.check_same(what, value)
    if group.world_size > 1:
        params, stats = ({name: t.detach().clone() for name, t in ts.items()} for ts in (params, stats))
        group.from_first_([*params.values(), *stats.values()])
    return params, stats


def _init(parts: StepParts, params: Params, *, stats: Stats | None = None) -> TrainState:
    params = params_of(params, [t.device for t in parts.plan.tables])
    if parts.exchange is not None:
        params, stats = _as_on_first(parts, params, {} if stats is None else stats)
    device = next((p.device for p in params.values()), torch.device(parts.plan.tables[0].device))

    def counter() -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=device)

    sums = {name: torch.zeros_like(p) for name, p in params.items()} if parts.accumulation > 1 else {}
    return TrainState(
        step=counter(),
        params=params,
        stats=stats_of({} if stats is None else stats, device),
        dense=tree_map(lambda t: t.to(device), parts.dense.init(params)),
        tables=tuple(t.init() for t in parts.tables),
        metrics=parts.tasks.init(device),
        window=Window(grads=sums, num_samples=counter(), num_batches=counter()),
        nonfinite=NonFinite(first_step=counter(), first_batch=counter(), num_batches=counter()),
        exchange=() if parts.exchange is None else parts.exchange.init(),
        rate=torch.ones((), dtype=torch.float64, device=device) if parts.has_rate else (),
    )


def _sweep_(parts: StepParts, state: TrainState, number: int) -> TrainState:
    life = parts.life
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
