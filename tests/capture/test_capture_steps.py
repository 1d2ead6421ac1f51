"""Several steps per replay are the steps one after another: on a CPU, and through a stand-in for CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx.capture import capture, capture_evaluation, capture_prediction, capture_steps
from recfx.capture import captured as capture_module
from recfx.capture import recorded as cuda_graph
from recfx.step import Step
from recfx.table import functions as table_module
from recfx.table.policies import Life, least_recently_used, unseen_for
from recfx.train import TrainConfig, train
from recfx.types import Batch, pack
from tests.capture.test_cuda_graph import Recorder
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
from tests.loop import Log, MemoryReader, interrupt, last_bytes
from tests.step.test_step import assert_same_state

MORE_IDS = tuple(range(1000, 1400))


def fresh(step: Step) -> Any:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


def stream(num: int = 21) -> list[Batch]:
    return deepfm_batches(4) + deepfm_batches(num - 4, seed=1, ids=MORE_IDS, short_last=True)


def wider(batch: Batch) -> Batch:
    """The same batch in another layout."""
    return pack({**batch, "more": torch.zeros(8, 1)})


def grouped(batches: Sequence[Batch], most: int) -> list[list[Batch]]:
    return [list(batches[first : first + most]) for first in range(0, len(batches), most)]


def one_by_one(step: Step, batches: Sequence[Batch]) -> tuple[Any, list[Any]]:
    state, auxes = fresh(step), []
    for batch in batches:
        state, aux = step.update_(state, batch)
        auxes.append(aux)
    return state, auxes


def bytes_of(state: Any) -> list[torch.Tensor]:
    return [t.detach().clone() for t in tree_leaves(state)]


def assert_unchanged(state: Any, before: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), before, strict=True))


@pytest.fixture(autouse=True)
def _small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth from the first batch on; steps are not compiled."""
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)
    monkeypatch.setattr(capture_module, "compiled", lambda function, state, sections: function)


