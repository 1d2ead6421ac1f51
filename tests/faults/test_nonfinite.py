"""NaN and infinity: a run that meets one stops before it saves, or leaves the batch out; nothing is lost."""

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx import checkpoint, optim
from recfx.capture import capture
from recfx.embeddings import Embedding
from recfx.step import train_step
from recfx.table.policies import Life, unseen_for
from recfx.train import TrainConfig, check_finite, evaluate, train
from recfx.types import Ragged, pack
from tests.loop import MemoryReader

NAN, INF = math.nan, math.inf


def make(**kwargs):
    """x multiplies the embeddings; the logit has the square root of b y, whose slope is infinite where y is 0."""
    arguments = {
        "features": dict,
        "embeddings": {"e": [Embedding("item", dim=2)]},
        "forward": lambda p, e, f: e["e"].sum((1, 2))[:, None] * f["x"] + p["b"] + (p["b"] * f["y"]).abs().sqrt(),
        "sparse_optimizer": optim.sparse_adamw(1e-2),
        "dense_optimizer": optim.adamw(1e-2),
        "max_rows": 64,
    }
    return train_step(**arguments | kwargs)


def init(step):
    return step.init({"b": torch.full((1,), 0.5)})


def batch(items, x=1.0, y=1.0):
    num = len(items)
    return pack(
        {
            "label": (torch.arange(num) % 2).float()[:, None],
            "item": Ragged(torch.tensor(items), torch.arange(num + 1, dtype=torch.int32)),
            "x": torch.tensor([1.0] * (num - 1) + [x])[:, None],
            "y": torch.tensor([1.0] * (num - 1) + [y])[:, None],
        }
    )


GOOD = [batch([i, i + 1]) for i in range(9)]
BAD = {
    "NaN feature": batch([20, 1], x=NAN),
    "infinite feature": batch([20, 1], x=INF),
    "infinite slope": batch([20, 1], y=0.0),  # loss and logit are finite
}


def with_bad(place, kind="NaN feature", num=9):
    return [*GOOD[:place], BAD[kind], *GOOD[place:num]]


def saved_numbers(folder):
    return [int(p.name.removeprefix("step-")) for p in sorted(folder.glob("step-*"))]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_train_stops_before_the_save_and_names_step_place_feature_and_ids(tmp_path, kind, accumulation):
    step = make(accumulation=accumulation)
    config = TrainConfig(output_dir=str(tmp_path), save_steps=2, log_steps=100)
    named = {"NaN feature": r"feature 'x' has nan at \[1, 0\]", "infinite feature": r"feature 'x' has inf"}.get(
        kind, ""
    )
    at = 5 if accumulation == 1 else 3
    message = rf"step {at}: got NaN or infinity as a loss, logit or gradient of micro-batch .*{named}"
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(step, step.update_, init(step), MemoryReader(with_bad(4, kind)), config)
    if kind != "infinite slope":  # the sum of an accumulation window is looked at at its end
        assert "follows position {'batch': 4} of epoch 1" in str(caught.value)
        assert "feature 'item' id" in str(caught.value)
    assert saved_numbers(tmp_path) == ([2, 4] if accumulation == 1 else [2])
    state, _ = checkpoint.load(checkpoint.latest(tmp_path), step, init(step))
    assert all(t.isfinite().all() for t in tree_leaves((state.params, state.tables[0].rows[:10])))


@pytest.mark.parametrize("when", ["log", "end", "interrupt"])
def test_the_loop_looks_at_each_log_and_before_every_save(tmp_path, when):
    step = make()
    config = TrainConfig(output_dir=str(tmp_path), log_steps=7 if when == "log" else 100)
    looked = []
    with pytest.raises(FloatingPointError, match="step 5: "):
        train(
            step, step.update_, init(step), MemoryReader(with_bad(4)), config,
            on_event=lambda event, progress, state: looked.append((event, progress.step)),
        )  # fmt: skip
    assert ("log", 7) not in looked
    assert max(n for _, n in looked) == (6 if when == "log" else 10)
    assert saved_numbers(tmp_path) == []


def test_after_a_resume_the_batch_is_found_too(tmp_path):
    step, reader = make(), MemoryReader(with_bad(7))
    train(step, step.update_, init(step), reader, TrainConfig(output_dir=str(tmp_path), train_steps=4))
    with pytest.raises(FloatingPointError, match=r"step 8: .*follows position {'batch': 7} of epoch 1"):
        train(step, step.update_, init(step), reader, TrainConfig(output_dir=str(tmp_path)), resume=True)
    assert saved_numbers(tmp_path) == [4]


