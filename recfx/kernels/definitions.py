"""The specification of a program: its operators replaced by their definitions in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from recfx.kernels.op import DEFINITIONS

__all__ = ["definitions"]


class definitions(TorchDispatchMode):  # noqa: N801 - used as a function is: `with definitions():`
    """In this context every operator of recfx runs its definition, on any device, also inside torch.func.grad.

    The pure `update` of a step is `update_` on a copy of the state in this context.

    Cost:     a call of Python per operator of torch: for tests and small tables.
    Example:  >>> import torch
              >>> from recfx.kernels.lists.order_lists import list_sums
              >>> with definitions():
              ...     list_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3], dtype=torch.int32))
              tensor([3., 4.])
    """

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return DEFINITIONS.get(func.name(), func)(*args, **(kwargs or {}))
