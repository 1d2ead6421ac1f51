"""Metrics in training, and evaluation on held-out batches."""

from __future__ import annotations

import pytest
import torch

from recfx import metrics
from recfx.step import TrainState
from recfx.train import Progress, evaluate
from recfx.types import NUM_SAMPLES
from tests.conftest import BATCH_SIZE, deepfm_batches, deepfm_step
from tests.loop import fresh, go, last_bytes, reader_of
from tests.reference import exact_auc


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_metrics_start_from_zero_in_every_epoch(tmp_path):
    def look(event: str, progress: Progress, state: TrainState) -> None:
        counted.append((event, int(state.metrics.sums[0]), progress.loss))

    counted: list = []
    _, progress = go(tmp_path, reader_of(3), train_epoch=2, log_steps=1, listener=look)
    assert [n for event, n, _ in counted if event == "before_epoch"] == [0, 0]
    assert [n for event, n, _ in counted if event == "log"] == [BATCH_SIZE * i for i in (1, 2, 3)] * 2
    assert all(loss > 0 for event, _, loss in counted if event == "log")
    assert progress.loss == counted[-1][2]


def test_loss_and_auc_of_the_last_epoch_are_known_at_the_end(tmp_path):
    """Also when there were fewer steps than log_steps."""
    state, progress = go(tmp_path, reader_of(3), train_epoch=2)
    assert (progress.loss, progress.auc) == (metrics.log_loss(state.metrics), metrics.auc(state.metrics))
    assert progress.loss > 0
    assert 0 < progress.auc < 1


def leaves(state: TrainState) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(state)


def test_evaluate_changes_no_byte_of_the_state(tmp_path):
    """Ids it has never seen included, and not even in the middle of an accumulation window."""
    step = deepfm_step(accumulation=2)
    state = fresh(step)
    for batch in deepfm_batches(3, seed=5):
        state, _ = step.update_(state, batch)
    assert int(state.window.num_batches) == 1
    assert int(state.metrics.sums[0]) > 0
    before, tensors = [t.clone() for t in leaves(state)], leaves(state)
    held_out = deepfm_batches(4, seed=9, ids=tuple(range(20, 90)), short_last=True)
    first, again = (evaluate(step.evaluate_, state, held_out) for _ in range(2))
    assert first == again
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(a is b for a, b in zip(tensors, leaves(state), strict=True))


def test_evaluate_against_exact_values():
    step = deepfm_step()
    state = fresh(step)
    for batch in deepfm_batches(6, seed=5):
        state, _ = step.update_(state, batch)
    held_out = deepfm_batches(20, seed=9, short_last=True)
    values = evaluate(step.evaluate_, state, held_out)
    logit, label = ([], [])
    for batch in held_out:
        num = int(batch[NUM_SAMPLES])
        logit.append(step.evaluate_(state, batch)[1].logit[:num, 0].double())
        label.append(batch["label"][:num, 0].double())
    logit, label = torch.cat(logit), torch.cat(label)
    assert values["num_samples"] == len(label) == 20 * BATCH_SIZE - BATCH_SIZE // 2 - 1
    assert values["auc"] == pytest.approx(exact_auc(logit, label), abs=1e-3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
    assert values["log_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert values["calibration"] == pytest.approx(float(logit.sigmoid().sum() / label.sum()), rel=1e-5)


@pytest.mark.parametrize("eval_steps", [1, 3, 99])
def test_eval_steps(eval_steps):
    step = deepfm_step()
    reader = reader_of(5)
    values = evaluate(step.evaluate_, fresh(step), reader, eval_steps=eval_steps)
    assert values["num_samples"] == BATCH_SIZE * min(eval_steps, 5)


@pytest.mark.parametrize(
    ("batches", "eval_steps", "message"),
    [
        ([], None, "batches: got none from .*, expected one at least. There is nothing to evaluate"),
        (deepfm_batches(1), 0, "eval_steps: got 0, expected at least 1"),
    ],
)
def test_nothing_to_evaluate(batches, eval_steps, message):
    step = deepfm_step()
    state = fresh(step)
    state.metrics.sums.fill_(3)
    with pytest.raises(ValueError, match=message):
        evaluate(step.evaluate_, state, batches, eval_steps=eval_steps)
    assert state.metrics.sums.tolist() == [3] * 6


def test_evaluating_changes_nothing_in_training(tmp_path):
    held_out = deepfm_batches(3, seed=9, ids=tuple(range(20, 90)))
    step = deepfm_step()
    go(tmp_path / "with", reader_of(5), train_epoch=2, evaluate_with=lambda s: evaluate(step.evaluate_, s, held_out))
    go(tmp_path / "without", reader_of(5), train_epoch=2)
    assert last_bytes(tmp_path / "with") == last_bytes(tmp_path / "without")
