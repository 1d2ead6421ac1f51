"""The captured step on a GPU: equal to the eager and the compiled one, in place, without a read by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from recfx.capture import capture, capture_evaluation, capture_prediction, capture_steps, sections_function
from recfx.capture import captured as capture_module
from recfx.capture import compiled as compiled_module
from recfx.capture import recorded as cuda_graph
from recfx.step import Step
from recfx.table import functions as table_module
from recfx.types import Batch, pack
from tests.conftest import deepfm_batches, deepfm_groups, deepfm_params, deepfm_step
from tests.step.test_step import assert_same_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _small_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Growth from the first batch on; one recording of graphs after another."""
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(device: str = "cuda", **kwargs: Any) -> Step:
    return deepfm_step(embeddings=deepfm_groups(device=device), **{"max_rows": 4096} | kwargs)


def fresh(step: Step, device: str = "cuda") -> Any:
    return step.init({name: p.clone().to(device) for name, p in deepfm_params().items()})


def on(device: str, batch: Batch) -> Batch:
    return Batch(batch.buffer.to(device), batch.layout)


def host(tree: Any) -> Any:
    return tree_map(lambda t: t.cpu(), tree)


def eager(step: Step, state: Any, batches: list[Batch], device: str = "cuda") -> Any:
    for batch in batches:
        state, _ = step.update_(state, on(device, batch))
    return state


def compiled(step: Step, state: Any, batches: list[Batch]) -> Any:
    inputs = state, on("cuda", batches[0]).sections
    with torch.no_grad():
        function = compiled_module.compiled(sections_function(step.in_graph_, batches[0].layout), *inputs)
        for batch in batches:
            function(step.grow_(state, step.ids_in(batch)), on("cuda", batch).sections)
    return state


def captured(step: Step, state: Any, batches: list[Batch]) -> Any:
    call = capture(step, state, batches[0])
    for batch in batches:
        state, _ = call(state, batch)
    return state


def stream() -> list[Batch]:
    """Ids that keep coming, so that the index doubles several times; the last batch is short."""
    return deepfm_batches(4) + deepfm_batches(90, seed=1, ids=tuple(range(1000, 2500)), short_last=True)


def same_bytes(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_cpu_and_gpu_eager_compiled_and_captured_agree(accumulation):
    """Keys, rows and counters exactly, values within 1e-5."""
    cpu = make("cpu", accumulation=accumulation)
    expected = eager(cpu, fresh(cpu, "cpu"), stream(), "cpu")
    for run in (eager, compiled, captured):
        step = make(accumulation=accumulation)
        assert_same_state(host(run(step, fresh(step), stream())), expected)


def test_same_bytes_from_run_to_run():
    step = make()
    states = [captured(step, fresh(step), stream()) for _ in range(3)]
    for other in states[1:]:
        assert_same_state(host(states[0]), host(other), exact=True)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_recording_leaves_every_byte_of_the_state(accumulation):
    """In the middle of an accumulation window too."""
    step = make(accumulation=accumulation)
    state = eager(step, fresh(step), deepfm_batches(4))
    before = host(state)
    batch = deepfm_batches(1)[0]
    for update_ in (step.update_, step.evaluate_):
        function = sections_function(update_, batch.layout)
        capture_module._recorder("fp32")(function, state, batch.layout, 1)
    torch.cuda.synchronize()
    assert same_bytes(before, host(state))


def test_capturing_twice_and_an_eager_step_between_on_one_state():
    step, batches = make(), stream()
    state = fresh(step)
    calls = [capture(step, state, batches[0]) for _ in range(2)]
    for n, batch in enumerate(batches):
        state = eager(step, state, [batch]) if n % 7 == 6 else calls[n % 2](state, batch)[0]
    assert int(state.tables[0].num_refused) == 0
    assert_same_state(host(state), host(eager(step, fresh(step), batches)))


def test_two_captured_steps_and_two_states_interleaved():
    one, three, batches = make(), make(accumulation=3), stream()
    calls = [capture(step, fresh(step), batches[0]) for step in (one, three)]
    states = [fresh(one), fresh(three), fresh(one)]
    for batch in batches:
        states = [call(s, batch)[0] for call, s in zip((*calls, calls[0]), states, strict=True)]
    for step, state in zip((one, three, one), states, strict=True):
        assert_same_state(host(state), host(eager(step, fresh(step), batches)))


def test_growth_keeps_every_address_and_needs_one_recording(monkeypatch):
    made, record = [], capture_module.record
    monkeypatch.setattr(capture_module, "record", lambda *a, **k: made.append(a) or record(*a, **k))
    step, slots = make(), set()
    state = fresh(step)
    call = capture(step, state, stream()[0])
    addresses = [t.data_ptr() for t in tree_leaves(state)]
    for batch in stream():
        state, _ = call(state, batch)
        slots.add(int(state.tables[0].num_slots))
        assert [t.data_ptr() for t in tree_leaves(state)] == addresses
    assert len(slots) > 1
    assert len(made) == 1


@pytest.mark.parametrize("where", ["pageable", "pinned", "cuda"])
def test_replay_never_waits_for_the_device(where):
    step = make()
    state, batches = fresh(step), deepfm_batches(40)
    if where != "pageable":
        batches = [Batch(b.buffer.pin_memory() if where == "pinned" else b.buffer.cuda(), b.layout) for b in batches]
    call = capture(step, state, batches[0])
    state, _ = call(state, batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches[1:]:
        state, _ = call(state, batch)
    torch.cuda.set_sync_debug_mode("default")
    assert_same_state(host(state), host(eager(step, fresh(step), deepfm_batches(40))))


def test_the_sync_debug_mode_sees_a_wait():
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device="cuda").item()


def test_batches_from_the_host_are_not_mixed_up():
    """Far more of them in flight than there are stages, each written over as soon as the call returns."""
    step = make()
    state, batches = fresh(step), stream()
    call = capture(step, state, batches[0])
    reused = Batch(torch.empty_like(batches[0].buffer), batches[0].layout)
    for batch in batches:
        reused.buffer.copy_(batch.buffer)
        state, _ = call(state, reused)
    assert_same_state(host(state), host(eager(step, fresh(step), batches)))


def test_an_exception_leaves_a_state_that_trains_on(monkeypatch):
    step, batches = make(), stream()
    state = fresh(step)
    call = capture(step, state, batches[0])
    for batch in batches[:5]:
        state, _ = call(state, batch)
    with pytest.raises(TypeError, match="batch: got dict"):
        call(state, dict(batches[5]))
    wider = pack({**batches[5], "more": torch.zeros(8, 1)})

    def fails(function: Any, state: Any, sections: list) -> Any:
        function(state, sections)
        raise RuntimeError("in the middle of recording")

    record = capture_module.record

    def broken(function: Any, *args: Any, **kwargs: Any) -> Any:
        return record(lambda s, sections: fails(function, s, sections), *args, **kwargs)

    monkeypatch.setattr("recfx.capture.captured.record", broken)
    other = capture(step, state, wider)
    with pytest.raises(RuntimeError, match="in the middle of recording"):
        other(state, wider)
    monkeypatch.undo()
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)
    for batch in batches[5:]:
        state, _ = call(state, batch)
    assert_same_state(host(state), host(eager(step, fresh(step), batches)))


