"""A CPU in a GPU's place, for a dry run of bench/gpu*.py: what they ask of torch.cuda and of torch's profiler.

Only modules of bench see a device: torch and recfx still compute on a CPU. An event is a time of the host. A graph
keeps the operators that ran while it was recorded, Triton's kernels excepted, and runs them again on the same tensors.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

NAME = "stand-in for a GPU"


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max(1e3 * (other.at - self.at), 1e-6)


class Graph:
    def __init__(self) -> None:
        self.calls: list[Any] = []  # (operator, args, kwargs, results)

    def replay(self) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def is_interpreting() -> bool:
    """Whether the caller is Triton's interpreter, which copies a kernel's arguments."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals["__name__"] == "triton.runtime.interpreter":
            return True
    return False


@contextmanager
def recording(graph: Graph, **_: Any) -> Iterator[None]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = function(*args, **(kwargs or {}))
            if not is_interpreting():
                graph.calls.append((function, args, kwargs or {}, results))
            return results

    with Keep():
        yield


def profile_with(original: Any) -> Any:
    """torch's profiler of the CPU, whose operators it gives out as the device's kernels."""

    @contextmanager
    def profile(activities: Any) -> Iterator[Any]:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity

        assert list(activities) == [ProfilerActivity.CUDA]
        seen: list[Any] = []
        with original(activities=[ProfilerActivity.CPU]) as profiler:
            yield SimpleNamespace(events=lambda: seen)
        seen += [
            SimpleNamespace(
                name=event.name, device_type=DeviceType.CUDA, time_range=event.time_range, is_user_annotation=False
            )
            for event in profiler.events()
            if not event.cpu_children
        ]

    return profile


def is_available() -> bool:
    caller = sys._getframe(1).f_globals
    return "bench" in (caller["__name__"].partition(".")[0], (caller.get("__package__") or ""))


def install() -> None:
    """Triton's kernels of bench are interpreted; where the device is named, it is the CPU."""
    if any(word in sys.orig_argv for word in ("bench.gpu_ceilings", "bench.gpu_toolchain")):
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    cuda = torch.cuda
    cuda.is_available = is_available
    cuda.get_device_name = lambda *_: NAME
    cuda.mem_get_info = lambda *_: (2**40, 2**40)
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.Event, cuda.CUDAGraph, cuda.graph = Event, Graph, recording
    torch.profiler.profile = profile_with(torch.profiler.profile)
    if "bench.gpu_timing" not in sys.orig_argv:
        from bench import gpu_timing

        gpu_timing.DEVICE = "cpu"
