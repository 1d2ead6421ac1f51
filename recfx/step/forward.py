"""From a batch to its logit and loss; evaluation and prediction, which change no row and no parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.dist.exchange import Requests, note_
from recfx.embeddings import Lookup
from recfx.step.checks import check_batch, check_features
from recfx.step.parts import Features, StepParts
from recfx.step.state import Aux, Batch, TrainState
from recfx.step.tasks import Outputs
from recfx.table import Found, check_num_samples, groups_of, ids_of
from recfx.types import COUNTS, NUM_SAMPLES, Params, Ragged

__all__ = [
    "aux_of",
    "context_of",
    "evaluate_",
    "ids_in",
    "look_up",
    "num_ids",
    "predict",
    "read",
    "real_samples",
    "total_loss",
]


def read(parts: StepParts, batch: Batch) -> Features:
    """The features of a batch by name, NUM_SAMPLES among them."""
    check_batch(batch)
    feats = parts.features(batch)
    check_features(feats, parts.tasks.columns)
    return {NUM_SAMPLES: batch[NUM_SAMPLES], **feats}


def real_samples(parts: StepParts, feats: Features) -> Tensor:
    """bool [B, 1]: the samples that are not padding."""
    num_samples = feats[NUM_SAMPLES]
    return torch.arange(size_of(parts, feats), device=num_samples.device)[:, None] < num_samples


def size_of(parts: StepParts, feats: Features) -> int:
    """B, by a feature that tasks read or, where they read none, by any."""
    names = [name for _, name in parts.tasks.columns] or [n for n in feats if n not in (NUM_SAMPLES, COUNTS)]
    column = feats[names[0]]
    return column.num_samples if isinstance(column, Ragged) else column.shape[0]


def context_of(
    parts: StepParts, state: TrainState, valid: Tensor, *, training: bool, requests: Requests | None = None
) -> Context:
    """What `forward` is given besides parameters, embeddings and features."""
    sample = torch.arange(len(valid), device=valid.device)
    sample = sample if requests is None else sample + requests.first_sample
    return Context(
        training=training,
        valid=valid,
        stats=state.stats,
        seed=parts.seed,
        step=state.step + 1 if training else state.step,
        sample=state.window.num_samples + sample if training else sample,
    )


def total_loss(
    parts: StepParts,
    params: Params,
    rows: Sequence[Sequence[Tensor]],
    found: Sequence[Found],
    feats: Features,
    context: Context,
) -> tuple[Tensor, tuple[Outputs, Tensor, dict[str, Tensor], Stats]]:
    """The sum of the losses of a batch; then its outputs, the loss of each sample, that of each task, and the new
    statistics.

    Args:     rows: what each table pooled.
    """
    result, stats = parts.forward(params, groups_of(parts.plan, rows, found), feats, context)
    outputs = parts.tasks.outputs(result, feats, len(context.valid))
    loss_B, losses = parts.tasks.losses(outputs, feats, context.valid)
    return loss_B.sum(), (outputs, loss_B, losses, stats)


def evaluate_(parts: StepParts, state: TrainState, batch: Batch) -> tuple[TrainState, Aux]:
    """The loss of a batch, counted in the state's metrics."""
    parts.check(state)
    feats = read(parts, batch)
    context = context_of(parts, state, real_samples(parts, feats), training=False)
    rows, found, requests = look_up(parts, state, feats, inserts=False)
    _, (outputs, loss_B, losses, _) = total_loss(parts, state.params, rows, found, feats, context)
    valid = context.valid if requests is None else context.valid & requests.counts
    parts.tasks.count_(state.metrics, outputs, feats, losses, valid)
    return state, aux_of(parts, outputs, loss_B, feats)


def predict(parts: StepParts, state: TrainState, batch: Batch) -> Any:
    """The logit of a batch, f32 [B, 1]; of tasks, what `forward` returns for them."""
    parts.check(state)
    feats = read(parts, _filled(batch, [name for _, name in parts.tasks.columns]))
    context = context_of(parts, state, real_samples(parts, feats), training=False)
    rows, found, _ = look_up(parts, state, feats, inserts=False)
    result, _ = parts.forward(state.params, groups_of(parts.plan, rows, found), feats, context)
    return parts.tasks.given(parts.tasks.outputs(result, feats, len(context.valid), labelled=False))


def ids_in(parts: StepParts, batch: Batch) -> tuple[int, ...]:
    """Most ids per table that batches of this layout hold."""
    return num_ids(parts, read(parts, _filled(batch, [name for _, name in parts.tasks.columns])))


def num_ids(parts: StepParts, feats: Features) -> tuple[int, ...]:
    """Ids per table, with those that are padding; where ranks share tables, ids that this one may insert."""
    if parts.exchange is not None:
        return parts.exchange.fit([t.read(feats) for t in parts.tables])
    return tuple(sum(ids_of(feats, l.feature).values.numel() for l in t.lookups) for t in parts.plan.tables)


def lookups_of(parts: StepParts) -> list[Lookup]:
    """Those of all tables."""
    return [lookup for table in parts.plan.tables for lookup in table.lookups]


def aux_of(parts: StepParts, outputs: Outputs, loss_B: Tensor, feats: Features, mean_loss: Tensor | None = None) -> Aux:
    """What a step returns besides the state.

    Args:     mean_loss: over the samples of all ranks; None: of this process.
    """
    num_samples = feats[NUM_SAMPLES]
    mean_loss = loss_B.sum() / num_samples.clamp(min=1) if mean_loss is None else mean_loss
    return Aux(mean_loss, parts.tasks.given(outputs), num_samples.clone(), feats.get(COUNTS, {}))


def look_up(
    parts: StepParts, state: TrainState, feats: Features, *, inserts: bool
) -> tuple[list[list[Tensor]], list[Found], Requests | None]:
    """The pooled rows of each table, where they were found, and the requests between ranks; None: one process.

    Args:     inserts: new ids get rows, and all join the step.
    """
    check_num_samples(feats, lookups_of(parts))
    pairs, requests = list(zip(parts.tables, state.tables, strict=True)), None
    if parts.exchange is None:
        found = [(t.insert_ if inserts else t.find)(s, t.read(feats)) for t, s in pairs]
    else:
        readings = [t.read(feats) for t in parts.tables]
        requests = parts.exchange.request(readings, feats[NUM_SAMPLES])
        own = (parts.exchange.insert_ if inserts else parts.exchange.find)(state.tables, requests)
        found = parts.exchange.answer(readings, state.tables, requests, own)
        note_(state.exchange, requests)
    return [t.pool(s, f) for (t, s), f in zip(pairs, found, strict=True)], found, requests


def _filled(batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The batch with zeros f32 [B, 1] where it lacks a column of that name, as a request lacks its label."""
    check_batch(batch)
    column = next(column for name, column in batch.items() if name != NUM_SAMPLES)
    num = column.num_samples if isinstance(column, Ragged) else column.shape[0]
    return {name: torch.zeros(num, 1, device=batch[NUM_SAMPLES].device) for name in names} | {**batch}
