"""Metrics of losses of a whole batch: how often a query's own item is among its best in the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.losses.in_batch import is_negative, scores_of
from recfx.metrics.binary import Metric

__all__ = ["RetrievalCounts", "retrieval_metrics"]


class RetrievalCounts(NamedTuple):
    """What a phase has predicted so far."""

    hits: Tensor  # i64 [len(at)], samples whose item is among the best 1, 10 ... of the batch
    sums: Tensor  # f64 [3]: samples, loss in nats, samples whose loss is not finite


def retrieval_metrics(*, item: str, at: Sequence[int] = (1, 10)) -> Metric:
    """Counts of hits within the batch, for outputs {"query": [B, D], "item": [B, D]}.

    Values: loss; hit_rate_1, hit_rate_10, the share of samples whose own item has fewer than 1, 10 negatives with an
    equal or larger <query, item>; num_samples, num_nonfinite. NaN as soon as one loss is not finite. They depend on the
    batch size: a larger batch has more negatives.

    Args:     item: see `recfx.losses.in_batch_softmax`: padding and equal items are not negatives.
    """
    ranks = tuple(at)

    def init(device: torch.device | str = "cpu") -> RetrievalCounts:
        hits = torch.zeros(len(ranks), dtype=torch.int64, device=device)
        return RetrievalCounts(hits, torch.zeros(3, dtype=torch.float64, device=device))

    def update_(
        counts: RetrievalCounts, output: Mapping[str, Tensor], feats: Mapping[str, Any], loss: Tensor, valid: Tensor
    ) -> RetrievalCounts:
        scores, own = scores_of(output)
        is_good = valid & loss.isfinite()
        before = (is_negative(feats, item, valid) & ~(scores < own)).sum(1, keepdim=True)
        counts.hits.add_(torch.stack([(is_good & (before < k)).sum() for k in ranks]))
        bad = (valid & ~is_good).sum().double()
        counts.sums.add_(torch.stack([valid.sum().double(), torch.where(is_good, loss.double(), 0.0).sum(), bad]))
        return counts

    def values(counts: RetrievalCounts) -> dict[str, float]:
        num, loss, bad = counts.sums.tolist()
        usable = num and not bad
        rates = {
            f"hit_rate_{k}": hits / num if usable else math.nan
            for k, hits in zip(ranks, counts.hits.tolist(), strict=True)
        }
        return {"loss": loss / num if usable else math.nan, **rates, "num_samples": num, "num_nonfinite": bad}

    return Metric(init, update_, values)
