"""What a run writes about itself, and what it decides from its evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recfx import checkpoint
from recfx.capture import capture
from recfx.train import Progress, TrainConfig, train
from recfx.train.stopping import Watch
from recfx.train.watching import FILE, read_metrics_file
from tests.conftest import deepfm_step, linear_params, linear_step
from tests.loop import Log, fresh, go, interrupt, last_bytes, reader_of, saved


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of the file, each of which is strict JSON."""

    def reject(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in (folder / FILE).read_text().splitlines()]


def events(folder: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in lines(folder)]


def scores(*values: float, name: str = "auc") -> Callable[[Any], dict[str, float]]:
    """An evaluation that returns these values in turn, then the last one."""
    left = iter(values)
    last = [math.nan]

    def evaluate_with(state: Any) -> dict[str, float]:
        last[0] = next(left, last[0])
        return {name: last[0]}

    return evaluate_with


def again_from_the_start(folder: Path) -> None:
    step = deepfm_step()
    config = TrainConfig(output_dir=str(folder), log_steps=1)
    train(step, step.update_, fresh(step), reader_of(2), config, overwrite=True)


def by_step(values: dict[int, float], default: float = 0.1) -> Callable[[Any], dict[str, float]]:
    """An evaluation whose value follows from the state, as a real one's does."""
    return lambda state: {"auc": values.get(int(state.step), default)}


def test_a_line_for_each_thing_that_happened(tmp_path):
    state, progress = go(
        tmp_path, reader_of(4), train_epoch=2, log_steps=2, eval_every=3, evaluate_with=scores(0.5, math.nan, 0.7)
    )
    assert events(tmp_path) == [
        ("start", 0), ("log", 2), ("evaluation", 3), ("log", 4), ("evaluation", 4), ("log", 6), ("evaluation", 6),
        ("log", 8), ("evaluation", 8), ("end", 8),
    ]  # fmt: skip
    start, two, three, _, four, *_, end = lines(tmp_path)
    assert (two["samples"], two["epoch"], two["eta_s"]) == (16, 1, None)
    assert two["loss"] == pytest.approx(two["metrics"]["log_loss"])
    assert three["values"] == {"auc": 0.5}
    assert four["values"] == {"auc": None}
    tables = end["tables"]
    assert [t["rows"] for t in start["tables"]] == [0] * len(tables)
    assert [t["rows"] for t in tables] == [int(t.num_rows) for t in state.tables]
    assert [t["inserted"] for t in tables] == [int(t.tally[1]) for t in state.tables]
    assert tables[0]["features"] == ["a", "b", "c"]
    assert set(end["times"]) == {"reading", "compiling", "training", "evaluating", "saving"}
    assert sum(end["times"].values()) - end["times"]["saving"] <= end["train_s"]
    assert (progress.stopped, progress.steps_left) == ("", 0)


def test_eta_is_known_from_train_steps_and_after_an_epoch(tmp_path):
    seen = []

    def look(event: str, progress: Progress, state: Any) -> None:
        if event == "log":
            seen.append((progress.steps_left, progress.eta_s))

    go(tmp_path, reader_of(3), train_epoch=3, log_steps=1, listener=look)
    assert [left for left, _ in seen] == [None, None, None, 5, 4, 3, 2, 1, 0]
    assert all(math.isnan(eta) for _, eta in seen[:3])
    assert all(eta > 0 for _, eta in seen[3:-1])
    seen.clear()
    go(tmp_path / "steps", reader_of(3), train_epoch=3, train_steps=4, log_steps=1, listener=look)
    assert [left for left, _ in seen] == [3, 2, 1, 0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_writes_each_step_once(tmp_path, accumulation):
    how = {"log_steps": 1, "save_steps": 2, "eval_every": 2, "evaluate_with": by_step({}), "accumulation": accumulation}
    with pytest.raises(RuntimeError, match="power"):
        go(tmp_path, reader_of(8), listener=Log(("after_step", 3), partial(fail, "power")), **how)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "log", "st')  # killed while it wrote
    go(tmp_path, reader_of(8), resume=True, **how)
    whole = tmp_path / "whole"
    go(whole, reader_of(8), **how)
    found = [e for e in events(tmp_path) if e[0] != "start"]
    assert found == [e for e in events(whole) if e[0] != "start"]
    assert [e for e in events(tmp_path) if e[0] == "start"] == [("start", 0), ("start", 2)]
    again_from_the_start(tmp_path)
    assert events(tmp_path)[0] == ("start", 0)
    assert max(step for _, step in events(tmp_path)) == 2


def fail(what: str) -> None:
    raise RuntimeError(what)


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"metrics.jsonl cannot be written \(.*\). Training goes on") as warned:
        _, progress = go(tmp_path, reader_of(3), log_steps=1)
    assert len(warned) == 1
    assert progress.step == 3


