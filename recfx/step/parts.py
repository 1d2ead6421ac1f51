"""What is fixed when a step is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recfx.context import Forward
from recfx.dist.exchange import Exchange
from recfx.embeddings import Plan
from recfx.generators import Draws
from recfx.metrics import BinaryCounts, Metric
from recfx.optim import DenseOptimizer, SparseOptimizer
from recfx.step.checks import check_loss, check_state
from recfx.step.state import OnNonFinite
from recfx.table import Table, TableState
from recfx.table.policies import Life
from recfx.types import Params

__all__ = ["Clip", "Features", "StepParts", "Task"]

Features = dict[str, Any]  # by name, `recfx.types.NUM_SAMPLES` among them
Clip = Callable[[Params, Sequence[TableState], Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a logit is trained for: its target, its loss, and what is counted of it. A step has one.

    Args:     label: name of the feature [B, 1] that holds the target.
              loss: (logit, label) -> loss per sample [B, 1].
              sample_weight: name of the feature [B, 1] that multiplies each sample's loss. None: all are 1.
              metrics: what is counted.
              counts_labels: whether labels outside [0, 1] are counted too.
              sums_exactly: whether sums of a batch are rounded to multiples of 2**-20, which f64 adds exactly: sums of
              many batches are then the same in any order.
    """

    label: str
    loss: Callable[[Tensor, Tensor], Tensor]
    sample_weight: str | None
    metrics: Metric
    counts_labels: bool
    sums_exactly: bool = False

    @property
    def columns(self) -> list[str]:
        """Names of the features that it reads, which a request for a prediction may lack."""
        return [self.label] if self.sample_weight is None else [self.label, self.sample_weight]

    def init(self, device: torch.device) -> BinaryCounts:
        """Counts of no sample."""
        counts = self.metrics.init(device)
        return counts if self.counts_labels else counts._replace(sums=counts.sums[:5].clone())

    def losses(self, logit: Tensor, feats: Mapping[str, Any], valid: Tensor) -> Tensor:
        """The weighted loss of each sample [B, 1], 0 for padding."""
        # A logit of padding may be NaN: no multiple of its slope is 0.
        loss_B = self.loss(torch.where(valid, logit, 0.0), feats[self.label].float())
        check_loss(loss_B, logit)
        loss_B = loss_B if self.sample_weight is None else loss_B * feats[self.sample_weight]
        return torch.where(valid, loss_B, 0.0)

    def count_(
        self, counts: BinaryCounts, logit: Tensor, feats: Mapping[str, Any], loss_B: Tensor, valid: Tensor
    ) -> BinaryCounts:
        """Adds the valid samples to the counts."""
        args = logit, feats[self.label], loss_B, valid
        if not self.sums_exactly:
            return self.metrics.update_(counts, *args)
        new = self.metrics.update_(counts._replace(sums=torch.zeros_like(counts.sums)), *args)
        counts.sums.add_((new.sums * 2**20).round() * 2**-20)
        return counts


@dataclass(frozen=True, kw_only=True, eq=False)
class StepParts:
    """What a step is made of. Its functions take this first."""

    features: Callable[[Any], Features]
    forward: Forward
    task: Task
    plan: Plan
    tables: tuple[Table, ...]
    sparse: SparseOptimizer
    dense: DenseOptimizer
    clip: Clip | None
    accumulation: int
    life: Life | None
    seed: int
    on_nonfinite: OnNonFinite
    fuses: bool  # whether nothing comes between the sums of row gradients and the sparse optimiser
    draws: Draws
    exchange: Exchange | None  # where ranks share tables

    @property
    def skips(self) -> bool:
        """Whether a micro-batch with NaN or infinity is left out."""
        return self.on_nonfinite == "skip"

    def check(self, state: Any) -> None:
        """Raises TypeError when it is not a training state, ValueError when it is another step's."""
        check_state(state, plan=self.plan, optimizer=self.sparse, accumulation=self.accumulation)
