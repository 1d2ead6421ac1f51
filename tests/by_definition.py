"""The pure form of a function that writes into its first argument."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from recfx.kernels.definitions import definitions


def by_definition(update_: Callable, state: Any, *args: Any) -> tuple[Any, Any]:
    """A copy of the state that `update_` wrote into, and what it returned, with every operator in plain torch."""
    copy = tree_map(Tensor.clone, state)
    with definitions():
        return copy, update_(copy, *args)
