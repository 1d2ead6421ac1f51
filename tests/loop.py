"""Training from a list of batches, uncompiled, watched and interrupted: what tests of the loop share."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recfx import checkpoint
from recfx.step import Step, TrainState
from recfx.train import Progress, TrainConfig, train
from recfx.types import Batch
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step


class MemoryReader:
    """Batches from a list; `opened` and `closed` count iterators."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.opened, self.closed = batches, 0, 0

    def __iter__(self) -> MemoryIterator:
        return self.start_at({"batch": 0})

    def epoch(self, number: int) -> MemoryIterator:
        return self.start_at({"batch": 0})

    def start_at(self, position: dict) -> MemoryIterator:
        self.opened += 1
        return MemoryIterator(self, position["batch"])


class MemoryIterator(Iterator[Batch]):
    def __init__(self, reader: MemoryReader, place: int) -> None:
        self.reader, self.place = reader, place

    @property
    def position(self) -> dict:
        return {"batch": self.place}

    def __next__(self) -> Batch:
        if self.place == len(self.reader.batches):
            raise StopIteration
        self.place += 1
        return self.reader.batches[self.place - 1]

    def close(self) -> None:
        self.reader.closed += 1


def fresh(step: Step) -> TrainState:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


class Log:
    """An event listener; `then` is called at the given (event, step)."""

    def __init__(self, at: tuple[str, int] | None = None, then: Callable[[], None] = lambda: None) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.at, self.then = at, then

    def __call__(self, event: str, progress: Progress, state: TrainState) -> None:
        self.events.append((event, progress.epoch, progress.step))
        if (event, progress.step) == self.at:
            self.then()

    def names(self) -> list[str]:
        return [event for event, _, _ in self.events]

    def steps(self, event: str) -> list[int]:
        return [step for name, _, step in self.events if name == event]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def go(
    folder: Path,
    reader: Any,
    *,
    accumulation: int = 1,
    listener: Callable = lambda *_: None,
    make: Callable[..., Step] = deepfm_step,
    resume: bool = False,
    evaluate_with: Callable | None = None,
    **config: Any,
) -> tuple[TrainState, Progress]:
    """Trains from the start in a new step and state, as a new process would."""
    step = make(accumulation=accumulation)
    config = TrainConfig(output_dir=str(folder), **config)
    return train(
        step, step.update_, fresh(step), reader, config, resume=resume, evaluate_with=evaluate_with, on_event=listener
    )


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def last_bytes(folder: Path) -> tuple[str, dict[str, str]]:
    """Name and hashes of the newest checkpoint: state and manifest."""
    path = checkpoint.latest(folder)
    return path.name, {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir()}


def reader_of(num: int, **kwargs: Any) -> MemoryReader:
    return MemoryReader(deepfm_batches(num, seed=5, **kwargs))
