"""Losses of a whole batch: each sample's item against the items of the other samples.

They take (output, features, valid) with output = {"query": [B, D], "item": [B, D]}, and give f32 [B, 1]. Padding is
never a negative, nor is a sample with the same item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recfx.types import Ragged

__all__ = ["Bpr", "InBatchSoftmax", "bpr", "in_batch_softmax", "is_negative", "item_ids", "scores_of"]

NEVER = -1e9  # score of what is not a negative: not -inf, whose slope is NaN where nothing else is left


@dataclass(frozen=True)
class InBatchSoftmax:
    """See `in_batch_softmax`."""

    item: str
    temperature: float
    log_q: bool

    def __call__(self, output: Mapping[str, Tensor], feats: Mapping[str, Any], valid: Tensor) -> Tensor:
        scores, own = scores_of(output)
        scores, own = scores / self.temperature, own / self.temperature
        if self.log_q:
            log_q = output["log_q"].detach()
            scores, own = scores - log_q.T, own - log_q
        others = scores.masked_fill(~is_negative(feats, self.item, valid), NEVER).logsumexp(dim=1, keepdim=True)
        return torch.where(valid, softplus(others - own), 0.0)


@dataclass(frozen=True)
class Bpr:
    """See `bpr`."""

    item: str

    def __call__(self, output: Mapping[str, Tensor], feats: Mapping[str, Any], valid: Tensor) -> Tensor:
        scores, own = scores_of(output)
        negative = is_negative(feats, self.item, valid)
        pairs = torch.where(negative, softplus(scores - own), 0.0)
        mean = pairs.sum(1, keepdim=True) / negative.sum(1, keepdim=True).clamp(min=1)
        return torch.where(valid, mean, 0.0)


def in_batch_softmax(*, item: str, temperature: float = 1.0, log_q: bool = False) -> InBatchSoftmax:
    """Softmax cross entropy of each query's own item among the items of the batch.

        loss_b = -log( exp(s_bb) / (exp(s_bb) + sum over negatives c of exp(s_bc)) )
        s_bc = <query_b, item_c> / temperature - log q_c

    Popular items are negatives more often. Subtracting log q_c, with q_c how often a batch has the item, corrects it.

    Args:     item: name of the feature i64 [B, 1], or Ragged with one id each, with the item of each sample.
              temperature: > 0.
              log_q: whether output["log_q"] f32 [B, 1] is subtracted, see `recfx.losses.update_frequencies`.
    Raises:   ValueError on a temperature that is not positive.
    Ref:      Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0. Scores are divided by it.")
    return InBatchSoftmax(item, temperature, log_q)


def bpr(*, item: str) -> Bpr:
    """The pairwise loss of each query's own item against every negative of the batch, averaged over them.

        loss_b = mean over negatives c of log(1 + exp(<query_b, item_c> - <query_b, item_b>))

    A sample without a negative has loss 0.

    Args:     item: as in `in_batch_softmax`.
    Ref:      Rendle et al. 2009, arXiv:1205.2618.
    """
    return Bpr(item)


def item_ids(feats: Mapping[str, Any], item: str) -> Tensor:
    """The item of each sample, i64 [B]. An empty list is item 0.

    Raises:   ValueError when there is no such feature.
    """
    if item not in feats:
        raise ValueError(f"feature '{item}': missing, expected the item of each sample. Return it in `features`.")
    column = feats[item]
    if not isinstance(column, Ragged):
        return column.reshape(len(column), -1)[:, 0]
    if column.values.numel() == 0:
        return column.values.new_zeros(column.num_samples)
    first = column.offsets[:-1].long()
    ids = column.values[first.clamp(max=column.values.numel() - 1)]
    return torch.where(column.offsets.diff() > 0, ids, 0)


def scores_of(output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """<query, item> of each pair, [B, B], and of each query and its own item, [B, 1]."""
    query, item = output["query"], output["item"]
    return query @ item.T, (query * item).sum(1, keepdim=True)


def is_negative(feats: Mapping[str, Any], item: str, valid: Tensor) -> Tensor:
    """bool [B, B]: whether the item of sample c is a negative of sample b."""
    ids = item_ids(feats, item)
    return (ids[:, None] != ids) & valid[:, 0]
