"""Losses of each sample by itself. The step masks padding and averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from recfx.checks import check_number

__all__ = ["bce_with_logits", "focal", "poisson", "squared_error"]


def bce_with_logits(logit_B: Tensor, label_B: Tensor) -> Tensor:
    """Binary cross entropy of each sample, in nats, from its logit.

    Shapes:   f32 [B, 1], f32 [B, 1] in [0, 1] -> f32 [B, 1].
    """
    return binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")


def focal(gamma: float = 2.0, alpha: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Focal loss: cross entropy with less weight for samples that are predicted well.

        loss = -y w_1 (1 - p)^gamma log p - (1 - y) w_0 p^gamma log(1 - p),  p = sigmoid(logit)

    Args:     gamma: >= 0; 0 is cross entropy.  alpha: w_1 = alpha and w_0 = 1 - alpha; None: both are 1.
    Returns:  (logit f32 [B, 1], label f32 [B, 1] in [0, 1]) -> f32 [B, 1].
    Raises:   ValueError when gamma is below 0 or alpha not in [0, 1].
    Ref:      Lin et al. 2017, arXiv:1708.02002.
    """
    check_number("gamma", gamma)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma: got {gamma}, expected 0 <= gamma < inf.")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected 0 to 1, the weight of clicks.")
    click, other = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def loss(logit_B: Tensor, label_B: Tensor) -> Tensor:
        log_p, log_q = logsigmoid(logit_B), logsigmoid(-logit_B)
        of_click = click * torch.exp(gamma * log_q) * log_p
        of_other = other * torch.exp(gamma * log_p) * log_q
        return -label_B * of_click - (1 - label_B) * of_other

    return loss


def squared_error(prediction_B: Tensor, label_B: Tensor) -> Tensor:
    """(prediction - label)^2 of each sample, of any label.

    Shapes:   f32 [B, 1], f32 [B, 1] -> f32 [B, 1].
    """
    return (prediction_B - label_B).square()


def poisson(logit_B: Tensor, label_B: Tensor) -> Tensor:
    """Negative log-likelihood of a count up to a constant: exp(logit) - label * logit. The prediction is exp(logit).

    Shapes:   f32 [B, 1], f32 [B, 1] >= 0 -> f32 [B, 1].
    """
    return logit_B.exp() - label_B * logit_B
