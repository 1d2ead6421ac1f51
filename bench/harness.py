"""Timing two sides against each other on a noisy machine, and the record of what was claimed.

A side has a method `run(steps) -> seconds`: `Loop` runs in this process, `Child` in a separate one. Blocks of steps
alternate between the sides and the claim is the median of the blocks' ratios, so that a slow minute slows both. Before
each block there is a pause (idle OpenMP workers of the other side stop spinning and sleep) and a few untimed steps.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

NUM_THREADS = 2
PAUSE_S = 0.02  # longer than libgomp's and Eigen's spinning before sleep
RESULTS = Path(__file__).parent / "results" / "latest.json"
FOUND = frozenset(os.environ)  # conftest.py imports this module before recfx's programs change how threads wait

BASELINES = {
    "functional_textbook": "torch compiled, formula as written",
    "functional_compiled": "torch compiled, tuned by us",
    "jax_textbook": "JAX, formula as written",
    "jax": "JAX, tuned by us",
    "eager_sparse": "torch eager, SparseAdam",
    "eager_dense": "torch eager, dense AdamW",
}


class Side(Protocol):
    def run(self, steps: int) -> float: ...


class Loop:
    """Steps in this process, cycling over the batches.

    Args:     step: called with one batch; its last result is passed to `sync`.
              sync: waits for that result. A CPU torch step needs none.
    Example:
              >>> Loop(lambda batch: None, [1, 2]).run(3) < 1
              True
    """

    def __init__(
        self, step: Callable[[Any], Any], batches: Sequence[Any], sync: Callable[[Any], Any] = lambda result: None
    ) -> None:
        self.step, self.batches, self.sync, self.next = step, batches, sync, 0

    def run(self, steps: int) -> float:
        start = time.perf_counter()
        for k in range(self.next, self.next + steps):
            result = self.step(self.batches[k % len(self.batches)])
        self.sync(result)
        self.next += steps
        return time.perf_counter() - start


class Child:
    """Steps in a separate process, which sleeps on a pipe between blocks: its thread pool cannot disturb ours.

    The child uses NUM_THREADS cores, and times itself, so the pipe is not measured.

    Args:     target: "module:function", imported in the child; function(**parameters) returns (step, sync) where
              step(k) runs the k-th step and sync(result) waits for it.
    Example:
              >>> with Child("bench.baselines_jax:child_loop", num_batches=16, batch_size=1000,  # doctest: +SKIP
              ...            table_rows=200_000,
              ...            seed=0) as jax_side:
              ...     compare(recfx_side, jax_side)
    """

    def __init__(self, target: str, **parameters: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=serve, args=(remote, target, parameters), daemon=True)
        with found_environment():
            self.process.start()
        remote.close()
        self.receive()

    def run(self, steps: int) -> float:
        self.pipe.send(steps)
        return self.receive()

    def receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"child: ended without an answer, exit code {self.process.exitcode}.") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def found_environment() -> Iterator[None]:
    """The environment without the waiting policy of recfx's programs: it is for recfx's side only."""
    ours = {name: os.environ.pop(name) for name in ("GOMP_SPINCOUNT",) if name in os.environ and name not in FOUND}
    try:
        yield
    finally:
        os.environ.update(ours)


def serve(pipe: Any, target: str, parameters: dict[str, Any]) -> None:
    """The loop in the child: sets up, then runs one timed block for each number it receives."""
    use_threads(NUM_THREADS)
    try:
        step, sync = resolve(target)(**parameters)
        pipe.send("ready")
        first = 0
        while True:
            steps = pipe.recv()
            start = time.perf_counter()
            for k in range(first, first + steps):
                result = step(k)
            sync(result)
            pipe.send(time.perf_counter() - start)
            first += steps
    except EOFError:
        pass
    except Exception as error:
        pipe.send(RuntimeError(f"{target}: {type(error).__name__}: {error}"))


def call_in_child(target: str, **parameters: Any) -> Any:
    """Calls "module:function" once in a fresh process and returns its (picklable) result."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=use_threads, initargs=(NUM_THREADS,)) as pool:
        return pool.apply(call, (target, parameters))