def test_early_stopping_ends_the_run_and_keeps_the_best(tmp_path):
    values = {2: 0.6, 4: 0.8, 6: 0.7, 8: 0.75}
    _, progress = go(
        tmp_path, reader_of(20), eval_every=2, stop_after=2, save_steps=3, max_to_keep=1, evaluate_with=by_step(values)
    )
    assert (progress.step, progress.stopped) == (8, "stop_after")
    assert saved(tmp_path) == [4, 8]
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["checkpoint"], best["watch"], best["value"]) == ("step-000000004", "auc", 0.8)
    assert checkpoint.best(tmp_path).name == "step-000000004"
    with pytest.warns(match="nothing is left to train"):
        _, again = go(tmp_path, reader_of(20), resume=True, eval_every=2, stop_after=2, evaluate_with=by_step(values))
    assert (again.step, again.stopped) == (8, "stop_after")
    assert checkpoint.best(tmp_path).name == "step-000000004"
    again_from_the_start(tmp_path)
    assert checkpoint.best(tmp_path) is None


@pytest.mark.parametrize("saves_in_background", [False, True])
def test_the_best_of_epochs_is_kept(tmp_path, saves_in_background):
    how = {"train_epoch": 4, "watch": "log_loss", "max_to_keep": 1, "save_in_background": saves_in_background}
    go(tmp_path, reader_of(2), evaluate_with=scores(0.5, 0.3, 0.4, 0.6, name="log_loss"), **how)
    assert saved(tmp_path) == [4, 8]
    assert checkpoint.best(tmp_path).name == "step-000000004"


