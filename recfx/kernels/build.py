"""Compiles the package's C++ sources, once per machine and source, into one shared library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # first, so that the kernels share torch's OpenMP runtime

__all__ = ["build_ahead", "build_standalone", "has_compiler", "library"]

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC")
PACKAGE = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
NUM_CORES = os.cpu_count() or 1
ELSEWHERE = "Set TMPDIR to a private folder."
_one_build = threading.Lock()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels as a ctypes library, or None (with one warning) where no C++ compiler is found.

    The library is kept in the folder recfx_<number of the user> of the temporary folder, next to torch.compile's own
    cache, under a name that is a hash of sources, flags, compiler, torch and processor. TMPDIR names another temporary
    folder. A user without a name, as in many containers, is fine here; older versions of torch.compile need
    TORCHINDUCTOR_CACHE_DIR then.

    Raises:   RuntimeError with the compiler's words when the compiler fails; naming folder or library when it cannot be
              written or loaded, or when another user could have put it there: it is a link, belongs to another user, or
              others may write to it.
    """
    path = _built(NUM_CORES)
    if path is None:
        warnings.warn("recfx: no C++ compiler found, running the slow reference kernels.", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # its folder may be mounted noexec
        raise RuntimeError(f"{path}: {error}, expected a library that loads. {ELSEWHERE}") from error


def build_ahead() -> None:
    """Begins to compile the library in the background: torch.compile keeps one core busy for longer than that takes."""

    def build() -> None:
        with contextlib.suppress(Exception):  # `library` will meet it again and tell the caller
            _built(max(1, NUM_CORES - 1))

    if library.cache_info().currsize:
        return
    threading.Thread(target=build, name="recfx-build", daemon=True).start()


def build_standalone(path: Path) -> None:
    """Compiles the kernels to `path` as a library that defines its operators when it is loaded, for programs without
    Python. It is for processors with the instruction set of this one, and must not be loaded next to recfx itself.

    Raises:   RuntimeError when there is no C++ compiler, or with the compiler's words when it fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("compiler: got none, expected c++, g++ or clang++ in PATH. Install one.")
    _compile(compiler, _sources(), path, NUM_CORES, ("-DRECFX_STANDALONE",))


@functools.cache
def has_compiler() -> bool:
    """Whether there is a compiler, looked up once: what works as well without the library need not warn."""
    return _compiler() is not None


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _built(num_processes: int) -> Path | None:
    """The library's file, compiled if it is not there; None where there is no compiler."""
    compiler = _compiler()
    if compiler is None:
        return None
    folder = _own_folder()
    path = folder / f"{_name_of(compiler)}.so"
    with _one_build:
        if not os.path.lexists(path):
            try:
                _compile(compiler, _sources(), path, num_processes)
            except OSError as error:
                raise RuntimeError(
                    f"{folder}: {error}, expected a folder with room for the compiled kernels. {ELSEWHERE}"
                ) from error
        _check_own(path, stat.S_ISREG, "file")
    return path


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.cpp"))


def _name_of(compiler: str) -> str:
    """A hash of all that the library depends on."""
    words = [_run([compiler, "--version"]), torch.__version__, _processor(), *FLAGS]
    parts = [word.encode() for word in words]
    for path in sorted([*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]):
        parts += [str(path.relative_to(PACKAGE)).encode(), path.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _own_folder() -> Path:
    """Where libraries are kept: a folder that no other user can have put anything into."""
    try:
        folder = Path(tempfile.gettempdir()).absolute() / f"recfx_{os.getuid()}"  # a user may have no name, or "../x"
    except FileNotFoundError as error:
        raise RuntimeError(f"temporary folder: {error}, expected one for the compiled kernels. {ELSEWHERE}") from error
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise RuntimeError(f"{folder}: {error.strerror}, expected a folder to make. {ELSEWHERE}") from error
    _check_own(folder, stat.S_ISDIR, "folder")
    return folder


def _check_own(path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    """Raises RuntimeError where another user may have put code that would be run as this one's."""
    found = os.lstat(path)
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        what = f"a link to {os.readlink(path)}"
    elif not is_kind(found.st_mode):
        what = "another kind of file"
    elif found.st_uid != os.getuid():
        what = f"a {kind} of user {found.st_uid}"
    elif mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = f"mode {mode:o}"
    else:
        return
    raise RuntimeError(
        f"{path}: got {what}, expected a {kind} of user {os.getuid()} that nobody else may write to. What is loaded "
        f"from there runs as you. Delete it if it is not yours. {ELSEWHERE}"
    )


def _compile(compiler: str, sources: list[Path], path: Path, num_processes: int, defines: tuple[str, ...] = ()) -> None:
    """Writes under another name and renames, so that two processes building at once are both right."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{n}_{source.stem}.o" for n, source in enumerate(sources)]
        include = ("-I", str(PACKAGE), "-I", str(TORCH / "include"))
        commands = [
            [compiler, *FLAGS, *defines, *include, "-c", str(source), "-o", str(o)]
            for source, o in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(num_processes) as pool:
            list(pool.map(_run, commands))
        built, link = Path(scratch) / path.name, ("-L", str(TORCH / "lib"), "-ltorch_cpu")
        _run([compiler, *FLAGS, "-shared", *map(str, objects), *link, "-o", str(built)])
        built.chmod(0o700)  # whatever the umask
        os.replace(built, path)


def _run(command: list[str]) -> str:
    """Its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        hint = f"{ELSEWHERE}\n" if "No space left" in done.stderr else ""
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}.\n{hint}{done.stderr}")
    return done.stdout


def _processor() -> str:
    """The instruction set that -march=native would pick: a home folder may be shared by unlike machines."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()
