"""A batch of another layout than the captured one is compiled for, runs uncaptured, or is an error."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from recfx.capture import capture, capture_evaluation
from recfx.step import Step
from recfx.types import Batch, pack
from tests.conftest import (
    BATCH_SIZE,
    CAPACITY,
    FEATURES,
    NUM_NUMERIC,
    SMALL_IDS,
    deepfm_batches,
    deepfm_params,
    deepfm_step,
)
from tests.reference import pack_samples, random_samples
from tests.step.test_step import assert_same_state


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step()


def fresh(step: Step) -> Any:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


def wider(seed: int) -> Batch:
    """Of twice the capacity, and full of more ids than the captured layout holds."""
    rng = random.Random(seed)
    samples = random_samples(rng, BATCH_SIZE, features=FEATURES, num_numeric=NUM_NUMERIC, ids=SMALL_IDS, longest=6)
    return pack_samples(samples, BATCH_SIZE, capacity=2 * CAPACITY)


def test_an_error_names_the_feature_and_both_capacities_and_changes_nothing(step):
    batch, state = deepfm_batches(1)[0], fresh(step)
    call = capture(step, state, batch, new_layout="raise")
    before = [t.clone() for t in tree_leaves(state)]
    message = (
        rf"feature 'a': got values i64\[{2 * CAPACITY}\], offsets i32\[{BATCH_SIZE + 1}\], "
        rf"expected values i64\[{CAPACITY}\], .*; feature 'b': .*; feature 'c': .* new_layout is 'raise'"
    )
    with pytest.raises(ValueError, match=message):
        call(state, wider(0))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), before, strict=True))
    state, _ = call(state, batch)
    expected, _ = step.update_(step.grow_(fresh(step), (1000,)), batch)
    assert_same_state(state, expected)


def test_what_else_an_error_can_name(step):
    batch = deepfm_batches(1)[0]
    call = capture(step, fresh(step), batch, new_layout="raise")
    columns = dict(batch)
    without = {name: c for name, c in columns.items() if name != "b"}
    wrong = {**columns, "numeric": columns["numeric"].double()}
    for changed, message in (
        ({**columns, "more": torch.zeros(BATCH_SIZE, 1)}, r"^feature 'more': got dense f32\[8, 1\], expected no such"),
        (without, r"^feature 'b': got no such column, expected values i64"),
        (wrong, r"^feature 'numeric': got dense f64\[8, 2\], expected dense f32\[8, 2\]\. The"),
        (dict(reversed(columns.items())), r"^columns: got them in the order \['c', .*expected \['a'"),
        ({**columns, **{f"x{i}": columns["label"] for i in range(5)}}, r"feature 'x2': [^;]* and 2 more\. The step"),
    ):
        with pytest.raises(ValueError, match=message):
            call(fresh(step), pack(changed))


def test_uncaptured_steps_mix_with_captured_ones_and_compile_nothing(step):
    """The captured steps between them go on from the tables that the others have grown."""
    batches = deepfm_batches(6)
    mixed = [b for n, batch in enumerate(batches) for b in (batch, wider(n))]
    call = capture(step, fresh(step), batches[0], new_layout="uncaptured")
    state, _ = call(fresh(step), batches[0])
    counters.clear()
    state, expected = fresh(step), fresh(step)
    for batch in mixed:
        state, aux = call(state, batch)
        expected, expected_aux = step.update_(step.grow_(expected, step.ids_in(batch)), batch)
        torch.testing.assert_close(aux.loss, expected_aux.loss, rtol=1e-5, atol=1e-6)
        assert_same_state(state, expected)
    assert counters["stats"]["unique_graphs"] == 0


def test_evaluation_has_the_same_choice(step):
    batch, state = deepfm_batches(1)[0], fresh(step)
    with pytest.raises(ValueError, match="feature 'a'"):
        capture_evaluation(step, state, batch, new_layout="raise")(state, wider(0))
    evaluate = capture_evaluation(step, state, batch, new_layout="uncaptured")
    counters.clear()
    state, aux = evaluate(state, wider(0))
    expected, expected_aux = step.evaluate_(fresh(step), wider(0))
    assert torch.equal(aux.logit, expected_aux.logit)
    assert torch.equal(state.metrics.sums, expected.metrics.sums)
    assert counters["stats"]["unique_graphs"] == 0


def test_errors(step):
    batch = deepfm_batches(1)[0]
    with pytest.raises(
        ValueError, match=r"new_layout: got 'grow', expected one of \('capture', 'uncaptured', 'raise'\)"
    ):
        capture(step, fresh(step), batch, new_layout="grow")
    with pytest.raises(TypeError, match=r"batch: got dict, expected recfx.types.Batch"):
        capture(step, fresh(step), dict(batch), new_layout="raise")
