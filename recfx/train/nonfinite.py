"""The error on NaN or infinity in training: the step, the batch, the features, ids and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from recfx.step import Step, TrainState
from recfx.table import TableState, ids_of
from recfx.train.checks import described_by, place_of
from recfx.train.labels import check_labels
from recfx.train.ranks import group_of
from recfx.types import NUM_SAMPLES, Batch, Ragged

__all__ = ["check_finite", "find_nonfinite", "is_stopped"]

MOST_NAMED = 5
CHUNK_ROWS = 2**20


def is_stopped(step: Step, state: TrainState) -> bool:
    """Whether the step met NaN or infinity and is to stop then. Cost: one host read."""
    return step.on_nonfinite == "stop" and int(state.nonfinite.first_step) > 0


def check_finite(step: Step, state: TrainState, *, batch: Batch | None = None, where: str = "") -> None:
    """Raises when a loss, a logit or a gradient was NaN or infinite, and the step is one that stops then; and when a
    label was outside [0, 1], see `recfx.train.labels.check_labels`.

    Call it before each save and where a loop logs: the state remembers the first optimiser step that met one. Call it
    before metrics are reset, too: they hold the count of such labels.

    Args:     batch: the first one that was not finite, if it is known: its features are searched, and only its ids.
              where: the part of the error on where the batch was read.
    Ranks that train together must all call it: the error is then the same on all, and names the ranks.
    Cost:     two host reads; when it raises, a pass over the tables.
    Raises:   FloatingPointError naming the step, its micro-batch, and the features, ids and parameters with values that
              are not finite; ValueError of labels.
    """
    check_labels(step, state, where=where)
    if not is_stopped(step, state):
        return
    number, micro_batch = int(state.nonfinite.first_step), int(state.nonfinite.first_batch)
    feats = None if batch is None else step.read(Batch(batch.buffer.to(state.step.device), batch.layout))
    group = group_of(step)
    own = [
        *(_in_features(feats) if feats is not None else ()),
        *_in_rows(step, state, feats if group.world_size == 1 else None),  # an id's row may be on another rank
    ]
    by_rank = group.gather(own)
    found = [f"rank {rank}'s {one}" if group.world_size > 1 else one for rank, of in enumerate(by_rank) for one in of]
    found += [f"parameter '{name}'" for name, p in state.params.items() if not _is_finite(p)]
    named = "; ".join(found[:MOST_NAMED]) + f"; and {len(found) - MOST_NAMED} more" * (len(found) > MOST_NAMED)
    raise FloatingPointError(
        f"step {number}: got NaN or infinity as a loss, logit or gradient of micro-batch {micro_batch}{where}, "
        f"expected finite numbers. Not finite now: {named or 'nothing in the state'}. Nothing was saved since. Mend "
        "the feature or the model, or leave such batches out with train_step(on_nonfinite='skip')."
    )


def find_nonfinite(
    step: Step, state: TrainState, reader: Any, epoch: int, looked: int, position: dict | None
) -> tuple[Batch | None, str]:
    """The first batch that was not finite, read again from where all was finite, and its place for the error.

    Args:     reader: see `recfx.train.Reader`.  epoch: in progress, from 0.
              looked: optimiser step after which all was finite.  position: of the reader then, None at the start.
    """
    number, micro_batch = int(state.nonfinite.first_step), int(state.nonfinite.first_batch)
    place, batches = (number - 1 - looked) * step.accumulation + micro_batch, None
    try:
        batches = reader.epoch(epoch) if position is None else reader.start_at(position)
        stream = iter(batches)
        for _ in range(place):
            next(stream)
            position = batches.position
        where = place_of(position, epoch, described_by(batches))
        return next(stream), f", which {where}"
    except Exception as error:  # only the message suffers
        why = str(error) or type(error).__name__
        return None, f" of epoch {epoch + 1}, which could not be read again ({why})"
    finally:
        if batches is not None:
            batches.close()


def _in_features(feats: Mapping[str, Any]) -> Iterator[str]:
    num_samples = int(feats[NUM_SAMPLES])
    for name, value in feats.items():
        parts = _real_parts(value, num_samples)
        for part, t in parts.items():
            if isinstance(t, Tensor) and not _is_finite(t):
                bad = (~t.isfinite()).nonzero()[0].tolist()
                yield f"feature '{name}'{' ' * bool(part)}{part} has {t[tuple(bad)].item()} at {bad}"


def _real_parts(value: Any, num_samples: int) -> dict[str, Any]:
    """The tensors of a feature without padding, by the name of the part."""
    if isinstance(value, Ragged):
        end = int(value.offsets[-1])
        return {name: t[:end] for name, t in value.parts.items() if name in ("values", "weights")}
    return {"": value[:num_samples] if isinstance(value, Tensor) and value.dim() else value}


def _in_rows(step: Step, state: TrainState, feats: Mapping[str, Any] | None) -> Iterator[str]:
    """Features and the ids whose rows are not finite; of the batch where there is one."""
    for plan, table in zip(step.plan.tables, state.tables, strict=True):
        rows = _bad_rows(table)
        ids, vocabularies = table.ids[rows], table.vocabularies[rows]
        for lookup in plan.lookups:
            bad = ids[vocabularies == lookup.vocabulary]
            if feats is not None:
                bad = bad[torch.isin(bad, ids_of(dict(feats), lookup.feature).values)]
            if len(bad):
                more = f" and {len(bad) - MOST_NAMED} more" * (len(bad) > MOST_NAMED)
                yield f"feature '{lookup.feature}' id {', '.join(map(str, bad[:MOST_NAMED].tolist()))}{more}"


def _bad_rows(table: TableState) -> Tensor:
    """Numbers of live rows with a weight that is not finite."""
    num_rows, found = int(table.num_rows), []
    for first in range(0, num_rows, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, num_rows)
        finite = table.rows[first:last].flatten(1).isfinite().all(1) | (table.vocabularies[first:last] < 0)
        found.append((~finite).nonzero()[:, 0] + first)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _is_finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(t.isfinite().all())
