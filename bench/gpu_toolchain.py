"""Checks in a few seconds what bench/gpu.sh needs: one line each, with the consequence when it is missing.

`python -m bench.gpu_toolchain`: its exit code is 1 when something is missing that every part needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import time
from collections.abc import Callable

import torch

from bench.gpu_timing import DEVICE, device_name, need_device

NEEDED = ["numpy", "pyarrow", "safetensors", "tqdm", "xxhash", "pytest", "pytest_benchmark", "hypothesis"]
OPTIONAL = {
    "xdist": "bench.gpu_tests divides the tests between processes itself",
    "jax": "bench.gpu_deepfm leaves JAX out",
}
NAMES = {"pytest_benchmark": "pytest-benchmark", "xdist": "pytest-xdist"}


def version_of(module: str) -> str:
    importlib.import_module(module)
    return importlib.metadata.version(NAMES.get(module, module))


def device() -> str:
    free, total = torch.cuda.mem_get_info()
    return f"{device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {free:,} of {total:,} bytes free"


def compiler() -> str:
    """The compiler of Inductor and ops.cpp."""
    path = shutil.which("g++") or shutil.which("c++")
    if path is None:
        raise FileNotFoundError("no g++ on PATH")
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def triton_kernel() -> str:
    """Compiles a kernel and runs it, which also needs a C compiler, Python's headers and ptxas."""
    import triton

    from bench.gpu_ceilings import ROWS, WIDTH, gather

    begun = time.perf_counter()
    table = torch.randn(2 * ROWS, WIDTH, device=DEVICE)
    row, out = torch.arange(ROWS, device=DEVICE).flip(0), table.new_zeros(ROWS, WIDTH)
    gather[(1,)](table, row, out, WIDTH=WIDTH, ROWS=ROWS)
    if not torch.equal(out, table[row]):
        raise ValueError("a kernel that gathers rows found others")
    return f"{triton.__version__}, a kernel compiled and run in {time.perf_counter() - begun:.1f} s"


def operators() -> str:
    """Builds the operators, so that no part waits for that."""
    from recfx.kernels.build import library

    begun = time.perf_counter()
    if library() is None:
        raise FileNotFoundError("no C++ compiler")
    return f"built or found in {time.perf_counter() - begun:.1f} s"


def look(name: str, found: Callable[[], str], otherwise: str) -> bool:
    """Prints a line, and returns whether `found` succeeded."""
    try:
        print(f"{name}: {found()}", flush=True)
    except Exception as error:
        words = str(error).partition("\n")[0]
        print(f"{name}: MISSING, {type(error).__name__}: {words}; {otherwise}", flush=True)
        return False
    return True


def main() -> None:
    need_device("bench.gpu_toolchain")
    looks = {"device": device, "Triton": triton_kernel, "C++ compiler": compiler}
    looks |= {name: lambda name=name: version_of(name) for name in NEEDED}
    there = {name: look(name, found, "parts will fail") for name, found in looks.items()}
    for name, otherwise in OPTIONAL.items():
        look(name, lambda name=name: version_of(name), otherwise)
    there["C++ operators"] = look("C++ operators", operators, "parts will fail")
    if missing := [name for name, is_there in there.items() if not is_there]:
        raise SystemExit(f"bench.gpu_toolchain: missing: {', '.join(missing)}")
    print("bench.gpu_toolchain: all there")


if __name__ == "__main__":
    main()
