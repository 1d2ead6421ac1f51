"""FTRL-proximal: the weight that minimises the linearised losses so far, close to the weights along the way.

    sigma = 1 / rate_t - 1 / rate_(t-1), with 1 / rate_t = (beta + sqrt(n)) / lr and 1 / rate_0 = 0
    z <- z + g - sigma w;   n <- n + g^2
    w <- 0 where |z| <= l1, elsewhere (sign(z) l1 - z) / ((beta + sqrt(n)) / lr + l2)

Ref: McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches", Alg. 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recfx.kernels.rows.optimizer_rows import ftrl_rows
from recfx.optim.building import Rate, SparseOptimizer, check_ranges, row_optimizer

__all__ = ["sparse_ftrl"]


def sparse_ftrl(lr: Rate, *, beta: float = 1.0, l1: float = 0.0, l2: float = 0.0) -> SparseOptimizer:
    """FTRL-proximal on the rows a step touched; every other row is left alone.

    Args:     lr: step size (the paper's alpha), >= 0: a float, a 0-d tensor, or a function of the steps taken.
              beta: >= 0.  l1: >= 0, makes weights exactly 0.  l2: >= 0; an embedding's own `weight_decay` replaces it.
    Slots:    z (times lr, so that a changing lr scales steps and not weights) and n in each row: 8 W bytes.
    Cost:     reads 4 U W floats, writes 3 U W.
    Differs:  from Alg. 1: weights may begin elsewhere than at 0, and the first step is then taken from there. Adagrad
              with beta for eps where l1 = l2 = 0.
    Raises:   ValueError on a value outside its range.
    """
    check_ranges(lr, beta=(beta, 0, math.inf), l1=(l1, 0, math.inf), l2=(l2, 0, math.inf))

    def scalars(t: Tensor, rate: Tensor, decay: Tensor | float) -> list[Tensor]:
        return [decay + torch.zeros_like(rate), rate, torch.full_like(t, beta), torch.full_like(t, l1)]

    return row_optimizer(ftrl_rows, scalars, lr, l2, slots=("z", "n"))
