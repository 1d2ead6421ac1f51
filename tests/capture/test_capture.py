"""The captured step: equal to the eager one, traced once, and with no temporary as large as a table."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from recfx import kernels
from recfx.capture import capture, capture_evaluation, capture_prediction
from recfx.capture import passes as fx_passes
from recfx.step import Step
from recfx.table import functions as table_module
from recfx.types import COUNTS, Batch, Ragged, pack
from tests.conftest import BATCH_SIZE, deepfm_batches, deepfm_params, deepfm_step, linear_params, linear_step
from tests.reference import on_threads
from tests.step.test_step import assert_same_state

BIG = 2**21  # reserved rows: a table of 126 MB and gradients of 42 MB beside a few KB of activations


class Captured(NamedTuple):
    step: Step
    call: Any
    evaluate: Any
    counted: Counter[str]  # by torch's cache of traced graphs


def fresh(step: Step) -> Any:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


def fresh_linear(step: Step) -> Any:
    return step.init(linear_params())


def leaves(state: Any) -> list[torch.Tensor]:
    """What the state holds: reserved rows that are not in use left out."""
    tables = []
    for s in state.tables:
        n, u = int(s.num_rows), int(s.num_unique)
        parts = (s.slots[: int(s.num_slots)], s.ids[:n], s.vocabularies[:n], s.seen[:n], s.rows[:n], s.unique_rows[:u])
        tables += [t.clone() for t in (*parts, s.grads[:u], s.num_rows, s.num_slots, s.num_refused, s.step)]
    rest = tree_leaves(state._replace(tables=()))
    return tables + [t.clone() for t in rest]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(function: Any, state: Any, batches: list) -> tuple[Any, list[torch.Tensor]]:
    losses = []
    for batch in batches:
        state, aux = function(state, batch)
        losses.append(aux.loss.clone())
    return state, losses


@pytest.fixture(autouse=True)
def _small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth from the first batch on."""
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)


@pytest.fixture(scope="module")
def one() -> Captured:
    step = deepfm_step(max_rows=BIG)
    state, batch = fresh(step), deepfm_batches(1)[0]
    counters.clear()
    call = capture(step, state, batch)
    counted = counters["aot_autograd"].copy()
    return Captured(step, call, capture_evaluation(step, state, batch), counted)


@pytest.fixture(scope="module")
def three() -> Captured:
    step = deepfm_step(max_rows=BIG, accumulation=3)
    state, batch = fresh(step), deepfm_batches(1)[0]
    return Captured(step, capture(step, state, batch), None, Counter())


def stream() -> list:
    """Ids that keep coming, so that the index doubles several times; the last batch is short."""
    first = deepfm_batches(4)
    ids = tuple(range(1000, 1400))
    return first + deepfm_batches(10, seed=1, ids=ids, short_last=True)


