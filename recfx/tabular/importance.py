"""Which columns a model uses: how much AUC it loses when the values of one are exchanged between rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recfx.step import TrainState
from recfx.train import evaluate
from recfx.types import NUM_SAMPLES, Batch, Ragged, pack

__all__ = ["importance"]


def importance(
    run: Callable[..., Any],
    state: TrainState,
    batches: Any,
    columns: list[str],
    *,
    eval_steps: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The metrics of held-out batches, and by how much each changes when a column is permuted.

    The rows of each batch exchange their values of the column, by a permutation that depends on the seed, the column
    and the batch. Columns that say the same make each other look unimportant.

    Args:     run: `step.evaluate_` or its capture.  batches: a reader, read once for each column and once more.
              columns: of the batches, those that are permuted.  eval_steps: batches to read; None: all.
    Returns:  the metrics as they are, and by column the metrics without it minus these.
    Raises:   ValueError when the batches have no such column.
    """
    base = evaluate(run, state, batches, eval_steps=eval_steps)
    found = {}
    for number, column in enumerate(columns):
        values = evaluate(run, state, _Permuted(batches, column, seed * 1_000_003 + number), eval_steps=eval_steps)
        found[column] = {name: value - base[name] for name, value in values.items()}
    return base, found


class _Permuted:
    """Batches in which one column is permuted."""

    def __init__(self, batches: Any, column: str, seed: int) -> None:
        self.batches, self.column, self.seed = batches, column, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        for batch in self.batches:
            if self.column not in batch:
                raise ValueError(f"column '{self.column}': missing, expected it among {list(batch)}.")
            num = int(batch[NUM_SAMPLES])
            order = torch.randperm(num, generator=generator)
            columns = {name: batch[name] for name in batch}
            columns[self.column] = _permuted(columns[self.column], order)
            yield pack(columns, layout=batch.layout)


def _permuted(column: Tensor | Ragged, order: Tensor) -> Tensor | Ragged:
    """A column whose first rows are in another order; the others are padding."""
    if isinstance(column, Tensor):
        changed = column.clone()
        changed[: len(order)] = column[order]
        return changed
    *outer, offsets, places = *column.outer, column.offsets, None
    new: list[Tensor] = []
    order_of = order
    for level in (*outer, offsets):
        lengths = level.diff()
        taken = torch.cat([lengths[order_of], lengths[len(order_of) :]])
        new.append(torch.cat([level[:1], taken.cumsum(0).int()]))
        starts = level[:-1].long()[order_of]
        places = torch.repeat_interleave(starts - new[-1][: len(order_of)].long(), lengths[order_of].long())
        order_of = places + torch.arange(len(places))
    values, weights = column.values.clone(), column.weights
    values[: len(order_of)] = column.values[order_of]
    if weights is not None:
        weights = weights.clone()
        weights[: len(order_of)] = column.weights[order_of]  # type: ignore[index]
    return Ragged(values, new[-1], weights, tuple(new[:-1]))
