"""Losses per sample. The step masks padding and averages."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["bce_with_logits"]


def bce_with_logits(logit_B: Tensor, label_B: Tensor) -> Tensor:
    """Binary cross entropy of each sample, in nats, from its logit.

    Shapes:   f32 [B, 1], f32 [B, 1] in [0, 1] -> f32 [B, 1].
    """
    return binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")
