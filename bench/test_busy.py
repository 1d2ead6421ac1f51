"""The captured DeepFM step on an idle and a busy host, with torch and JAX in the same run.

Each side runs as its users run it: recfx with the waiting policy of its programs, torch with libgomp's default.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack

from bench.company import busy_processes
from bench.harness import BASELINES, PAUSE_S, Claims, Comparison, Loop, Side, warm_up
from bench.test_step import HAS_JAX, SMALL, baseline, ours_over

BATCH_SIZE, NUM_BUSY, ROUNDS = 1000, 2, 9
ALONE_S, BUSY_S = 0.3, 1.0  # a block; on a busy host a step waits for time slices of others, some ms each
VARIANTS = ("functional_textbook", "functional_compiled", *(("jax_textbook", "jax") if HAS_JAX else ()))
SLOWER = 2.5  # at most, next to as many busy processes as there are cores

Seconds = dict[str, list[float]]  # per step, of each block


def block(side: Side, seconds: float) -> float:
    """Seconds per step of about `seconds` of steps, at least two."""
    time.sleep(PAUSE_S)
    once = side.run(2) / 2
    steps = max(2, round(seconds / once))
    return side.run(steps) / steps


def in_turns(sides: dict[str, Side]) -> tuple[Seconds, Seconds]:
    """Blocks of all sides without, then with NUM_BUSY busy processes, repeatedly."""
    alone, busy = defaultdict(list), defaultdict(list)
    for side in sides.values():
        warm_up(side)
    for number in range(ROUNDS):
        order = list(sides)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            alone[name].append(block(sides[name], ALONE_S))
        with busy_processes(NUM_BUSY):
            for name in order:
                busy[name].append(block(sides[name], BUSY_S))
    return alone, busy


def test_busy_host(benchmark, claims: Claims):
    work, ours = ours_over(BATCH_SIZE, SMALL)
    with ExitStack() as stack:
        sides: dict[str, Side] = {"recfx": Loop(ours.step, work.batches)}
        sides |= {name: stack.enter_context(baseline(name, BATCH_SIZE, SMALL)) for name in VARIANTS}
        alone, busy = benchmark.pedantic(in_turns, args=(sides,), rounds=1)
    company = f"next to {NUM_BUSY} busy processes"
    for where, seconds, target in (("alone", alone, None), (company, busy, 1.0)):
        for name in VARIANTS:
            result = Comparison(seconds["recfx"], seconds[name])
            title = f"DeepFM step, batch {BATCH_SIZE}, {where}"
            claims.add(result.claim(title, BASELINES[name], batch_size=BATCH_SIZE, target=target))
    result = Comparison(busy["recfx"], alone["recfx"])
    title = f"DeepFM step, batch {BATCH_SIZE}, {company}"
    claims.add(result.claim(title, "recfx, alone", batch_size=BATCH_SIZE, target=1 / SLOWER))
    claims.note(f"ms per step, alone -> {company} (the slowest of {ROUNDS} blocks); GOMP_SPINCOUNT of recfx: "
                f"{os.environ.get('GOMP_SPINCOUNT')}")  # fmt: skip
    for name in sides:
        ms = [1e3 * x for x in (statistics.median(alone[name]), statistics.median(busy[name]), max(busy[name]))]
        claims.note(f"  {BASELINES.get(name, name)}: {ms[0]:.2f} -> {ms[1]:.1f} ({ms[2]:.1f})")
