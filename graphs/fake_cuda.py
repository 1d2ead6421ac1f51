"""A process where torch finds a fake H200: `python -m graphs.fake_cuda` writes graphs/deepfm.cuda.txt.

Tensors are fake, so nothing runs. Dynamo and Inductor do what they would do on the device, up to the Python code that
calls the kernels; Triton compiles nothing. It changes torch for the whole process, so run it in a separate one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

__all__ = ["Written", "compiling", "load", "pretending"]

H200 = {
    "name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 140 << 30,
    "warp_size": 32, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536, "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472, "L2_cache_size": 60 << 20, "gcnArchName": "", "clock_rate": 1980000,
    "memory_clock_rate": 3201000, "memory_bus_width": 6144, "uuid": "0", "is_integrated": 0, "is_multi_gpu_board": 0,
}  # fmt: skip


def load() -> None:
    """Compiles fake_cuda.cpp against torch's headers and loads it, a second or two. Before torch is imported."""
    assert "torch" not in sys.modules
    found = importlib.util.find_spec("torch")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert found is not None
    assert found.origin is not None
    if compiler is None:
        raise RuntimeError("C++ compiler: got none, expected c++, g++ or clang++. The hooks are C++. Install one.")
    home = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake_cuda.so"
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
        source = str(Path(__file__).with_suffix(".cpp"))
        subprocess.run([compiler, *flags, source, "-lc10", "-ltorch_cpu", "-o", library], check=True)
        ctypes.CDLL(library)


class Hopper:
    """The part of Triton's driver that Inductor requires."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class _NoGuard(contextlib.nullcontext):
    def __init__(self, *_: Any) -> None:
        super().__init__()


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Makes `torch.cuda` answer as with one H200, while Inductor compiles: Dynamo would need more of a device."""
    import torch
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch.utils._triton import has_triton
    from triton.runtime import driver

    properties = SimpleNamespace(**H200)
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None, "_cached_device_count": 1, "is_initialized": lambda: True,
        "_get_device_properties": lambda _: properties,
        "is_bf16_supported": lambda including_emulation=True: True, "synchronize": lambda _=None: None,
        "get_rng_state": lambda _="cuda": torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
        "device": _NoGuard, "_DeviceGuard": _NoGuard,
    }  # fmt: skip
    below: dict[str, Any] = {
        "_cuda_getDeviceCount": lambda: 1, "_cuda_getDevice": lambda: 0, "_cuda_setDevice": lambda _: None,
        "_cuda_exchangeDevice": lambda _: 0, "_cuda_maybeExchangeDevice": lambda _: 0,
        "_cuda_getCurrentRawStream": lambda _=0: 0, "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_getCompiledVersion": lambda: 13000,
    }  # fmt: skip
    driver.set_active(Hopper())
    has_triton.cache_clear()  # Dynamo has cached the answer without a device
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.multiple(torch.cuda, create=True, **answers))
        enter(mock.patch.multiple(torch._C, create=True, **below))
        enter(mock.patch.object(torch.version, "cuda", "13.0"))
        # Patterns of attention and the like, found by running them on tensors of the device.
        for module, name in (
            (fuse_attention, "_sfdp_init"), (misc_patterns, "_misc_patterns_init"), (pad_mm, "_pad_mm_init"),
        ):  # fmt: skip
            enter(mock.patch.object(module, name, return_value=None))
        yield


class Written(NamedTuple):
    """The code that Inductor wrote."""

    code: str  # Python, with the kernels in Triton
    graph: Any  # the torch.fx.Graph of ATen that was compiled
    names: dict[str, str]  # of the code's inputs: parts of the state, or sections, by their names in the code


class _Stop(BaseException):
    """Raised when Inductor has written its code. It is not an Exception: Inductor would wrap that in its error."""


def compiling(function: Any, state: Any, sections: list[Any]) -> Written:
    """The code that `recfx.capture.compiled.compiled` would call on the device.

    Args:     state, sections: fake tensors on cuda.
    """
    import torch
    from torch._inductor.graph import GraphLowering

    from recfx.capture import compiled

    written: list[Written] = []
    names: list[str] = []
    settings = {
        "compile_threads": 1, "fx_graph_cache": False, "fx_graph_remote_cache": False,
        "joint_graph_constant_folding": False,  # runs on the device
    }  # fmt: skip
    compile_fx = compiled.compile_fx

    def compile_pretending(module: Any, inputs: Any, **kwargs: Any) -> Any:
        for node in module.graph.find_nodes(op="placeholder"):
            source = node.meta["grapharg"].source.name
            names.append(source if isinstance(source, str) else source())
        with pretending():
            return compile_fx(module, inputs, **kwargs)

    def keep(graph: Any) -> None:
        code, _ = graph.codegen()
        written.append(Written(code.value, graph.module.graph, dict(zip(graph.graph_input_names, names, strict=True))))
        raise _Stop

    with (
        torch._inductor.config.patch(settings),
        mock.patch.object(compiled, "compile_fx", compile_pretending),
        mock.patch.object(compiled, "mistake_in", return_value=None),
        mock.patch.object(GraphLowering, "compile_to_module", keep),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", bool),
        contextlib.suppress(_Stop),
    ):
        compiled.compiled(function, state, sections)
    return written[0]


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a device, where there is one, must not answer
    load()
    from graphs.cuda_code import text

    sys.stdout.write(text())


if __name__ == "__main__":
    main()