def test_an_own_loop_looks_by_itself():
    step = make()
    state = init(step)
    for b in GOOD:
        state, _ = step.update_(state, b)
    check_finite(step, state)
    for b in (BAD["NaN feature"], *GOOD):
        state, _ = step.update_(state, b)
    assert (int(state.nonfinite.first_step), int(state.nonfinite.num_batches)) == (10, 10)  # the dense part stays NaN
    with pytest.raises(FloatingPointError, match=r"step 10: .*feature 'item' id .*parameter 'b'"):
        check_finite(step, state)
    with pytest.raises(
        FloatingPointError, match=r"feature 'x' has nan at \[1, 0\]; feature 'item' id 1; parameter 'b'"
    ):
        check_finite(step, state, batch=BAD["NaN feature"])


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip", "ignore"])
def test_padding_counts_for_nothing(on_nonfinite):
    """A logarithm of the zeros that fill a short batch is -inf, and 0 times that is NaN: no gradient may meet it."""
    step = make(
        on_nonfinite=on_nonfinite,
        features=lambda batch: {**batch, "x": batch["x"].log(), "y": batch["y"] / batch["x"]},
        forward=lambda p, e, f: e["e"].sum((1, 2))[:, None] + f["x"] @ p["w"] + f["y"] * p["b"],
    )
    state = {name: step.init({"w": torch.ones(1, 1), "b": torch.ones(1)}) for name in ("short", "whole")}
    whole = batch([1, 2], x=2.0)
    short = pack(dict(whole), layout=batch([1, 2, 3]).layout)
    assert short["x"].tolist() == [[1], [2], [0]]
    for name, b in (("short", short), ("whole", whole)):
        for _ in range(3):
            state[name], _ = step.update_(state[name], b)
    assert [int(t) for t in state["short"].nonfinite] == [0, 0, 0]
    for a, b in zip(*(tree_leaves((s.params, s.tables[0].rows[:2])) for s in state.values()), strict=True):
        torch.testing.assert_close(a, b)


def test_an_error_names_values_of_real_samples_alone():
    step = make(features=lambda batch: {**batch, "price": batch["x"].log(), "x": batch["x"] * batch["y"].sqrt()})
    b = pack(dict(batch([1, 2], y=-1.0)), layout=batch([1, 2, 3]).layout)
    state, _ = step.update_(init(step), b)
    with pytest.raises(FloatingPointError) as caught:
        check_finite(step, state, batch=b)
    assert "feature 'x' has nan at [1, 0]" in str(caught.value)
    assert "price" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_in_an_incomplete_window_it_is_seen_before_the_flush_and_named_by_its_place(tmp_path, place):
    """The loss is finite there, the slope is not."""
    batches = GOOD[:3]
    batches[place] = BAD["infinite slope"]
    step = make(accumulation=4)
    state = init(step)
    for b in batches:
        state, _ = step.update_(state, b)
    step.flush_(state)
    assert [int(t) for t in state.nonfinite][:2] == [1, place]
    with pytest.raises(FloatingPointError, match=rf"step 1: .* of micro-batch {place}, which"):
        train(step, step.update_, init(step), MemoryReader(batches), TrainConfig(output_dir=str(tmp_path)))
    assert saved_numbers(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_other_types(dtype):
    step = make(forward=lambda p, e, f: e["e"].sum((1, 2))[:, None] * f["x"] + p["b"].float())
    state = step.init({"b": torch.full((3,), 0.5, dtype=dtype)[:1].clone()})
    for b in GOOD:
        state, _ = step.update_(state, b)
    assert [int(t) for t in state.nonfinite] == [0, 0, 0]
    state, _ = step.update_(state, BAD["NaN feature"])
    assert int(state.nonfinite.first_step) == 10


def test_ignore_looks_for_nothing(tmp_path):
    step = make(on_nonfinite="ignore")
    config = TrainConfig(output_dir=str(tmp_path))
    state, progress = train(step, step.update_, init(step), MemoryReader(with_bad(4)), config)
    assert (progress.step, int(state.nonfinite.num_batches)) == (10, 0)
    assert math.isnan(progress.loss)
    check_finite(step, state)


def test_another_word_is_an_error():
    with pytest.raises(ValueError, match=r"on_nonfinite: got 'raise', expected one of \('stop', 'skip', 'ignore'\)"):
        make(on_nonfinite="raise")


# Skipping.


def assert_same_but_for_new_rows(got, expected):
    """All that training moves; rows that the skipped batch inserted come after, at their initial value."""
    for name in ("params", "dense", "metrics", "window", "stats"):
        for a, b in zip(tree_leaves(getattr(got, name)), tree_leaves(getattr(expected, name)), strict=True):
            assert torch.equal(a, b), name
    for a, b in zip(got.tables, expected.tables, strict=True):
        assert int(a.step) == int(b.step)
        rows = {int(id): a.rows[row] for row, id in enumerate(a.ids[: int(a.num_rows)])}
        for row, id in enumerate(b.ids[: int(b.num_rows)].tolist()):
            assert torch.equal(rows.pop(id), b.rows[row])
        assert not any(row[1:].any() for row in rows.values())  # the optimiser has not seen them
        assert int(a.num_unique) == int(b.num_unique)
        assert torch.equal(a.grads, b.grads)


ALL = [(kind, num, how) for kind in BAD for num in (1, 3) for how in ("update", "update_", "captured")]
FEW = [("NaN feature", 1, "update"), ("infinite feature", 3, "update_"), ("infinite slope", 3, "captured")]


@pytest.mark.parametrize(
    ("kind", "accumulation", "spelling"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW)],
)
def test_a_skipped_batch_leaves_everything_as_it_was(kind, accumulation, spelling):
    """It takes its place in the window: the windows of the run without it are shorter there."""
    step = make(on_nonfinite="skip", accumulation=accumulation, life=Life(expire=unseen_for(100), every=1))
    got, expected = init(step), init(step)
    captured = spelling == "captured"
    run = capture(step, got, GOOD[0], backend="eager") if captured else getattr(step, spelling)
    without = step.update if spelling == "update" else step.update_
    for number, b in enumerate(with_bad(4, kind)):
        got, _ = run(got, b)
        if number != 4:
            expected, _ = without(expected, b)
        elif accumulation > 1:
            expected.window.num_batches.add_(1)  # an empty place
        if number == 4:
            assert_same_but_for_new_rows(got, expected)
            assert 20 in got.tables[0].ids[: int(got.tables[0].num_rows)].tolist()
    assert_same_but_for_new_rows(step.flush_(got), step.flush_(expected))
    assert int(got.step) == int(expected.step) + (accumulation == 1)  # the loop's number still increases
    assert [int(t) for t in got.nonfinite] == [{1: 5, 3: 2}[accumulation], {1: 0, 3: 1}[accumulation], 1]