def test_more_layouts_than_are_kept(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    step = make()
    plain = deepfm_batches(4)
    batches = [pack({**b, **{f"more{i}": torch.zeros(8, 1) for i in range(n)}}) for n, b in enumerate(plain)]
    state = fresh(step)
    call = capture(step, state, batches[0])
    for batch in (*batches, *batches):
        state, _ = call(state, batch)
    assert_same_state(host(state), host(eager(step, fresh(step), plain + plain)))


def test_aux_is_of_the_last_call_and_evaluation_changes_metrics_alone():
    step, batches = make(), deepfm_batches(3)
    state = fresh(step)
    call, evaluate = capture(step, state, batches[0]), capture_evaluation(step, state, batches[0])
    losses = []
    for batch in batches:
        state, aux = call(state, batch)
        losses.append(aux.loss.clone())
    assert aux.loss.item() == losses[-1].item() != losses[0].item()
    before = host(state._replace(metrics=()))
    state, aux = evaluate(state, batches[0])
    _, expected = step.evaluate_(state, on("cuda", batches[0]))
    torch.testing.assert_close(aux.logit, expected.logit, rtol=1e-5, atol=1e-5)
    assert same_bytes(before, host(state._replace(metrics=())))


def test_predictions_between_training_steps_are_evaluation_s_and_change_nothing():
    """Of one state, from the host and the device, without a label too; the index grows and its addresses stay."""
    step, batches = make(), stream()
    state = fresh(step)
    call, predict = capture(step, state, batches[0]), capture_prediction(step, state, batches[0])
    for n, batch in enumerate(batches):
        if n % 9 == 0:
            before, place = host(state), "cuda" if n % 2 else "cpu"
            logit = predict(state, on(place, batch)).clone()
            assert same_bytes(before, host(state))
            expected = step.predict(state, on("cuda", batch))
            torch.testing.assert_close(logit, expected, rtol=1e-5, atol=1e-5)
        state, _ = call(state, batch)
    assert_same_state(host(state), host(eager(step, fresh(step), batches)))
    request = pack({name: column for name, column in batches[0].items() if name != "label"})
    logit = capture_prediction(step, state, request)(state, request)
    torch.testing.assert_close(logit, step.predict(state, on("cuda", request)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["pageable", "pinned", "cuda"])
@pytest.mark.parametrize(("accumulation", "most"), [(1, 4), (3, 16)])
def test_several_steps_per_replay_are_steps_one_after_another(where, accumulation, most):
    """From the second call on, without a wait for the device; the last call is short and replays single steps."""
    step, plain = make(accumulation=accumulation), stream()
    state, batches = fresh(step), plain
    if where != "pageable":
        batches = [Batch(b.buffer.pin_memory() if where == "pinned" else b.buffer.cuda(), b.layout) for b in plain]
    run, losses = capture_steps(step, state, batches[0], steps_per_replay=most), []
    for first in range(0, len(batches), most):
        torch.cuda.set_sync_debug_mode("error" if first == most else "default")
        state, auxes = run(state, batches[first : first + most])
        losses += [aux.loss.clone() for aux in auxes]
    expected, wanted = fresh(step), []
    for batch in plain:
        expected, aux = step.update_(step.grow_(expected, step.ids_in(batch)), on("cuda", batch))
        wanted.append(aux.loss)
    assert_same_state(host(state), host(expected))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)


def test_several_steps_per_replay_from_host_and_device_at_once():
    step, plain = make(), stream()[:16]
    state, mixed = fresh(step), list(plain)
    mixed[::3] = [on("cuda", b) for b in plain[::3]]
    mixed[1::3] = [Batch(b.buffer.pin_memory(), b.layout) for b in plain[1::3]]
    run = capture_steps(step, state, plain[0], steps_per_replay=4)
    for first in range(0, 16, 4):
        state, _ = run(state, mixed[first : first + 4])
    assert_same_state(host(state), host(eager(step, fresh(step), plain)))
