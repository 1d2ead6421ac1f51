"""Norms, age and frequency of the rows of a logical table."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.rows.views import live_rows, view_of
from recfx.step import Step, TrainState

__all__ = ["Statistics", "Summary", "statistics"]


class Summary(NamedTuple):
    """A summary of one number per row; NaN without rows."""

    mean: float
    min: float
    median: float
    p99: float
    max: float


class Statistics(NamedTuple):
    """Summaries of the rows of a logical table."""

    num_rows: int
    norm: Summary  # Euclidean, of the weights
    age: Summary  # steps since the row was created
    idle: Summary  # steps since a step touched it
    num_steps: Summary  # how many steps touched it; 0 unless the step has a `Life`


def statistics(step: Step, state: TrainState, table: str) -> Statistics:
    """Norms, age and frequency of a table's rows, of several ranks this one's. For one number per row read `batches`.

    Cost:     one pass over the weights; sorts four numbers per row.
    Raises:   ValueError on an unknown table.
    """
    view = view_of(step, state, table)
    t, row = view.table, live_rows(view)
    norm = torch.linalg.vector_norm(view.tensors["weight"][: int(t.num_rows)], dim=1)[row]
    age, idle = t.step - t.born[row], t.step - (t.seen[row] >> 32)
    return Statistics(row.numel(), *map(_summary, (norm, age, idle, t.counts[row])))


def _summary(values: Tensor) -> Summary:
    if not values.numel():
        return Summary(*[math.nan] * 5)
    rising = values.double().sort().values
    at = [0, *(math.ceil(q * rising.numel()) - 1 for q in (0.5, 0.99)), -1]
    return Summary(float(rising.mean()), *rising[at].tolist())
