"""Compiles the C++ kernels of this folder, once per machine and source, into one shared library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import getpass
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # first, so that the kernels share torch's OpenMP runtime

__all__ = ["build_ahead", "library"]

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC")
TORCH = Path(torch.__file__).parent
NUM_CORES = os.cpu_count() or 1
_one_build = threading.Lock()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels as a ctypes library, or None (with one warning) where no C++ compiler is found.

    The library is kept in the temporary folder of the user, beside torch.compile's own cache, under a name that is a
    hash of sources, flags, compiler, torch and processor.

    Raises:   RuntimeError with the compiler's words when the compiler fails.
    """
    path = _built(NUM_CORES)
    if path is None:
        warnings.warn("recfx: no C++ compiler found, running the slow reference kernels.", stacklevel=2)
        return None
    return ctypes.CDLL(str(path))


def build_ahead() -> None:
    """Begins to compile the library in the background: torch.compile keeps one core busy for longer than that takes."""

    def build() -> None:
        with contextlib.suppress(Exception):  # `library` will meet it again and tell the caller
            _built(max(1, NUM_CORES - 1))

    if library.cache_info().currsize:
        return
    threading.Thread(target=build, name="recfx-build", daemon=True).start()


def _built(num_processes: int) -> Path | None:
    """The library's file, compiled if it is not there; None where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    headers = sorted(Path(__file__).parent.glob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    words = [version, torch.__version__.encode(), _processor().encode(), *map(str.encode, FLAGS)]
    words += [f.read_bytes() for f in sources + headers]
    name = hashlib.sha256(b"\0".join(words)).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"recfx_{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder}: belongs to another user, expected to own it. Set TMPDIR to a folder of yours.")
    path = folder / f"{name}.so"
    with _one_build:
        if not path.exists():
            _compile(compiler, sources, path, num_processes)
    return path


def _compile(compiler: str, sources: list[Path], path: Path, num_processes: int) -> None:
    """Writes beside the target and renames, so that two processes building at once are both right."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        include = ("-I", str(TORCH / "include"))
        commands = [
            [compiler, *FLAGS, *include, "-c", str(source), "-o", str(o)]
            for source, o in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(num_processes) as pool:
            list(pool.map(_run, commands))
        built, link = Path(scratch) / path.name, ("-L", str(TORCH / "lib"), "-ltorch_cpu")
        _run([compiler, *FLAGS, "-shared", *map(str, objects), *link, "-o", str(built)])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}.\n{done.stderr}")


def _processor() -> str:
    """The instruction set that -march=native would pick: a home folder may be shared by unlike machines."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()