@pytest.mark.parametrize("name", ["one", "three"])
def test_captured_is_eager_through_growth_and_a_short_last_batch(name, request):
    captured = request.getfixturevalue(name)
    a, b = fresh(captured.step), fresh(captured.step)
    num_slots = set()
    for batch in stream():
        a, aux_a = captured.call(a, batch)
        b, aux_b = captured.step.update_(b, batch)
        assert_same_state(a, b)
        torch.testing.assert_close(aux_a.loss, aux_b.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(aux_a.logit, aux_b.logit, rtol=1e-5, atol=1e-5)
        num_slots.add(int(a.tables[0].num_slots))
    assert len(num_slots) > 2
    assert int(a.metrics.sums[0]) == 14 * BATCH_SIZE - BATCH_SIZE // 2 - 1
    assert int(a.tables[0].num_rows) > 100


def test_one_trace_and_one_graph_over_many_steps(one):
    run(one.call, fresh(one.step), deepfm_batches(1))
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(one.call, fresh(one.step), stream())
        run(one.call, fresh(one.step), stream())
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_later_steps_run_the_graph_alone_with_what_it_was_given():
    """No line of the step's Python, nor Dynamo; a tensor that the program holds goes in as well as the state's."""
    scale, calls = torch.tensor(0.5), []

    def forward(params, emb, feats):
        if not torch.compiler.is_compiling():
            calls.append(1)
        return scale * (emb["bias"].sum(1) + params["bias"])

    step = linear_step(forward=forward)
    batches = deepfm_batches(4)
    call = capture(step, fresh_linear(step), batches[0])
    a, _ = run(call, fresh_linear(step), batches[:1])
    with torch.compiler.set_stance("force_eager"):  # what Dynamo is asked runs as Python
        a, _ = run(call, a, batches[1:])
    assert not calls
    b, _ = run(step.update_, step.grow_(fresh_linear(step), (1000,)), batches)
    assert_same_state(a, b)


def test_the_next_process_need_not_trace_it(one):
    """Nothing in the graph makes torch's cache of traced graphs pass it by."""
    assert one.counted["total"] == 1
    assert not one.counted["autograd_cache_bypass"]


@pytest.mark.parametrize("change", ["", "# changed"])
def test_a_graph_is_compiled_again_when_the_python_of_an_operator_has_changed(tmp_path, monkeypatch, change):
    """Torch's cache is read before the fakes of operators run."""
    passes = fx_passes.StepPasses(), fx_passes.UnfuseBias()
    before = [each.uuid() for each in passes]
    shutil.copytree(kernels.__path__[0], tmp_path / "kernels")
    with (tmp_path / "kernels" / "rows" / "pool.py").open("a") as file:
        file.write(change)
    monkeypatch.setattr(fx_passes, "KERNELS", tmp_path / "kernels")
    assert all((a != b.uuid()) == bool(change) for a, b in zip(before, passes, strict=True))


def test_what_a_step_says_may_hold_tensors_that_the_graph_does_not_compute():
    constant = torch.tensor(7)
    step = linear_step(features=lambda batch: {**batch, COUNTS: {"held": constant, "valid": batch["num_samples"] + 1}})
    batches = deepfm_batches(3)
    call, state = capture(step, fresh_linear(step), batches[0]), fresh_linear(step)
    for batch in batches:
        state, aux = call(state, batch)
        assert aux.counts["held"].item() == 7
        assert aux.counts["valid"].item() == BATCH_SIZE + 1
    assert_same_state(state, run(step.update_, step.grow_(fresh_linear(step), (1000,)), batches)[0])


def test_one_graph_for_each_layout_size_of_state_and_number_of_threads():
    """A state of another size through the same callable is compiled for, not run by a graph of other shapes; nor does a
    graph made for two threads, which asks for two, run for one."""
    counters.clear()
    steps = [linear_step(max_rows=max_rows) for max_rows in (512, 8)]
    batches = deepfm_batches(3, short_last=True)
    call = capture(steps[0], fresh_linear(steps[0]), batches[0])
    for num_graphs, step in enumerate(steps, start=1):
        a, _ = run(call, fresh_linear(step), batches)
        assert counters["stats"]["unique_graphs"] == num_graphs
        assert_same_state(a, run(step.update_, step.grow_(fresh_linear(step), (1000,)), batches)[0])
    assert int(a.tables[0].num_rows) == 8
    assert int(a.tables[0].num_refused) > 0
    for _ in range(2):
        on_threads(1, run, call, fresh_linear(steps[1]), batches)
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bytes_from_run_to_run(one, threads):
    first = on_threads(threads, run, one.call, fresh(one.step), stream())
    again = on_threads(threads, run, one.call, fresh(one.step), stream())
    assert equal(leaves(first[0]), leaves(again[0]))
    assert equal(first[1], again[1])


def test_one_and_two_threads_agree(one):
    """Ids, rows and counters exactly; values within 1e-5."""
    states = [on_threads(n, run, one.call, fresh(one.step), stream())[0] for n in (1, 2)]
    assert_same_state(*states)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_capturing_changes_no_byte_of_state_batch_and_generators(backend):
    """Neither when it is called nor when a batch of another layout comes later: only the step's own writes show."""
    step = linear_step(forward=lambda params, emb, feats: torch.rand_like(feats["label"]) + emb["bias"].sum(1))
    state, batch = fresh_linear(step), deepfm_batches(1)[0]
    wider = pack({**batch, "more": torch.zeros(BATCH_SIZE, 1)})
    before = [t.clone() for t in (*tree_leaves(state), batch.buffer, torch.get_rng_state())]
    call = capture(step, state, batch, backend=backend)
    after = (*tree_leaves(state), batch.buffer, torch.get_rng_state())
    assert all(map(torch.equal, before, after))
    other = fresh_linear(step)
    torch.manual_seed(0)
    state, _ = call(call(state, batch)[0], wider)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    other, _ = run(step.update_, other, [batch, wider])
    assert torch.equal(drawn, torch.get_rng_state())
    assert_same_state(state, other)


def test_what_was_compiled_is_not_compiled_again_in_the_first_step(one):
    step, batch = deepfm_step(max_rows=BIG), deepfm_batches(1)[0]
    state = fresh(step)
    counters.clear()
    call = capture(step, state, batch)
    assert counters["stats"]["unique_graphs"] == 1
    assert call.take_compile_s() > 0
    call(state, batch)
    assert counters["stats"]["unique_graphs"] == 1
    assert call.take_compile_s() == 0


def test_compiling_is_a_phase_that_can_be_shown():
    step, batch, phases = deepfm_step(), deepfm_batches(1)[0], []
    wider = pack({**batch, "more": torch.zeros(BATCH_SIZE, 1)})

    @contextmanager
    def phase():
        phases.append("begun")
        yield
        phases.append("ended")

    state = fresh(step)
    call = capture(step, state, batch, backend="eager")
    call.while_compiling(phase)
    for b in (batch, wider, wider):
        state, _ = call(state, b)
    assert phases == ["begun", "ended"]


def test_run_op_by_op_it_is_the_same_graph_over_the_same_kernels():
    for accumulation in (1, 3):
        step = deepfm_step(max_rows=BIG, accumulation=accumulation)
        a, b = fresh(step), fresh(step)
        call = capture(step, a, stream()[0], backend="eager")
        counters.clear()
        for batch in stream():
            a, aux_a = call(a, batch)
            b, aux_b = step.update_(b, batch)
            torch.testing.assert_close(aux_a.logit, aux_b.logit, rtol=1e-6, atol=1e-7)
        assert_same_state(a, b)
        assert not counters["stats"]
    with pytest.raises(ValueError, match=r"backend: got 'aot', expected one of \('inductor', 'eager'\)"):
        capture(step, a, stream()[0], backend="aot")


def test_a_loop_over_update__keeps_every_id_as_a_captured_one_does():
    """The index begins with eight slots here."""
    step = deepfm_step(max_rows=4096)
    batches = [deepfm_batches(1, seed=n, ids=tuple(range(100 * n, 100 * n + 100)))[0] for n in range(20)]
    captured, eager, pure = fresh(step), fresh(step), fresh(step)
    captured, _ = run(capture(step, captured, batches[0], backend="eager"), captured, batches)
    eager, _ = run(step.update_, eager, batches)
    pure, _ = run(step.update, pure, batches)
    for state in (captured, eager, pure):
        assert int(state.tables[0].num_refused) == 0
    assert_same_state(captured, eager)
    assert_same_state(captured, pure)


def test_states_and_steps_interleave(one, three):
    """A captured step holds no state of its own."""
    alone = [run(c.call, fresh(c.step), stream())[0] for c in (one, one, three)]
    mixed = [fresh(one.step), fresh(one.step), fresh(three.step)]
    for batch in stream():
        mixed = [c.call(s, batch)[0] for c, s in zip((one, one, three), mixed, strict=True)]
    for a, b in zip(alone, mixed, strict=True):
        assert equal(leaves(a), leaves(b))


def test_the_batch_is_only_read(one):
    batches = stream()
    buffers = [batch.buffer.clone() for batch in batches]
    run(one.call, fresh(one.step), batches)
    assert all(torch.equal(a, batch.buffer) for a, batch in zip(buffers, batches, strict=True))


def test_requests_of_any_size_are_predicted_by_one_graph(one):
    """Without labels, between steps of training."""
    state, _ = run(one.call, fresh(one.step), stream()[:3])
    batches = deepfm_batches(3, seed=2)
    requests = [pack({name: column for name, column in b.items() if name != "label"}) for b in batches]
    predict = capture_prediction(one.step, state, requests[0])
    predict(state, requests[0])
    counters.clear()
    for batch, size in zip(batches, (1, BATCH_SIZE // 2, BATCH_SIZE), strict=True):
        state, _ = one.call(state, stream()[4])
        before = leaves(state)
        logit = predict(state, pack(first_samples(batch, size), layout=requests[0].layout))
        assert equal(before, leaves(state))
        expected = one.step.evaluate_(state, batch)[1].logit
        torch.testing.assert_close(logit[:size], expected[:size], rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 0


def first_samples(batch: Batch, size: int) -> dict[str, Any]:
    """A request: its label left out, its tensors no larger than they must be."""
    columns: dict[str, Any] = {}
    for name in batch.keys() - {"label", "num_samples"}:
        column = batch[name]
        if isinstance(column, Ragged):
            offsets = column.offsets[: size + 1]
            columns[name] = Ragged(column.values[: int(offsets[-1])], offsets)
        else:
            columns[name] = column[:size]
    return columns


def test_captured_evaluation_is_eager_and_changes_metrics_alone(one):
    state, _ = run(one.call, fresh(one.step), stream()[:3])
    before = leaves(state._replace(metrics=()))
    other = state._replace(metrics=type(state.metrics)(*(t.clone() for t in state.metrics)))
    for batch in deepfm_batches(3, seed=9, ids=tuple(range(20, 60)), short_last=True):
        state, aux_a = one.evaluate(state, batch)
        other, aux_b = one.step.evaluate_(other, batch)
        torch.testing.assert_close(aux_a.logit, aux_b.logit, rtol=1e-5, atol=1e-5)
    assert equal(before, leaves(state._replace(metrics=())))
    torch.testing.assert_close(state.metrics.sums, other.metrics.sums, rtol=1e-5, atol=1e-6)
    assert state.metrics.histogram.sum() == other.metrics.histogram.sum()


def largest_allocation(function: Any) -> int:
    """Bytes of the largest tensor memory that `function` takes at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("name", ["one", "three"])
def test_no_temporary_as_large_as_a_table(name, request):
    captured = request.getfixturevalue(name)
    state, batches = fresh(captured.step), stream()
    assert state.tables[0].rows.nbytes > 2**26
    state, _ = run(captured.call, state, batches[:4])
    assert largest_allocation(lambda: run(captured.call, state, batches[:4])) < 2**20
    smallest = min(t.nbytes for t in tree_leaves(state.tables[0]) if t.dim() and len(t) >= BIG)
    assert smallest > 2**22
    assert largest_allocation(lambda: state.tables[0].unique_rows.clone()) >= smallest  # the measure sees one


def test_evaluation_has_no_temporary_as_large_as_a_table(one):
    state, _ = run(one.call, fresh(one.step), stream()[:2])
    run(one.evaluate, state, stream()[:1])
    assert largest_allocation(lambda: run(one.evaluate, state, stream()[:3])) < 2**20


def test_a_batch_that_is_not_packed_is_an_error(one):
    with pytest.raises(TypeError, match=r"batch: got dict, expected recfx.types.Batch"):
        one.call(fresh(one.step), dict(deepfm_batches(1)[0]))


def test_what_cannot_be_captured_is_an_error():
    def forward(params, emb, feats):
        logit = emb["bias"].sum(1)
        return logit if logit.sum() > 0 else -logit

    step = deepfm_step(forward=forward)
    state, batch = fresh(step), deepfm_batches(1)[0]
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"[Dd]ata-dependent"):
        capture(step, state, batch)(state, batch)


WITHOUT_COMPILER = """
import warnings
from recfx.capture import capture
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
step, batches = deepfm_step(), deepfm_batches(2)
state = step.init(deepfm_params())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    call = capture(step, state, batches[0])
    for batch in batches:
        state, aux = call(state, batch)
words = " ".join(str(w.message) for w in said)
assert "running the step uncompiled" in words and "slow reference kernels" in words, words
print(state.tables[0].ids[: int(state.tables[0].num_rows)].tolist())
print(float(aux.loss))
"""


def test_without_a_compiler_the_step_runs_uncompiled_on_the_definitions(tmp_path):
    """In a process that finds no compiler and no kernels built before."""
    environment = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids, loss = done.stdout.splitlines()
    step, batches = deepfm_step(), deepfm_batches(2)
    state = fresh(step)
    for batch in batches:
        state, aux = step.update_(state, batch)
    assert ids == str(state.tables[0].ids[: int(state.tables[0].num_rows)].tolist())
    assert float(loss) == pytest.approx(float(aux.loss), rel=1e-5)
