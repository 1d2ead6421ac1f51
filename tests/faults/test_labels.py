"""Labels outside [0, 1]: counted in the step, an error where a loop logs, before it saves and after an evaluation."""

import math

import pytest
import torch

from recfx import metrics, optim
from recfx.capture import capture
from recfx.embeddings import Embedding
from recfx.losses import bce_with_logits
from recfx.step import train_step
from recfx.train import TrainConfig, check_finite, check_labels, evaluate, reset_metrics_, train
from recfx.types import Ragged, pack
from tests.loop import MemoryReader


def make(**kwargs):
    arguments = {
        "features": lambda batch: {**batch, "clicked": batch["label"]},
        "label": "clicked",
        "embeddings": {"e": [Embedding("item", dim=2)]},
        "forward": lambda p, e, f: e["e"].sum((1, 2))[:, None] + p["b"],
        "sparse_optimizer": optim.sparse_adamw(1e-2),
        "dense_optimizer": optim.adamw(1e-2),
        "max_rows": 64,
    }
    return train_step(**arguments | kwargs)


def init(step):
    return step.init({"b": torch.zeros(1)})


def batch(*labels, layout=None):
    num = len(labels)
    items = Ragged(torch.arange(num), torch.arange(num + 1, dtype=torch.int32))
    return pack({"label": torch.tensor(labels)[:, None], "item": items}, layout=layout)


GOOD = [batch(0.0, 1.0), batch(0.25, 0.75)]
BAD = [math.nan, 2.0, -1e-3, math.inf]


def go(folder, batches, step=None, **config):
    step = step or make()
    return train(step, step.update_, init(step), MemoryReader(batches), TrainConfig(output_dir=str(folder), **config))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_train_raises_at_the_next_log_and_names_steps_value_and_place(tmp_path, bad, accumulation):
    batches = [*GOOD * 2, batch(1.0, bad), *GOOD * 3]
    steps = "5 to 6" if accumulation == 1 else "3 to 4"
    with pytest.raises(ValueError, match="feature 'clicked': got 1 label outside") as caught:
        go(tmp_path, batches * accumulation, make(accumulation=accumulation), log_steps=2)
    assert str(caught.value) == (
        f"feature 'clicked': got 1 label outside [0, 1] in steps {steps}, such as {torch.tensor(bad).item()} at [1, 0] "
        "of the batch that follows position {'batch': 4} of epoch 1, expected 0 to 1. Binary cross entropy has no "
        "minimum there: the logit of such a label grows without end. Nothing was saved since. Let the reader name the "
        "row: fixedlen('clicked', [0.0], valid=OneOf(0, 1)). Another loss is not checked, and "
        "train_step(check_labels=False) accepts such labels."
    )
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize("config", [{"save_steps": 3}, {}])
def test_before_every_save(tmp_path, config):
    with pytest.raises(ValueError, match=r"got 2 labels outside \[0, 1\] in steps (1|4) to (3|6|7)"):
        go(tmp_path, [*GOOD, *GOOD, batch(2.0, -1.0), *GOOD], log_steps=100, **config)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000000003"] * bool(config)


def test_in_the_second_epoch_and_of_soft_labels(tmp_path):
    days, step = MemoryReader(GOOD), make()
    days.epoch = lambda number: MemoryReader(GOOD if number == 0 else [batch(3.0, 0.0)]).start_at({"batch": 0})
    config = TrainConfig(output_dir=str(tmp_path / "x"), train_epoch=2)
    with pytest.raises(ValueError, match="is the first one of epoch 2"):
        train(step, step.update_, init(step), days, config)
    _, progress = go(tmp_path / "soft", GOOD)
    assert progress.step == 2


def test_padding_is_not_a_label(tmp_path):
    """A short batch has zeros there; what a feature function makes of them may be anything."""
    step = make(features=lambda b: {**b, "clicked": torch.where(b["label"] > 0, b["label"], 7.0)})
    short = batch(1.0, layout=batch(1.0, 1.0, 1.0).layout)
    assert short["label"].shape == (3, 1)
    state, _ = go(tmp_path, [short], step)
    assert metrics.num_bad_labels(state.metrics) == 0
    assert evaluate(step.evaluate_, state, [short])["num_samples"] == 1


@pytest.mark.parametrize(
    ("how", "checks"),
    [
        ({}, True),
        ({"check_labels": True}, True),
        ({"check_labels": False}, False),
        ({"loss": lambda logit, label: (logit - label).square()}, False),
        ({"loss": lambda logit, label: bce_with_logits(logit, label), "check_labels": True}, True),
        ({"metrics": metrics.binary_metrics(2**10)}, True),
        ({"metrics": metrics.binary_metrics(2**10), "check_labels": False}, False),
    ],
)
def test_which_steps_check(tmp_path, how, checks):
    step = make(**how)
    bad = [*GOOD, batch(2.0, 0.0)]
    if not checks:
        state, _ = go(tmp_path, bad, step)
        assert evaluate(step.evaluate_, state, bad)["num_samples"] == 6
        assert metrics.num_bad_labels(state.metrics) == 0
        assert (state.metrics.sums.numel(), step.update(init(step), bad[2])[0].metrics.sums.numel()) == (5, 5)
        return
    with pytest.raises(ValueError, match="feature 'clicked': got 1 label outside"):
        go(tmp_path, bad, step)
    for update in (step.update, step.update_):
        assert metrics.num_bad_labels(update(init(step), bad[2])[0].metrics) == 1


