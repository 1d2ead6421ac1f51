"""The logical tables side by side in a row: their initial values, their rates, and what an id without a row has."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recfx.embeddings import TablePlan, column_key

__all__ = ["RowLayout", "columns_for", "initializer_tensors", "unknown_params"]


class RowLayout(NamedTuple):
    """The logical tables side by side in a row, as an optimiser sees them. Without rates all are alike."""

    dims: tuple[int, ...]  # their widths, W in sum
    rates: Tensor | None  # f64 [V, 2, W]: factor of the learning rate, weight decay (NaN: the optimiser's)


def columns_for(plan: TablePlan) -> RowLayout:
    """The logical tables of a physical one."""
    if all(c.lr_scale == 1 and c.weight_decay is None for columns in plan.vocabularies for c in columns):
        return RowLayout(plan.dims, None)
    rates = [
        [
            [c.lr_scale for c in columns for _ in range(c.dim)],
            [math.nan if c.weight_decay is None else c.weight_decay for c in columns for _ in range(c.dim)],
        ]
        for columns in plan.vocabularies
    ]
    return RowLayout(plan.dims, torch.tensor(rates, dtype=torch.float64, device=plan.device))


def initializer_tensors(plan: TablePlan, seed: int) -> tuple[Tensor, Tensor]:
    """keys i64 [V, W], params f32 [V, 3, W]."""
    keys = [[column_key(seed, c.name, d) for c in columns for d in range(c.dim)] for columns in plan.vocabularies]
    params = [
        [[part for c in columns for part in [c.init[i]] * c.dim] for i in range(3)] for columns in plan.vocabularies
    ]
    return torch.tensor(keys, device=plan.device), torch.tensor(params, dtype=torch.float32, device=plan.device)


def unknown_params(plan: TablePlan, init_params: Tensor) -> Tensor | None:
    """f32 [V, 3, W], `init_params` where an id without a row has its initial value, 0 elsewhere. None: all are 0."""
    kept = [[c.unknown == "initial" for c in columns for _ in range(c.dim)] for columns in plan.vocabularies]
    if not any(map(any, kept)):
        return None
    mask = nn.functional.pad(torch.tensor(kept), (0, init_params.shape[2] - plan.width)).to(plan.device)
    return torch.where(mask[:, None], init_params, 0.0)
