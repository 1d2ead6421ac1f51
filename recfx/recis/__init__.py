"""What teams that come from RecIS need: its checkpoints, and its metrics for comparing numbers."""

from recfx.recis.loading import load_recis
from recfx.recis.metrics import auc_200, threshold_auc

__all__ = ["auc_200", "load_recis", "threshold_auc"]
