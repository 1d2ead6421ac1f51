"""Many workers: the ranks that torchrun starts train one model, each holding a share of every table.

`join` makes the group. `train_step(group=...)` then exchanges ids, rows and gradients within the step.
"""

from recfx.dist.group import Group, RankError, current, join, leave

__all__ = ["Group", "RankError", "current", "join", "leave"]
