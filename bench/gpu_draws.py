"""Row numbers as in the benchmark of dynamicemb, and uniform ones with as many unique rows.

dynamicemb's published case: a power law of exponent 1.05 over the capacity of a table, 24 M rows of 128 floats when all
are on the device. Ten tables share that capacity here: 104,857 draws over 2.4 M rows each hit about 36,300 rows, the
hottest 6,700 times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALPHA = 1.05
Draw = Callable[[int], Tensor]  # number of draws -> row numbers i64


def power_law(rows: int, *, device: str, alpha: float = ALPHA) -> Draw:
    """Row k of an order drawn once has a probability of about (k + 1) ** -alpha, k in [0, rows).

    A continuous power law on [1, rows + 1), rounded down, drawn by inverting the distribution function.
    """
    order = torch.randperm(rows, device=device)
    exponent = 1 - alpha
    most = (rows + 1) ** exponent

    def draw(num: int) -> Tensor:
        at = torch.rand(num, dtype=torch.float64, device=device)
        rank = (1 + at * (most - 1)) ** (1 / exponent)
        return order[(rank.long() - 1).clamp_(0, rows - 1)]

    return draw


def uniform(rows: int, pool: int, *, device: str) -> Draw:
    """Uniform draws from `pool` rows that are chosen once."""
    some = torch.randperm(rows, device=device)[:pool]
    return lambda num: some[torch.randint(0, pool, (num,), device=device)]
