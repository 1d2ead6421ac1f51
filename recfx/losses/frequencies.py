"""How often an item occurs in a stream of batches: the log q of `in_batch_softmax`, in the statistics of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.context import Context, Stats
from recfx.kernels.index.hashing import GOLDEN, mix

__all__ = ["init_frequencies", "update_frequencies"]

SEEN, GAP = "frequencies.seen", "frequencies.gap"


def init_frequencies(num_buckets: int = 2**16) -> Stats:
    """The statistics of `update_frequencies`, for `step.init(params, stats=...)`.

    Args:     num_buckets: items are hashed to so many; items of one bucket count as one.
    Shapes:   frequencies.seen i64 [num_buckets], the step that saw the bucket last; frequencies.gap f32 [num_buckets].
    """
    return {SEEN: torch.zeros(num_buckets, dtype=torch.int64), GAP: torch.zeros(num_buckets)}


def update_frequencies(context: Context, ids: Tensor, *, rate: float = 0.01) -> tuple[Tensor, Stats]:
    """log q of each sample's item, and the statistics after this batch.

        gap' = (1 - rate) gap + rate (step - seen),  q = 1 / gap'

    gap is the mean number of steps from one batch that has an item of the bucket to the next; a bucket's first gap is
    taken as it is. Only training keeps the new statistics. Under accumulation a step counts once for a bucket.

    Args:     context: of `forward`.  ids: i64 [B], see `recfx.losses.item_ids`.
    Returns:  f32 [B, 1], at most 0; the new statistics.
    Ref:      Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys.
    """
    seen, gap = context.stats[SEEN], context.stats[GAP]
    num_buckets = len(seen)
    bucket = mix(ids * GOLDEN) % num_buckets
    passed = (context.step - seen[bucket]).clamp(min=1).float()
    is_first = seen[bucket] == 0
    is_new = context.step > seen[bucket]  # another micro-batch of the step may have counted it
    new_gap = torch.where(is_first, passed, torch.lerp(gap[bucket], passed, rate))
    new_gap = torch.where(is_new, new_gap, gap[bucket])
    # Equal items of a batch write the same numbers; padding writes past the end.
    at = torch.where(context.valid[:, 0], bucket, num_buckets)
    stats = {
        SEEN: torch.cat([seen, seen[:1]]).scatter(0, at, context.step.expand(len(at)))[:num_buckets],
        GAP: torch.cat([gap, gap[:1]]).scatter(0, at, new_gap)[:num_buckets],
    }
    return -new_gap.clamp(min=1.0).log()[:, None], stats
