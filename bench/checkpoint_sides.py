"""The work of the checkpoint benchmarks: a state of many rows, plain reads and writes of files, one rank's load."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from recfx.checkpoint import load
from recfx.examples import deepfm as program
from recfx.step import Step, TrainState
from recfx.table import rebuild_, reserve

CHUNK = 2**22


def deepfm_state() -> tuple[Step, TrainState]:
    """An empty state of DeepFM: rows of 27 floats, 32 in memory."""
    return program.build_step(program.parse(["--data_paths", "", "--gradient_accumulation_steps", "1"]))


def filled(num_rows: int) -> tuple[Step, TrainState]:
    """A state with rows of every vocabulary."""
    step, state = deepfm_state()
    (table,), num_vocabularies = state.tables, len(step.plan.tables[0].vocabularies)
    number = torch.arange(num_rows)
    table.ids[:num_rows] = number * 0x9E3779B97F4A7C15 // 2**24
    table.vocabularies[:num_rows] = number % num_vocabularies
    table.rows[:num_rows].normal_(generator=torch.Generator().manual_seed(0))
    table.num_rows.fill_(num_rows)
    rebuild_(table)
    return step, state


def load_again(path: str | Path, step: Step, state: TrainState, **share: int) -> None:
    """Loads into a state without rows, as `load` requires. From the second call on its memory is resident."""
    for table in state.tables:
        table.num_rows.zero_()
    load(path, step, state, **share)


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def write_plainly(path: Path, num_bytes: int) -> None:
    """Measures the disk: writes one buffer repeatedly, then waits until it is on disk."""
    buffer = os.urandom(CHUNK)
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // CHUNK):
            file.write(buffer)
        os.fsync(file.fileno())


def read_plainly(paths: Iterable[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):  # type: ignore[attr-defined]
                pass


def read_into_new_memory(paths: Iterable[Path]) -> None:
    """Reads as a table does: into memory that is reserved and untouched until the bytes arrive."""
    kept = []
    for path in paths:
        kept.append(reserve((path.stat().st_size,), torch.uint8, torch.device("cpu")).numpy())
        with path.open("rb", buffering=0) as file:
            for first in range(0, len(kept[-1]), CHUNK):
                file.readinto(kept[-1][first : first + CHUNK].data)  # type: ignore[attr-defined]


def forget(paths: Iterable[Path]) -> None:
    """Drops files from the page cache: the next read is from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def loader(path: str, rank: int, world_size: int) -> tuple[Callable, Callable]:
    """For `Child`: a step loads one rank's share, into memory that is resident after the first."""
    step, state = deepfm_state()
    return lambda _: load_again(path, step, state, rank=rank, world_size=world_size), lambda _: None
