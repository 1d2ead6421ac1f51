"""Captured steps of `recfx.models` against torch.compile of plain modules over remapped ids, in alternating pairs."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.harness import Child, Claims, Loop, call_in_child, compare
from bench.model_sides import CONFIGS, NUM_BATCHES, first_params, ours, share_of_products, theirs, work_of

BATCH_SIZE, PAIRS = 4096, 30


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_the_opponent_s(name):
    work = work_of(name, 128)
    step, opponent = ours(name, work, backend="eager").step, theirs(name, work.max_distinct, compiled=False)
    for _ in range(2):
        for batch, plain in zip(work.batches[:6], work.plain[:6], strict=True):
            torch.testing.assert_close(step(batch), opponent(plain), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_step(benchmark, claims: Claims, name):
    """Not below 1.0 by more than the interquartile range; 1.2 where dense products take under half of both sides."""
    work = work_of(name, BATCH_SIZE)
    step = ours(name, work).step
    with Child("bench.model_sides:child_loop", name=name, batch_size=BATCH_SIZE) as side:
        how = {"blocks": PAIRS, "block_s": 0.2}
        result = benchmark.pedantic(compare, args=(Loop(step, work.batches), side), kwargs=how, rounds=1)
    shares = (
        share_of_products(step, work.batches),
        call_in_child("bench.model_sides:share_of_theirs", name=name, batch_size=BATCH_SIZE),
    )
    ratios = [b / r for r, b in zip(result.recfx_s, result.baseline_s, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    target = 1.2 if max(shares) < 0.5 else 1.0 - (high - low)
    claims.add(
        result.claim(
            f"{name} step, batch {BATCH_SIZE}", "torch.compile of nn.Module", batch_size=BATCH_SIZE, target=target
        )
    )
    num = sum(p.numel() for p in first_params(name).values())
    ms = [1e3 * statistics.median(seconds) for seconds in (result.recfx_s, result.baseline_s)]
    claims.note(
        f"{name}: {ms[0]:.1f} and {ms[1]:.1f} ms; quartiles of {PAIRS} ratios {low:.2f} {high:.2f}; dense products "
        f"{shares[0]:.0%} and {shares[1]:.0%}; {num} dense parameters, {work.max_distinct - 2} distinct ids a batch of "
        f"{NUM_BATCHES}; {CONFIGS[name][1]}"
    )