def call(target: str, parameters: dict[str, Any]) -> Any:
    return resolve(target)(**parameters)


def resolve(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def use_threads(num_threads: int) -> None:
    """Limits this process, torch and XLA to `num_threads` cores. Call it before either is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])
    os.environ["NPROC"] = os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table. ratio > 1 means recfx is ahead, whichever way the unit runs."""

    name: str
    unit: str
    recfx: float
    baseline: float
    baseline_name: str
    ratio: float
    target: float | None


@dataclass
class Comparison:
    """Seconds per step of each block, in pairs."""

    recfx_s: list[float] = field(default_factory=list)
    baseline_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(b / r for r, b in zip(self.recfx_s, self.baseline_s, strict=True))

    def claim(self, name: str, baseline_name: str, *, batch_size: int, target: float | None) -> Claim:
        """In samples/s, each side's median."""
        rates = [batch_size / statistics.median(seconds) for seconds in (self.recfx_s, self.baseline_s)]
        return Claim(
            name=name,
            unit="samples/s",
            recfx=rates[0],
            baseline=rates[1],
            baseline_name=baseline_name,
            ratio=self.ratio,
            target=target,
        )


def compare(recfx: Side, baseline: Side, *, blocks: int = 9, block_s: float = 0.3, min_steps: int = 2) -> Comparison:
    """Alternates blocks of steps of both sides, in ABBA order, after warming both up.

    Args:     block_s: about how long one block lasts; the steps per block follow from each side's speed.
    """
    sides = (recfx, baseline)
    steps = [max(min_steps, round(block_s / warm_up(side))) for side in sides]
    result = Comparison()
    for block in range(blocks):
        for i in (0, 1) if block % 2 == 0 else (1, 0):
            (result.recfx_s, result.baseline_s)[i].append(timed_block(sides[i], steps[i]))
    return result


def warm_up(side: Side, *, budget_s: float = 1.0) -> float:
    """Seconds per step once warm: two steps to compile, then about `budget_s` of steps, 20 at most."""
    side.run(2)
    steps = max(1, min(20, int(budget_s / side.run(1))))
    return side.run(steps) / steps


def timed_block(side: Side, steps: int) -> float:
    """Seconds per step of one block, after the other side's threads went to sleep and this side's woke."""
    time.sleep(PAUSE_S)
    side.run(1)
    return side.run(steps) / steps


def rate(side: Side, *, blocks: int = 5, block_s: float = 0.3) -> list[float]:
    """Seconds per step of one side, per block."""
    steps = max(2, round(block_s / warm_up(side)))
    return [timed_block(side, steps) for _ in range(blocks)]


def peak_rss_bytes() -> int:
    """The most memory this process ever held: one number per process, so measure it in a child."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Claims:
    """Collects claims over a session; prints them as one table and writes them as JSON."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.notes: list[str] = []

    def add(self, claim: Claim) -> Claim:
        self.claims.append(claim)
        return claim

    def note(self, line: str) -> None:
        """Adds a line under the table that is not a claim."""
        self.notes.append(line)

    def table(self) -> str:
        header = ("claim", "recfx", "baseline", "", "unit", "ratio", "target", "")
        body = [
            (
                c.name,
                number(c.recfx),
                number(c.baseline),
                c.baseline_name,
                c.unit,
                f"{c.ratio:.2f}",
                "" if c.target is None else f"{c.target:.2f}",
                "" if c.target is None else "met" if c.ratio >= c.target else "MISSED",
            )
            for c in self.claims
        ]
        widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
        right = {1, 2, 5, 6}
        lines = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *body)
        ]
        return "\n".join([*lines, *self.notes])

    def write(self, path: Path = RESULTS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(c) for c in self.claims], indent=2) + "\n")


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
