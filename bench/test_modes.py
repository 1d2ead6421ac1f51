"""The cost of options of a step: checks for NaN, skipped batches, the graph run operator by operator."""

from __future__ import annotations

import pytest
import torch

from bench.harness import Claims, Loop, compare
from bench.recfx_side import captured_step
from bench.workload import make_batches

NUM_BATCHES, ROWS = 8, 200_000
# (arguments of the program, backend of capture), and those of its baseline
MODES = {
    "on_nonfinite stop": ((("--on_nonfinite=stop",), "inductor"), (("--on_nonfinite=ignore",), "inductor")),
    "on_nonfinite skip": ((("--on_nonfinite=skip",), "inductor"), (("--on_nonfinite=ignore",), "inductor")),
    "backend eager": (((), "eager"), ((), "inductor")),
}


@pytest.mark.parametrize("batch_size", [1000, 4096])
@pytest.mark.parametrize("name", MODES)
def test_mode(benchmark, claims: Claims, name, batch_size):
    work, sides = make_batches(NUM_BATCHES, batch_size, table_rows=ROWS), []
    for arguments, backend in MODES[name]:
        sides.append(captured_step(work, *arguments, backend=backend))
    for batch in work.batches:
        torch.testing.assert_close(sides[0].step(batch), sides[1].step(batch), rtol=1e-4, atol=1e-6)
    loops = (Loop(side.step, work.batches) for side in sides)
    result = benchmark.pedantic(compare, args=loops, kwargs={"blocks": 31, "block_s": 0.1}, rounds=1)
    against = "inductor" if name == "backend eager" else "on_nonfinite ignore"
    claims.add(result.claim(f"DeepFM step, batch {batch_size}, {name}", against, batch_size=batch_size, target=None))
