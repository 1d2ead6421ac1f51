"""Captured steps of `recfx.models` against torch.compile of plain modules over remapped ids, in alternating pairs."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.harness import NUM_THREADS, Child, Claims, Loop, call_in_child, compare
from bench.model_sides import CONFIGS, first_params, ours, share_of_products, theirs, work_of

BATCH_SIZE, PAIRS = 4096, 30


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_the_opponent_s(name):
    work = work_of(name, 128)
    step, opponent = ours(name, work, backend="eager").step, theirs(name, work.max_distinct, compiled=False)
    for _ in range(2):
        for batch, plain in zip(work.batches[:6], work.plain[:6], strict=True):
            torch.testing.assert_close(step(batch), opponent(plain), rtol=2e-5, atol=1e-6)


@pytest.fixture(params=[1, 2])
def threads(request):
    """One: the sides' ways to wait for threads do not count."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(NUM_THREADS)


@pytest.mark.parametrize("name", CONFIGS)
def test_step(benchmark, claims: Claims, name, threads):
    """Not below 1.0 by more than the interquartile range; 1.2 where dense products take under half of both sides."""
    work = work_of(name, BATCH_SIZE)
    step = ours(name, work).step
    arguments = {"name": name, "batch_size": BATCH_SIZE, "threads": threads}
    with Child("bench.model_sides:child_loop", **arguments) as side:
        how = {"blocks": PAIRS, "block_s": 0.2}
        result = benchmark.pedantic(compare, args=(Loop(step, work.batches), side), kwargs=how, rounds=1)
    shares = (
        share_of_products(step, work.batches),
        call_in_child("bench.model_sides:share_of_theirs", **arguments),
    )
    ratios = [b / r for r, b in zip(result.recfx_s, result.baseline_s, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    target = 1.2 if max(shares) < 0.5 else 1.0 - (high - low)
    claims.add(
        result.claim(
            f"{name} step, batch {BATCH_SIZE}, threads {threads}",
            "torch.compile of nn.Module",
            batch_size=BATCH_SIZE,
            target=target,
        )
    )
    num = sum(p.numel() for p in first_params(name).values())
    ms = [1e3 * statistics.median(seconds) for seconds in (result.recfx_s, result.baseline_s)]
    claims.note(
        f"{name}, threads {threads}: {ms[0]:.1f} and {ms[1]:.1f} ms; quartiles of {PAIRS} ratios {low:.2f} {high:.2f}; "
        f"dense products {shares[0]:.0%} and {shares[1]:.0%}; {num} dense parameters, at most {work.max_distinct - 2} "
        f"distinct ids a batch; {CONFIGS[name][1]}"
    )
