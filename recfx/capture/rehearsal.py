"""What is wrong with a function that torch.compile rejects, as an error of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["mistake_in"]

MISTAKES = (TypeError, ValueError, AttributeError, LookupError)


def mistake_in(
    function: Callable[[Any, list[Tensor]], Any], state: Any, sections: Sequence[Tensor]
) -> Exception | None:
    """The error that the function raises uncompiled, on fake tensors: nothing is computed or changed.

    torch.compile puts a page of advice around the error of a feature function or a model. None without an error, and
    where it is one that only fake tensors have: torch.compile's is then the better one.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_state, fake_sections = tree_map_only(Tensor, mode.from_tensor, (state, list(sections)))
    try:
        with mode, torch.no_grad():
            function(fake_state, fake_sections)
    except Exception as error:
        return error if isinstance(error, MISTAKES) or type(error) is RuntimeError else None
    return None