def test_a_window_of_skipped_batches_moves_nothing():
    step = make(on_nonfinite="skip", accumulation=2)
    state, _ = step.update_(init(step), GOOD[0])
    state, _ = step.update_(state, GOOD[1])
    before = [t.clone() for t in tree_leaves((state.params, state.dense, state.tables[0].rows[:3]))]
    for b in (BAD["NaN feature"], BAD["infinite slope"]):
        state, _ = step.update_(state, b)
    after = tree_leaves((state.params, state.dense, state.tables[0].rows[:3]))
    assert all(map(torch.equal, before, after))
    assert (int(state.step), int(state.dense.step), int(state.window.num_batches)) == (2, 1, 0)


def test_skipped_and_resumed_rows_that_are_only_read_are_not_taken_for_others(tmp_path):
    """A feature that does not train leaves a mark in the rows of its table."""
    step = make(
        on_nonfinite="skip",
        embeddings={
            "e": [Embedding("item", dim=2, shared_name="items")],
            "only read": [Embedding("seen", dim=2, shared_name="items", trainable=False)],
        },
    )

    def both(b, seen):
        return pack({**b, "seen": Ragged(torch.tensor(seen), torch.arange(3, dtype=torch.int32))})

    state = init(step)
    state, _ = step.update_(state, both(GOOD[0], [7, 8]))
    state, _ = step.update_(state, both(BAD["NaN feature"], [7, 8]))
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, step, state, number=2, loop={}), step, init(step))
    for s in (state, loaded):
        step.update_(s, both(batch([7, 1]), [8, 20]))
    num = int(state.tables[0].num_rows)
    assert torch.equal(state.tables[0].rows[:num], loaded.tables[0].rows[:num])


def test_train_skips_counts_and_saves(tmp_path):
    step = make(on_nonfinite="skip")
    config = TrainConfig(output_dir=str(tmp_path), save_steps=5, log_steps=5)
    state, progress = train(step, step.update_, init(step), MemoryReader(with_bad(4)), config)
    assert (progress.step, progress.num_nonfinite, int(state.dense.step)) == (10, 1, 9)
    assert math.isfinite(progress.loss)
    assert saved_numbers(tmp_path) == [5, 10]


def test_evaluation_says_how_many_samples_were_not_finite():
    step = make()
    values = evaluate(step.evaluate_, init(step), [GOOD[0], BAD["NaN feature"]])
    assert values["num_nonfinite"] == 1
    assert all(math.isnan(values[name]) for name in ("auc", "log_loss", "calibration"))
    assert evaluate(step.evaluate_, init(step), GOOD)["num_nonfinite"] == 0
