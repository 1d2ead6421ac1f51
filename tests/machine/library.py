"""The machine's C++ as a library, compiled at its first use, and the records that it shares with Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["MODES", "Instruction", "Launch", "Outcome", "Region", "function_numbers", "library"]

MODES = "threads", "bursts", "warps", "programs"
HERE = Path(__file__).parent
FLAGS = ["-O2", "-std=c++20", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
u8, u16, s32, s64, u64, pointer = (
    ctypes.c_uint8, ctypes.c_uint16, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p,
)  # fmt: skip


class Instruction(ctypes.Structure):
    _fields_ = (
        ("kind", u16), ("function", u16), ("space", u8), ("order", u8), ("size", u8), ("count", u8), ("is_signed", u8),
        ("flag", u8), ("pad", u8 * 2), ("guard", s32), ("to", s32 * 4), ("from_", s32 * 6), ("used_if", s32 * 4),
        ("line", s32), ("immediate", s64),
    )  # fmt: skip


class Region(ctypes.Structure):
    _fields_ = (("begin", u64), ("end", u64))


class Race(ctypes.Structure):
    _fields_ = (("conflict", s32), ("space", s32), ("earlier", s32), ("later", s32))


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, pointer) for name in ("code", "registers", "parameters", "regions", "uses", "hoisted")),
        *((name, s32) for name in ("num_instructions", "num_registers", "num_regions", "num_hoisted")),
        ("grid", s32 * 3),
        *((name, s32) for name in ("num_threads", "shared_bytes", "global_unit", "shared_unit", "resident", "mode")),
        ("stale", s32), ("seed", u64), ("limit", u64),
    )  # fmt: skip


COUNTS = (
    "executed",
    "accesses",
    "global_accesses",
    "accesses_16_bytes",
    "atomics",
    "hottest",
    "lost_swaps",
    "stale_loads",
)


class Outcome(ctypes.Structure):
    _fields_ = (
        *((name, u64) for name in COUNTS),
        ("num_races", s32), ("races", Race * 64), ("line", s32), ("fault", ctypes.c_char * 400),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Kept in the temporary folder under the hash of its source; processes that compile at once do not disturb."""
    compiler = shutil.which("g++")
    assert compiler, "g++: got none on the path, expected one. The machine is C++. Install g++."
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"recfx-machine-{os.getuid()}"
    path = folder / f"{digest}.so"
    if not path.exists():
        folder.mkdir(exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "machine.so"
            subprocess.run([compiler, *FLAGS, str(HERE / "machine.cpp"), "-o", str(made)], check=True)
            made.rename(path)
    loaded = ctypes.CDLL(str(path))
    loaded.function_name.restype = ctypes.c_char_p
    assert loaded.size_of_instruction() == ctypes.sizeof(Instruction)
    return loaded


@functools.cache
def function_numbers() -> dict[str, int]:
    """Place of each arithmetic instruction in the machine's table."""
    return {library().function_name(n).decode(): n for n in range(library().num_functions())}
