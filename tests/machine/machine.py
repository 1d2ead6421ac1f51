"""Runs Triton's kernels without a GPU: `with running(seed=3) as report: operator(tensors on the CPU)`.

Every launch is compiled as for an H200, and its PTX done thread by thread; README.md says how, and what that shows.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from bench.triton_sm90 import replaced_launches
from tests.machine.library import COUNTS, MODES, Launch, Outcome, library
from tests.machine.program import Kind, Program
from tests.machine.ptx import SIZES, parse

__all__ = ["MachineError", "Race", "Report", "running"]

CONFLICTS = (
    "two plain writes", "a plain write, then a plain read", "a plain read, then a plain write",
    "a plain write and an atomic", "a plain read and an atomic",
)  # fmt: skip
LIMIT = 10**9  # instructions of a launch


class MachineError(AssertionError):
    """An access that a GPU would refuse or do wrong, a deadlock, or too many instructions."""


@dataclass(frozen=True, order=True)
class Race:
    kernel: str
    conflict: str
    space: str
    lines: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.kernel}: {self.conflict}, in {self.space} memory: {self.lines[0]} and {self.lines[1]}"


@dataclass
class Counts:
    """Of one kernel. `hottest`: atomics on one address in a launch, at most. `threads`: of all launches."""

    launches: int = 0
    threads: int = 0
    executed: int = 0
    accesses: int = 0
    global_accesses: int = 0
    accesses_16_bytes: int = 0
    atomics: int = 0
    hottest: int = 0
    lost_swaps: int = 0
    stale_loads: int = 0


@dataclass
class Report:
    kernels: dict[str, Counts] = field(default_factory=dict)
    races: Counter[Race] = field(default_factory=Counter)  # in how many launches


def memory_of(arguments: Any) -> np.ndarray:
    """First address and end of what a launch may touch, u64 [n, 2], rising and apart.

    A contiguous tensor is its items, another one its storage. Bytes are read in aligned words of eight, as memory is
    given out in larger pieces than those: such a word is a tensor's if one byte of it is.
    """
    spans = []
    for t in tree_leaves(arguments):
        if isinstance(t, torch.Tensor) and t.numel():
            begin, size = t.data_ptr(), t.numel() * t.element_size()
            if not t.is_contiguous():
                begin, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            word = 8 if t.dtype == torch.uint8 else 1
            spans.append([begin // word * word, -(-(begin + size) // word) * word])
    joined: list[list[int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return np.array(joined, np.uint64).reshape(-1, 2)


@functools.cache
def program_of(ptx: str) -> Program:
    return Program(parse(ptx))


def scalars(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of the arguments that are left when constants are compiled in and tuples taken apart."""
    if isinstance(signature, (tuple, list)):
        for s, v in zip(signature, value, strict=True):
            yield from scalars(s, v)
    elif signature != "constexpr":
        yield signature, value


def parameter_bytes(program: Program, values: list[tuple[str, Any]]) -> bytearray:
    """The arguments as the kernel reads them; the compiler adds up to two pointers to memory of its own."""
    data = bytearray(program.parameter_bytes + 8)
    assert 0 <= len(program.parameters) - len(values) <= 2, (program.kernel.name, program.kernel.params, values)
    for (type_, begin), (signature, value) in zip(program.parameters, values, strict=False):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if signature in ("fp32", "f32"):
            item = struct.pack("<f", value)
        elif signature in ("fp64", "f64"):
            item = struct.pack("<d", value)
        else:
            item = (int(value) % 256 ** SIZES[type_]).to_bytes(SIZES[type_], "little")
        data[begin : begin + len(item)] = item
    return data


@contextmanager
def running(
    *, seed: int = 0, mode: str = "threads", stale: bool = True, resident: int = 8, limit: int = LIMIT
) -> Iterator[Report]:
    """Launches of Triton kernels on CPU tensors run on the machine.

    Args:     seed: of the order of accesses.
              mode: who makes the next one. "threads": any thread; "bursts": a thread goes on for a while; "warps": the
              lanes of a warp in turn, for a while; "programs": the threads of a program, for a while.
              stale: plain loads may give what memory held earlier in the launch, as a cache does.
              resident: programs that run at the same time, at most; each launch draws how many.
              limit: instructions of a launch, at most.
    Yields:   the counts and races of what has run so far.
    Raises:   MachineError, from the launch: an access outside the tensors of the launch, a misaligned one, a deadlock,
              too many instructions. UnknownInstructionError: an instruction that the machine does not have.
    """
    report, draws = Report(), np.random.default_rng(seed)

    def launch(kernel: JITFunction, compiled: Any, args: tuple, grid: Any, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names})
        bound.apply_defaults()
        size = grid(bound.arguments) if callable(grid) else grid
        values = [x for name, s in compiled.src.signature.items() for x in scalars(s, bound.arguments[name])]
        drawn = {"resident": int(draws.integers(1, resident + 1)), "seed": int(draws.integers(2**63))}
        order = {"mode": MODES.index(mode), "stale": stale, "limit": limit, **drawn}
        execute(
            report, compiled, kernel.fn.__code__.co_filename, values, (*size, 1, 1)[:3], memory_of(bound.arguments),
            order,
        )  # fmt: skip

    with replaced_launches(launch):
        yield report


def race_of(record: Any, program: Program, kernel: str, file: str) -> Race:
    at = [record.earlier, record.later]
    if record.conflict in (0, 3, 4):  # which came first is chance: the plain access is named first
        at.sort(key=lambda n: (program.code[n].kind == Kind.ATOMIC, n))
    lines = program.source(at[0], file), program.source(at[1], file)
    return Race(kernel, CONFLICTS[record.conflict], ("global", "shared")[record.space], lines)


def execute(
    report: Report, compiled: Any, file: str, values: list, grid: tuple, memory: np.ndarray, order: dict
) -> None:
    program, name = program_of(compiled.asm["ptx"]), compiled.metadata.name
    data, outcome = parameter_bytes(program, values), Outcome()
    threads = 32 * compiled.metadata.num_warps
    launch = Launch(
        code=ctypes.addressof(program.code), registers=ctypes.addressof(program.constants),
        parameters=ctypes.addressof((ctypes.c_uint8 * len(data)).from_buffer(data)), regions=memory.ctypes.data,
        uses=ctypes.addressof(program.uses_array), hoisted=ctypes.addressof(program.hoisted),
        num_instructions=len(program.code), num_registers=len(program.constants), num_regions=len(memory),
        num_hoisted=program.num_hoisted, grid=grid, num_threads=threads, shared_bytes=compiled.metadata.shared,
        global_unit=program.units[0], shared_unit=program.units[1], **order,
    )  # fmt: skip
    library().launch(ctypes.byref(launch), ctypes.byref(outcome))
    counts = report.kernels.setdefault(name, Counts())
    counts.launches += 1
    counts.threads += threads * int(np.prod(grid))
    for key in COUNTS:
        before, of_launch = getattr(counts, key), getattr(outcome, key)
        setattr(counts, key, max(before, of_launch) if key == "hottest" else before + of_launch)
    report.races.update({race_of(r, program, name, file) for r in outcome.races[: outcome.num_races]})
    if outcome.fault:
        raise MachineError(f"{name}, line {outcome.line}: {outcome.fault.decode()}")
