"""Where the time of one rank's step goes, by part, op by op and not compiled. Prints a line of JSON on rank 0.

    python -m bench.dist_parts FOLDER BATCH_SIZE

A part's time is without that of the parts within it. Ranks meet before each exchange, so that waiting for another rank
and exchanging are told apart: the meeting itself, about 0.1 ms, counts as waiting.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import distributed

from recfx.dist import Group, exchange, join
from recfx.dist.streams import deal
from recfx.examples import deepfm
from recfx.kernels.rows import take_rows
from recfx.step import update

__all__ = ["EXCHANGES", "PARTS", "WAITING", "Stopwatch", "measure", "timed_parts"]

STEPS, WARM_UP = 20, 4
REST, WAITING = "dense optimiser, metrics, the rest", "waiting for the other rank"

# What is timed: where it is looked up, its name there, the part. One process has those of `update` alone.
PARTS: list[tuple[Any, str, str]] = [
    (update, "look_up", "reading ids, inserting in one process, pooling"),
    (update, "gradients", "forward and backward"),
    (update, "_add_grads_", "sums by row in one process"),
    (update, "_update_rows_", "sparse optimiser"),
    (exchange.Exchange, "_dealt", "local de-duplication, into buckets"),
    (exchange.Exchange, "request", "request: header, readings"),
    (exchange.Exchange, "insert_", "owner finds or inserts"),
    (take_rows, "take_rows_", "owner takes rows"),
    (exchange.Exchange, "answer", "answer: places of its rows"),
    (exchange.Exchange, "sum_by_id", "sums by id"),
    (exchange.Exchange, "agree", "agreeing: putting together, splitting"),
    (exchange.Exchange, "add_grads_", "owner adds sums"),
]

# By the part that an exchange is called from.
EXCHANGES = {
    "request: header, readings": "exchange of ids",
    "answer: places of its rows": "exchange of rows",
    "agreeing: putting together, splitting": "reduction of dense gradients",
    "owner adds sums": "exchange of gradients",
}


class Stopwatch:
    """Seconds by part. Of parts within each other, each second belongs to the innermost one."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.since = now, now()
        self.stack: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """This part runs within the context."""
        self._add()
        self.stack.append(name)
        try:
            yield
        finally:
            self._add()
            self.stack.pop()

    def _add(self) -> None:
        now = self.now()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now


@contextmanager
def timed_parts(watch: Stopwatch, group: Group) -> Iterator[None]:
    """The parts of a step add their time to the stopwatch."""

    def timed(inner: Callable, name: str) -> Callable:
        @functools.wraps(inner)
        def outer(*args: Any, **options: Any) -> Any:
            with watch.part(name):
                return inner(*args, **options)

        return outer

    def met(inner: Callable) -> Callable:
        @functools.wraps(inner)
        def outer(*args: Any) -> Any:
            with watch.part(WAITING):
                group.wait()
            with watch.part(EXCHANGES[watch.stack[-1]]):
                return inner(*args)

        return outer

    with ExitStack() as stack:
        for where, attribute, name in [*PARTS, (update, "_learn_", REST)]:
            stack.enter_context(mock.patch.object(where, attribute, timed(getattr(where, attribute), name)))
        for attribute in ("all_to_all", "all_reduce", "all_gather"):
            stack.enter_context(mock.patch.object(exchange, attribute, met(getattr(exchange, attribute))))
        yield


def measure(folder: str, batch_size: int, *, steps: int = STEPS, max_rows: int = 2**22) -> dict[str, float]:
    """Milliseconds of a step by part, each the median over the steps; then "the step", their sum.

    Features are read, and capacities looked at, before a step's parts begin.
    """
    group = join()
    options = {"batch_size": batch_size, "gradient_accumulation_steps": 1, "max_rows": max_rows}
    args = argparse.Namespace(**{**deepfm.ARGUMENTS, **options})
    step = deepfm.make_step(args)
    rows: Any = deepfm.read(args, folder, drop_remainder=True)
    rows = deal(rows, group) if group.world_size > 1 else rows
    state, of_steps = deepfm.first_state(step, args), []
    batches = list(itertools.islice(rows.epoch(0), steps))
    for batch in batches[:WARM_UP]:
        state, _ = step.update_(state, batch)
    for batch in batches:
        watch = Stopwatch()
        with timed_parts(watch, group):
            state, _ = step.update_(state, batch)
        of_steps.append(watch.seconds)
    found = {name: 1e3 * statistics.median(one[name] for one in of_steps) for name in of_steps[0]}
    return {**found, "the step": sum(found.values())}


def main(folder: str, batch_size: str) -> None:
    found = measure(folder, int(batch_size))
    group = join()
    if group.is_first:
        print(json.dumps(found))
    if group.world_size > 1:
        group.wait()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
