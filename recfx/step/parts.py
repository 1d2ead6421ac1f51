"""What is fixed when a step is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recfx.context import Forward
from recfx.dist.exchange import Exchange
from recfx.embeddings import Plan
from recfx.generators import Draws
from recfx.optim import DenseOptimizer, SparseOptimizer
from recfx.step.checks import check_state
from recfx.step.state import OnNonFinite
from recfx.step.tasks import Tasks
from recfx.table import Table, TableState
from recfx.table.policies import Life
from recfx.types import Params

__all__ = ["Clip", "Features", "StepParts"]

Features = dict[str, Any]  # by name, `recfx.types.NUM_SAMPLES` among them
Clip = Callable[[Params, Sequence[TableState], Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepParts:
    """What a step is made of. Its functions take this first."""

    features: Callable[[Any], Features]
    forward: Forward
    tasks: Tasks
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
    has_rate: bool  # whether the state holds a factor of all learning rates

    @property
    def skips(self) -> bool:
        """Whether a micro-batch with NaN or infinity is left out."""
        return self.on_nonfinite == "skip"

    def check(self, state: Any) -> None:
        """Raises TypeError when it is not a training state, ValueError when it is another step's."""
        check_state(state, plan=self.plan, optimizer=self.sparse, accumulation=self.accumulation)
