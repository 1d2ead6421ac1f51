"""A step captured as one compiled graph. The only module that knows of FX, torch.compile and the allocator."""

from __future__ import annotations

import ctypes
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recfx.step import Step
from recfx.types import Batch, Layout, unpack

__all__ = ["capture", "capture_evaluation", "sections_function"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def capture(step: Step, state: Any, batch: Batch) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The training step compiled as one graph: a callable of the signature of `step.update_`.

    The first call of each batch layout compiles (seconds; `batch` itself is not trained on and `state` not changed),
    later ones run without Python in between. Tables grow between calls without a recompile.

    Donation: the state passed in is written to; use the one that comes back. `aux` is valid until the next call.
    Raises:   TypeError when the batch is not packed; torch's error where a feature op or a model cannot be captured.
    """
    return _captured(step, step.update_, lambda s, ids: step.grow_(s, ids))


def capture_evaluation(step: Step, state: Any, batch: Batch) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The evaluation step compiled as one graph: changes the state's metrics alone."""
    return _captured(step, step.evaluate_, lambda s, ids: s)


def sections_function(update_: Callable, layout: Layout) -> Callable[[Any, list[Tensor]], Any]:
    """`update_` over the sections of a packed batch; returns aux alone, as every tensor of the state is in place."""

    def run(state: Any, sections: list[Tensor]) -> Any:
        return update_(state, unpack(sections, layout))[1]

    # Dynamo keeps its cache per code object: a copy gives each layout its own.
    code = run.__code__.replace(co_name="step")
    return types.FunctionType(code, run.__globals__, "step", run.__defaults__, run.__closure__)


def _captured(step: Step, update_: Callable, grow_: Callable) -> Callable[[Any, Batch], tuple[Any, Any]]:
    _keep_freed_memory()
    compiled: dict[Layout, tuple[Callable, tuple[int, ...]]] = {}

    def run(state: Any, batch: Batch) -> tuple[Any, Any]:
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: got {type(batch).__name__}, expected recfx.types.Batch. Use recfx.types.pack.")
        if batch.layout not in compiled:
            function = torch.compile(sections_function(update_, batch.layout), fullgraph=True, dynamic=False)
            compiled[batch.layout] = function, step.ids_in(batch)
        function, ids = compiled[batch.layout]
        state = grow_(state, ids)
        with torch.no_grad():
            return state, function(state, batch.sections)

    return run


@functools.cache
def _keep_freed_memory() -> None:
    """Lets the C allocator keep what a step frees for the next one, where it is glibc's.

    Activations of a few MB are otherwise returned to the system and faulted in again at every step: 1.3 to 1.7 times
    the time of a DeepFM step at batch 4096 and above. The process keeps its peak in exchange.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_MMAP_THRESHOLD, 2**30)