@pytest.fixture(params=["cpu", "recorded"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What recorded the steps; nothing on a CPU as it is."""
    recorder = Recorder()
    if request.param == "recorded":
        monkeypatch.setattr(capture_module, "RECORDED_ON", ("cpu",))
        monkeypatch.setattr(capture_module, "_recorder", lambda precision: recorder)
    return recorder


def is_recorded() -> bool:
    return "cpu" in capture_module.RECORDED_ON


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("most", [1, 4, 64])
def test_state_and_every_aux_are_those_of_steps_one_after_another(recorder, most, accumulation, monkeypatch):
    """The index grows, the last call is short; a window ends within a call and another goes on into the next."""
    monkeypatch.setattr(cuda_graph, "STEPS_AHEAD", 2)
    step, batches = deepfm_step(accumulation=accumulation, max_rows=4096), stream(66)
    state = fresh(step)
    run = capture_steps(step, state, batches[0], steps_per_replay=most)
    expected, expected_auxes = one_by_one(step, batches)
    for some in grouped(batches, most):
        state, auxes = run(state, some)
        assert len(auxes) == len(some)
        for aux in auxes:
            for got, wanted in zip(tree_leaves(aux), tree_leaves(expected_auxes.pop(0)), strict=True):
                torch.testing.assert_close(got, wanted)
        auxes.clear()  # the list is the caller's
    assert_same_state(state, expected)
    assert int(state.tables[0].num_slots) > 8
    assert int(state.tables[0].num_refused) == 0
    if is_recorded():
        assert recorder.nums == ([1] if most == 1 else [most, 1])


def test_batches_of_other_layouts_take_single_replays(recorder):
    step, batches = deepfm_step(), stream(14)
    mixed = [wider(b) if n in (5, 8, 9, 10, 11) else b for n, b in enumerate(batches)]
    state = fresh(step)
    run = capture_steps(step, state, batches[0], steps_per_replay=4)
    losses = []
    for some in grouped(mixed, 4):
        state, auxes = run(state, some)
        losses += [aux.loss.clone() for aux in auxes]
    expected, auxes = one_by_one(step, batches)
    assert_same_state(state, expected)
    torch.testing.assert_close(losses, [aux.loss for aux in auxes])
    if is_recorded():
        plain, other = batches[0].layout, mixed[5].layout
        assert list(zip(recorder.made, recorder.nums, strict=True)) == [
            (plain, 4), (plain, 1), (other, 1), (other, 4),
        ]  # fmt: skip


def test_room_is_made_for_all_steps_of_a_replay(recorder, monkeypatch):
    """Every id is new, and room for one step alone would be too little for the second."""
    monkeypatch.setattr(cuda_graph, "STEPS_AHEAD", 1)
    step = deepfm_step(max_rows=4096)
    batches = [deepfm_batches(1, seed=n, ids=tuple(range(100 * n, 100 * n + 100)))[0] for n in range(40)]
    state, run = fresh(step), capture_steps(step, fresh(step), batches[0], steps_per_replay=8)
    for some in grouped(batches, 8):
        state, _ = run(state, some)
    assert int(state.tables[0].num_refused) == 0
    assert_same_state(state, one_by_one(step, batches)[0])


def test_evaluations_between_calls_see_what_they_would_and_leave_no_trace(recorder):
    step, batches, held_out = deepfm_step(), stream(12), deepfm_batches(2, seed=9)
    run = capture_steps(step, fresh(step), batches[0], steps_per_replay=4)
    evaluate = capture_evaluation(step, fresh(step), batches[0])
    state, other = fresh(step), fresh(step)
    for some in grouped(batches, 4):
        state, _ = run(state, some)
        for batch in some:
            other, _ = step.update_(other, batch)
        for batch in held_out:
            state, aux = evaluate(state, batch)
            other, expected = step.evaluate_(other, batch)
            torch.testing.assert_close(aux.logit, expected.logit)
    assert_same_state(state, other)


def test_predictions_between_calls_see_what_they_would_and_change_nothing(recorder):
    """One recording serves a state that is trained on: growth moves nothing, and requests need no label."""
    step, batches = deepfm_step(max_rows=4096), stream(12)
    requests = [pack({name: column for name, column in b.items() if name != "label"}) for b in batches]
    state, slots = fresh(step), set()
    run = capture_steps(step, state, batches[0], steps_per_replay=4)
    predict = capture_prediction(step, state, requests[0])
    for some in grouped(batches, 4):
        before = bytes_of(state)
        logits = [predict(state, request).clone() for request in requests]
        assert_unchanged(state, before)
        for logit, request in zip(logits, requests, strict=True):
            torch.testing.assert_close(logit, step.predict(state, request))
        slots.add(int(state.tables[0].num_slots))
        state, _ = run(state, some)
    assert_same_state(state, one_by_one(step, batches)[0])
    assert len(slots) > 1
    if is_recorded():
        assert recorder.made == [batches[0].layout, requests[0].layout]


LIVES = {
    "sweeps": Life(expire=unseen_for(3), every=4),
    "evicts": Life(score=least_recently_used, keep=40, every=100, at_cap="evict"),
    "stops": Life(at_cap="stop"),
}


@pytest.mark.parametrize(("life", "most"), [("sweeps", 4), ("evicts", 1), ("stops", 1)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_call_does_not_go_past_a_sweep(recorder, life, most, accumulation):
    """The error comes before anything is changed, and cutting where it says is right."""
    max_rows = 512 if life == "stops" else 64
    step = deepfm_step(life=LIVES[life], accumulation=accumulation, max_rows=max_rows)
    assert step.sweep_every == most
    most *= accumulation
    batches = deepfm_batches(7 * most)
    run = capture_steps(step, fresh(step), batches[0], steps_per_replay=16)
    state, other = fresh(step), fresh(step)
    for number, some in enumerate(grouped(batches, most), start=1):
        with pytest.raises(ValueError, match=rf"batches: got {most + 1}, expected at most {most}\. After those rows"):
            run(state, [*some, some[0]])
        assert_same_state(state, other, exact=True)
        state, _ = run(state, some)
        for batch in some:
            other, _ = step.update_(other, batch)
        state, other = (step.sweep_(s, number * most // accumulation) for s in (state, other))
    assert_same_state(state, other, exact=True)
    if life == "sweeps":
        assert int(state.tables[0].num_free) > 0


def test_a_replay_does_not_go_past_a_sweep_that_had_nothing_to_do(recorder):
    """Which leaves the state as it was, so that only the count of batches says where the next one comes."""
    step = deepfm_step(life=Life(expire=unseen_for(1000), every=6))
    batches = deepfm_batches(24)
    run, state = capture_steps(step, fresh(step), batches[0], steps_per_replay=3), fresh(step)
    for number in (3, 6, 9):
        state, _ = run(state, batches[number - 3 : number])
        state = step.sweep_(state, number)
    state, _ = run(state, batches[9:10])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"batches: got 3, expected at most 2"):
            run(state, batches[10:13])
    state, _ = run(state, batches[10:12])
    state, _ = run(state, batches[12:15])
    assert int(state.dense.step) == 15
    assert_same_state(state, one_by_one(step, batches[:15])[0])


@pytest.mark.parametrize("life", [None, *LIVES])
@pytest.mark.parametrize(("accumulation", "most"), [(1, 4), (3, 2)])
def test_train_ends_in_the_same_bytes_and_acts_at_the_same_steps(tmp_path, recorder, life, accumulation, most):
    """Sweeps, logs, checkpoints and the end of an epoch with an open window come between calls."""
    ids = tuple(range(30)) if life == "stops" else (*range(30), *MORE_IDS[:60])
    batches = deepfm_batches(19, ids=ids)
    config = {"log_steps": 5, "save_steps": 7, "train_epoch": 2, "train_steps": 33}
    results = []
    for name, steps in (("one", 1), ("several", most)):
        step, log, seen = deepfm_step(accumulation=accumulation, life=LIVES.get(life), max_rows=100), Log(), []
        call = capture_steps(step, fresh(step), batches[0], steps_per_replay=steps)

        def run(state: Any, some: Any, call: Any = call, seen: list = seen, steps: int = steps) -> Any:
            seen.append(1 if steps == 1 else len(some))
            return call(state, [some] if steps == 1 else some)

        where = TrainConfig(output_dir=str(tmp_path / name), **config)
        state, progress = train(
            step, run, fresh(step), MemoryReader(batches), where, steps_per_replay=steps, on_event=log
        )
        results.append((state, progress, log, seen, last_bytes(tmp_path / name)))
    (state, progress, log, _, files), (other, other_progress, other_log, seen, other_files) = results
    assert_same_state(state, other, exact=True)
    assert files == other_files
    assert (progress.step, progress.loss, progress.stopped) == (
        other_progress.step, other_progress.loss, other_progress.stopped,
    )  # fmt: skip
    for event in ("log", "before_save", "after_epoch"):
        assert log.steps(event) == other_log.steps(event)
    assert other_log.steps("after_step") == sorted(set(other_log.steps("after_step")))
    assert set(other_log.steps("after_step")) <= set(log.steps("after_step"))
    assert sum(seen) == sum(results[0][3])
    if life is None:
        assert most in seen


def test_ctrl_c_ends_a_window_that_a_call_has_begun(tmp_path, recorder):
    step, batches = deepfm_step(accumulation=3), deepfm_batches(20)
    run = capture_steps(step, fresh(step), batches[0], steps_per_replay=4)
    log = Log(("after_step", 1), interrupt)
    config = TrainConfig(output_dir=str(tmp_path))
    state, progress = train(step, run, fresh(step), MemoryReader(batches), config, steps_per_replay=4, on_event=log)
    assert (progress.stopped, progress.step) == ("interrupted", 2)
    assert int(state.window.num_batches) == 0
    assert_same_state(state, one_by_one(step, batches[:6])[0])


def test_other_layouts_are_what_the_caller_chose(recorder):
    step, batches = deepfm_step(), stream(12)
    mixed = [*batches[:3], wider(batches[3]), *map(wider, batches[4:8]), *batches[8:]]
    state = fresh(step)
    run = capture_steps(step, state, batches[0], steps_per_replay=4, new_layout="raise")
    before = bytes_of(state)
    for some in grouped(mixed, 4)[:2]:
        with pytest.raises(ValueError, match=r"feature 'more': got dense f32\[8, 1\]"):
            run(state, some)
    assert_unchanged(state, before)
    run = capture_steps(step, state, batches[0], steps_per_replay=4, new_layout="uncaptured")
    for some in grouped(mixed, 4):
        state, _ = run(state, some)
    assert_same_state(state, one_by_one(step, batches)[0])
    assert set(recorder.made) <= {batches[0].layout}


def test_errors(recorder):
    step, batches = deepfm_step(), deepfm_batches(5)
    with pytest.raises(ValueError, match="steps_per_replay: got 0, expected at least 1"):
        capture_steps(step, fresh(step), batches[0], steps_per_replay=0)
    state = fresh(step)
    run, before = capture_steps(step, state, batches[0], steps_per_replay=4), bytes_of(state)
    for some in ([], batches):
        with pytest.raises(ValueError, match=rf"batches: got {len(some)}, expected 1 to 4, the steps_per_replay"):
            run(state, some)
    with pytest.raises(TypeError, match=r"batch: got dict, expected recfx\.types\.Batch"):
        run(state, [*batches[:3], dict(batches[3])])
    assert_unchanged(state, before)


def test_compiled_steps_are_the_captured_ones_to_the_byte(monkeypatch):
    monkeypatch.undo()
    step = deepfm_step(forward=lambda params, emb, feats: emb["bias"].sum(1) + params["numeric_bias"].sum())
    batches, states = stream(), [fresh(step), fresh(step)]
    one = capture(step, states[0], batches[0])
    several = capture_steps(step, states[1], batches[0], steps_per_replay=8)
    for some in grouped(batches, 8):
        states[1], auxes = several(states[1], some)
        for batch, aux in itertools.zip_longest(some, auxes):
            states[0], expected = one(states[0], batch)
            assert torch.equal(aux.logit, expected.logit)
    assert_same_state(*states, exact=True)
