"""Optimisers as functions: of dense parameters (`adamw`), and of the rows that a step touched (`sparse_adamw`)."""

# Each module's __all__ is public here: a new optimiser is named in its own file only.
from recfx.optim import adagrad_family, adam_family, clipping, from_torch, ftrl_proximal, gradient_descent
from recfx.optim.adagrad_family import *  # noqa: F403
from recfx.optim.adam_family import *  # noqa: F403
from recfx.optim.building import DenseOptimizer, Rate, Schedule, SparseOptimizer
from recfx.optim.clipping import *  # noqa: F403
from recfx.optim.from_torch import *  # noqa: F403
from recfx.optim.ftrl_proximal import *  # noqa: F403
from recfx.optim.gradient_descent import *  # noqa: F403

__all__ = ["DenseOptimizer", "Rate", "Schedule", "SparseOptimizer"]
__all__ += adagrad_family.__all__
__all__ += adam_family.__all__
__all__ += clipping.__all__
__all__ += from_torch.__all__
__all__ += ftrl_proximal.__all__
__all__ += gradient_descent.__all__