def test_another_kind_of_flag_is_an_error():
    with pytest.raises(TypeError, match=r"check_labels: got 'no', expected bool or None. None: they are checked"):
        make(check_labels="no")


def test_captured_it_counts_the_same(tmp_path):
    step = make()
    state = init(step)
    run = capture(step, state, GOOD[0], backend="eager")
    for b in (*GOOD, batch(2.0, math.nan), *GOOD):
        state, _ = run(state, b)
    assert metrics.num_bad_labels(state.metrics) == 2


def test_an_own_loop_looks_by_itself():
    step = make()
    state, _ = step.update_(init(step), GOOD[0])
    check_labels(step, state)
    state, _ = step.update_(state, batch(2.0, 0.0))
    for check in (check_labels, check_finite):
        with pytest.raises(ValueError, match=r"feature 'clicked': got 1 label outside \[0, 1\], expected 0 to 1"):
            check(step, state)
    reset_metrics_(state)
    check_finite(step, state)


def test_labels_from_before_are_an_error_before_the_first_step(tmp_path):
    step = make()
    state, _ = step.update_(init(step), batch(2.0, 0.0))
    config = TrainConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"outside \[0, 1\], before this call of train, expected 0 to 1"):
        train(step, step.update_, state, MemoryReader(GOOD), config)
    assert int(state.step) == 1


def test_a_reader_that_cannot_read_again_keeps_the_message(tmp_path):
    reader, calls = MemoryReader([*GOOD, batch(2.0, 0.0)]), []
    begin = reader.start_at

    def start_at(position):
        calls.append(position)
        if len(calls) > 1:
            raise FileNotFoundError("part-0 is gone")
        return begin(position)

    reader.start_at = start_at
    step = make()
    with pytest.raises(ValueError, match=r"1 to 3, which could not be read again \(part-0 is gone\), expected 0 to 1"):
        train(step, step.update_, init(step), reader, TrainConfig(output_dir=str(tmp_path)))


def test_skipped_batches_are_left_out_of_the_count_too(tmp_path):
    state, progress = go(tmp_path, [*GOOD, batch(math.nan, 0.0)], make(on_nonfinite="skip"))
    assert (progress.num_nonfinite, metrics.num_bad_labels(state.metrics)) == (1, 0)
    with pytest.raises(ValueError, match=r"got 1 label outside .* in steps 1 to 4, such as 2\.0 at") as caught:
        go(tmp_path / "two", [*GOOD, batch(math.nan, 0.0), batch(0.0, 2.0)], make(on_nonfinite="skip"))
    assert "follows position {'batch': 3}" in str(caught.value)


def test_one_step_is_named_as_one(tmp_path):
    with pytest.raises(ValueError, match=r"got 1 label outside .* in step 3, such as 2\.0 at"):
        go(tmp_path, [*GOOD, batch(0.0, 2.0)], log_steps=1)


# Evaluation.


def test_evaluation_names_batch_column_and_value():
    step, held_out = make(), [*GOOD, batch(0.0, 2.0), batch(5.0, 5.0)]
    state, _ = step.update_(init(step), GOOD[0])
    before = [t.clone() for t in state.metrics]
    with pytest.raises(
        ValueError, match=r"^batches: got 3 labels outside \[0, 1\], the first in batch 3, where column "
    ) as e:
        evaluate(step.evaluate_, state, MemoryReader(held_out))
    assert "column 'label' has 2.0 at [1, 0], expected 0 to 1. Binary cross entropy" in str(e.value)
    assert all(map(torch.equal, before, state.metrics))
    with pytest.raises(ValueError, match=r"^batches: got 1 label outside \[0, 1\], expected 0 to 1"):
        evaluate(step.evaluate_, state, iter(held_out), eval_steps=3)  # an iterator is read once
    assert evaluate(step.evaluate_, state, held_out, eval_steps=2)["num_samples"] == 4
    assert all(map(torch.equal, before, state.metrics))


def test_metrics_come_out_unchanged_where_evaluation_fails():
    step = make()
    state, _ = step.update_(init(step), GOOD[0])
    before = [t.clone() for t in state.metrics]

    def broken():
        yield GOOD[1]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        evaluate(step.evaluate_, state, broken())
    assert all(map(torch.equal, before, state.metrics))