@pytest.mark.parametrize("at", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_decides_the_same(tmp_path, at, accumulation):
    """Wherever it was stopped, also at a step whose evaluation it then missed."""
    values = {2: 0.6, 3: 0.61, 4: 0.5, 6: 0.4, 8: 0.9, 9: 0.7, 10: 0.7, 12: 0.7}
    how = {
        "train_epoch": 4, "eval_every": 2, "reduce_after": 2, "stop_after": 3, "save_steps": 2,
        "make": partial(deepfm_step, rate_factor=True), "evaluate_with": by_step(values), "accumulation": accumulation,
    }  # fmt: skip
    num = 3 * accumulation
    _, whole = go(tmp_path / "whole", reader_of(num), **how)
    go(tmp_path / "two", reader_of(num), listener=Log(("after_step", at), interrupt), **how)
    _, second = go(tmp_path / "two", reader_of(num), resume=True, **how)
    assert (second.step, second.stopped, second.rate_factor) == (whole.step, whole.stopped, whole.rate_factor)
    assert whole.rate_factor < 1
    assert last_bytes(tmp_path / "two") == last_bytes(tmp_path / "whole")
    assert checkpoint.best(tmp_path / "two").name == checkpoint.best(tmp_path / "whole").name == "step-000000008"
    assert [e for e in events(tmp_path / "two") if e[0] == "evaluation"] == [
        e for e in events(tmp_path / "whole") if e[0] == "evaluation"
    ]


def test_learning_rates_are_lowered_without_another_graph(tmp_path):
    """A step at a factor of 0.5 is one of half the learning rates; captured once."""
    from recfx.optim import adamw, schedules, sparse_adamw

    def make(lr: float, **kwargs: Any) -> Any:
        rate = schedules.warm_up(lr, 4)
        return deepfm_step(sparse_optimizer=sparse_adamw(rate), dense_optimizer=adamw(rate), **kwargs)

    batches = reader_of(3).batches
    step, half = make(1e-2, rate_factor=True), make(5e-3)
    state, other = fresh(step), fresh(half)
    run = capture(step, state, batches[0], backend="eager", new_layout="raise")
    state.rate.fill_(0.5)
    for batch in batches:
        state, _ = run(state, batch)
        other, _ = half.update_(other, batch)
    for name, p in state.params.items():
        torch.testing.assert_close(p, other.params[name])
    torch.testing.assert_close(state.tables[0].rows, other.tables[0].rows)
    checkpoint.save(tmp_path, step, state, number=3, loop={})
    loaded, _ = checkpoint.load(checkpoint.latest(tmp_path), step, fresh(step))
    assert float(loaded.rate) == 0.5
    checkpoint.load(checkpoint.latest(tmp_path), half, fresh(half))  # a state without a factor


def test_a_listener_ends_the_run_and_it_goes_on_from_there(tmp_path):
    def stop(event: str, progress: Progress, state: Any) -> str | None:
        return "stop" if (event, progress.step) == ("after_step", 3) else None

    def call(event: str, progress: Progress, state: Any) -> None:
        if (event, progress.step) == ("log", 4):
            progress.stop()

    _, first = go(tmp_path, reader_of(6), listener=stop, log_steps=1)
    assert (first.step, first.stopped) == (3, "listener")
    _, second = go(tmp_path, reader_of(6), listener=call, resume=True, log_steps=1)
    assert (second.step, second.stopped) == (4, "listener")
    go(tmp_path, reader_of(6), resume=True)
    go(tmp_path / "whole", reader_of(6))
    assert last_bytes(tmp_path) == last_bytes(tmp_path / "whole")


def test_what_cannot_be_decided_is_an_error(tmp_path):
    step = deepfm_step()
    for name in ("eval_every", "watch", "stop_after", "reduce_after"):
        config = TrainConfig(output_dir=str(tmp_path), **{name: "auc" if name == "watch" else 2})
        with pytest.raises(ValueError, match=f"{name}: got .* without an evaluation"):
            train(step, step.update_, fresh(step), reader_of(2), config)
    with pytest.raises(ValueError, match=r"Build the step with train_step\(rate_factor=True\)"):
        go(tmp_path, reader_of(2), reduce_after=2, evaluate_with=scores(0.5))
    with pytest.raises(ValueError, match="watch: got 'click/auc', expected one of 'auc'"):
        go(tmp_path, reader_of(2), watch="click/auc", evaluate_with=scores(0.5))
    assert saved(tmp_path) == [2]  # what was trained is not lost
    with pytest.raises(ValueError, match="watch: got 'calibration', expected a value of which"):
        go(tmp_path / "other", reader_of(2), watch="calibration", evaluate_with=scores(0.5, name="calibration"))
    with pytest.raises(ValueError, match=r"reduce_by: got 1.0"):
        TrainConfig(reduce_by=1.0)
    with pytest.raises(TypeError, match="watch"):
        TrainConfig(watch=3)


def test_nan_is_never_an_improvement():
    watch = Watch("loss", stop_after=2, reduce_after=1)
    taken = [watch.take(step, {"loss": value}) for step, value in enumerate([math.nan, 0.5, math.nan, 0.4, 0.4, 0.4])]
    assert [d.improved for d in taken] == [False, True, False, True, False, False]
    assert [d.reduces for d in taken] == [True, False, True, False, True, True]
    assert [d.stops for d in taken] == [False, False, False, False, False, True]
    again = Watch("loss", stop_after=2)
    again.restore(json.loads(json.dumps(watch.record())))
    assert (again.best, again.best_step, again.stops) == (0.4, 3, True)
    again.restore({**watch.record(), "key": "auc"})


def test_lines_of_a_missing_or_damaged_file(tmp_path):
    assert read_metrics_file(tmp_path / FILE) == []
    (tmp_path / FILE).write_text('nonsense\n[1]\n{"event": "log", "step": 1}\n{"step": 2}\n')
    assert read_metrics_file(tmp_path / FILE) == [{"event": "log", "step": 1}]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_factor_is_read_by_a_compiled_graph(accumulation):
    step = linear_step(rate_factor=True, accumulation=accumulation)
    state, other = step.init(linear_params()), step.init(linear_params())
    batches = reader_of(4).batches
    run = capture(step, state, batches[0], new_layout="raise")
    for number, batch in enumerate(batches):
        if number == 2:
            state.rate.fill_(0.25)
            other.rate.fill_(0.25)
        state, _ = run(state, batch)
        other, _ = step.update_(other, batch)
    torch.testing.assert_close(state.params["bias"], other.params["bias"])
    torch.testing.assert_close(state.tables[0].rows, other.tables[0].rows)
