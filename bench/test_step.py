"""The captured DeepFM step against plain torch and JAX, which get ids remapped to dense indices beforehand.

Every baseline runs in a separate process, as its users run it; blocks of both sides alternate.
"""

from __future__ import annotations

import functools
import importlib.util
import resource
from contextlib import contextmanager

import pytest
import torch

from bench.baselines_torch import functional_compiled
from bench.harness import BASELINES, Child, Claims, Loop, compare
from bench.recfx_side import Captured, captured_step, phases
from bench.workload import Workload, init_weights, make_batches

NUM_BATCHES, SMALL, LARGE = 16, 200_000, 10_000_000
TARGETS = {1000: 1.8, 4096: 1.5, 16_384: 1.4}
HAS_JAX = importlib.util.find_spec("jax") is not None
no_jax = pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")


@contextmanager
def baseline(variant: str, batch_size: int, table_rows: int):
    parameters = {"num_batches": NUM_BATCHES, "batch_size": batch_size, "table_rows": table_rows, "seed": 0}
    module = "baselines_jax" if variant.startswith("jax") else "baselines_torch"
    with Child(f"bench.{module}:child_loop", variant=variant, **parameters) as side:
        yield side


@functools.cache
def ours_over(batch_size: int, table_rows: int) -> tuple[Workload, Captured]:
    work = make_batches(NUM_BATCHES, batch_size, table_rows=table_rows)
    return work, captured_step(work)


@pytest.fixture(scope="module", params=[1000, 4096, 16_384])
def recfx(request):
    return request.param, *ours_over(request.param, SMALL)


def test_losses_are_the_baseline_s():
    work = make_batches(4, 256, table_rows=20_000)
    ours = captured_step(work)
    theirs = functional_compiled(init_weights(20_000), max_distinct=max(work.num_distinct) + 1)
    for batch, dense in zip(work.batches, work.dense, strict=True):
        torch.testing.assert_close(ours.step(batch), theirs.step(dense), rtol=1e-4, atol=1e-6)


@pytest.mark.benchmark(group="step")
def test_step(benchmark, recfx, claims: Claims):
    """pytest-benchmark's record of the step, and its time by phase."""
    batch_size, work, ours = recfx
    batches = iter(work.batches * 10_000)
    benchmark.pedantic(lambda: ours.step(next(batches)), rounds=40, iterations=3, warmup_rounds=10)
    parts = "  ".join(f"{name} {ms:.2f}" for name, ms in phases(ours.step, work.batches).items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    claims.note(f"batch {batch_size}: ms per step, profiled: {parts}; peak memory of the process so far {peak:.1f} GiB")


def against(benchmark, claims: Claims, recfx, variant: str, target: float) -> None:
    batch_size, work, ours = recfx
    with baseline(variant, batch_size, SMALL) as theirs:
        result = benchmark.pedantic(compare, args=(Loop(ours.step, work.batches), theirs), rounds=1)
    name = f"DeepFM step, batch {batch_size}, 0.2 M rows"
    claims.add(result.claim(name, BASELINES[variant], batch_size=batch_size, target=target))


@pytest.mark.parametrize("variant", ["functional_textbook", pytest.param("jax_textbook", marks=no_jax)])
def test_against_what_people_write(benchmark, recfx, variant, claims: Claims):
    """The formula as published, compiled, touched rows only: the opponents that the targets refer to."""
    against(benchmark, claims, recfx, variant, TARGETS[recfx[0]])


@pytest.mark.parametrize("variant", ["functional_compiled", pytest.param("jax", marks=no_jax)])
def test_against_the_best(benchmark, recfx, variant, claims: Claims):
    """The same opponents with recfx's formulation and every trick we know: recfx should not be slower."""
    against(benchmark, claims, recfx, variant, 1.0)


@pytest.mark.parametrize(
    ("variant", "table_rows", "target"),
    [
        ("eager_sparse", SMALL, None),
        ("eager_dense", SMALL, None),
        ("functional_compiled", LARGE, 1.0),
        pytest.param("jax", LARGE, 1.0, marks=no_jax),
    ],
)
def test_at_4096(benchmark, claims: Claims, variant, table_rows, target):
    work, ours = ours_over(4096, table_rows)
    with baseline(variant, 4096, table_rows) as theirs:
        sides = Loop(ours.step, work.batches), theirs
        result = benchmark.pedantic(compare, args=sides, kwargs={"blocks": 5}, rounds=1)
    name = f"DeepFM step, batch 4096, {table_rows / 1e6:g} M rows"
    claims.add(result.claim(name, BASELINES[variant], batch_size=4096, target=target))


def test_large_table(benchmark, claims: Claims):
    """The same number of distinct ids per batch, fifty times the rows: the step may take at most 1.5 times as long."""
    (small, few), (large, many) = ours_over(4096, SMALL), ours_over(4096, LARGE)
    result = benchmark.pedantic(compare, args=(Loop(many.step, large.batches), Loop(few.step, small.batches)), rounds=1)
    claims.add(result.claim("DeepFM step, batch 4096, 10 M rows", "recfx, 0.2 M rows", batch_size=4096, target=1 / 1.5))
