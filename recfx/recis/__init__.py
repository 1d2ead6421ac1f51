"""For teams that come from RecIS: loads its checkpoints, and computes its metrics to compare numbers."""

from recfx.recis.loading import load_recis
from recfx.recis.metrics import auc_200, threshold_auc

__all__ = ["auc_200", "load_recis", "threshold_auc"]
