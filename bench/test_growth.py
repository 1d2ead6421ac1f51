"""Growing from 2^17 to 2^24 rows: the sum of all rehashes against the training between them.

Every id of every batch is new, so that there are as few steps between two doublings as there can be.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.harness import Claim, Claims
from bench.workload import CATEGORICAL, NUMERIC, make_batches
from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.types import Batch, Ragged, pack

BATCH_SIZE, FIRST_ROWS, LAST_ROWS, ALLOWED = 4096, 2**17, 2**24, 0.1
NUM_IDS = BATCH_SIZE * len(CATEGORICAL)


def batch_of_new_ids(base: Batch, number: int) -> Batch:
    """One new id in each categorical column of each sample."""
    ids = (torch.arange(NUM_IDS) + number * NUM_IDS) * 0x9E3779B97F4A7C15
    offsets = torch.arange(BATCH_SIZE + 1, dtype=torch.int32)
    columns = {name: base[name] for name in ("label", *NUMERIC)}
    lists = zip(CATEGORICAL, ids.split(BATCH_SIZE), strict=True)
    return pack(columns | {name: Ragged(values, offsets) for name, values in lists})


@pytest.fixture(scope="module")
def training():
    step, state = program.build_step(program.parse(["--data_paths", "", "--gradient_accumulation_steps", "1"]))
    (base,) = make_batches(1, BATCH_SIZE).batches
    return step, state, base


def test_growth(benchmark, training, claims: Claims) -> None:
    step, state, base = training
    run = capture(step, state, batch_of_new_ids(base, 0))
    (table,) = state.tables

    def train() -> tuple[float, float, int]:
        """Seconds of growth and of training from the step that passes the first rows, and the number of doublings."""
        growth = trained = 0.0
        number, doublings = 0, 0
        while int(table.num_rows) < LAST_ROWS:
            batch, counts = batch_of_new_ids(base, number), int(table.num_rows) + NUM_IDS >= FIRST_ROWS
            slots, begun = int(table.num_slots), time.perf_counter()
            step.grow_(state, step.ids_in(batch))
            grown = time.perf_counter()
            run(state, batch)
            if counts:
                growth, trained = growth + grown - begun, trained + time.perf_counter() - grown
                doublings += int(table.num_slots) > slots
            number += 1
        return growth, trained, doublings

    growth, trained, doublings = benchmark.pedantic(train, rounds=1)
    assert int(table.num_refused) == 0
    assert doublings == 7
    claims.add(
        Claim(
            name="growth, share of training", unit="s / s", recfx=growth / trained, baseline=ALLOWED,
            baseline_name="allowed", ratio=ALLOWED * trained / growth, target=1.0,
        )
    )  # fmt: skip
    claims.note(f"growth 2^17 to 2^24 rows: {doublings} rehashes {growth:.2f} s, training between {trained:.1f} s")
