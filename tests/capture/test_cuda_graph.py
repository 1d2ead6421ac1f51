"""The bookkeeping of recorded steps, on a CPU: a stand-in records what a CUDA graph would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx import rows
from recfx.capture import captured as capture_module
from recfx.capture import recorded as cuda_graph
from recfx.capture import sections_function
from recfx.capture.recorded import Feed, Replays, record, untouched
from recfx.optim import clip_global_norm
from recfx.step import Step
from recfx.table import functions as table_module
from recfx.table.policies import Life, at_least
from recfx.types import Batch, pack
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
from tests.step.test_step import assert_same_state


class Recorder:
    """Like a CUDA graph: bound to the state it was made with, over static buffers, writing over their aux."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.nums: list[int] = []  # steps of each
        self.fails = False

    def __call__(self, function: Any, state: Any, layout: Any, num: int) -> Any:
        static = [Batch(torch.zeros(layout.num_bytes, dtype=torch.uint8), layout) for _ in range(num)]
        with torch.no_grad(), untouched(state):
            kept = [function(state, batch.sections) for batch in static]
        if self.fails:
            raise RuntimeError("out of memory")
        self.made.append(layout)
        self.nums.append(num)

        def replay(buffers: list[torch.Tensor]) -> Any:
            for batch, buffer in zip(static, buffers, strict=True):
                batch.buffer.copy_(buffer)
            with torch.no_grad():
                aux = [function(state, batch.sections) for batch in static]
            for target, source in zip(tree_leaves(kept), tree_leaves(aux), strict=True):
                target.copy_(source)
            return kept

        return replay


class Run:
    """A step replayed through the stand-in; counts the reads of how full the tables are."""

    def __init__(self, step: Step) -> None:
        self.step, self.recorder, self.grown = step, Recorder(), []
        self.replay = Replays(self.grow_, lambda state: sys.maxsize, self.recorder)

    def grow_(self, state: Any, ids: Any) -> Any:
        self.grown.append(list(ids))
        return self.step.grow_(state, ids)

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        function = sections_function(self.step.in_graph_, batch.layout)
        state, (aux,) = self.replay.run(state, [batch], function, self.step.ids_in(batch))
        return state, aux


def fresh(step: Step) -> Any:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


def eager(step: Step, state: Any, batches: list[Batch]) -> Any:
    for batch in batches:
        state, _ = step.update_(state, batch)
    return state


def layouts(num: int) -> list[Batch]:
    """One batch repeated, each time with a further column, so with another layout."""
    batch = deepfm_batches(1)[0]
    return [pack({**batch, **{f"more{i}": torch.zeros(8, 1) for i in range(n)}}) for n in range(num)]


@pytest.fixture(autouse=True)
def _small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)


@pytest.fixture
def run() -> Run:
    return Run(deepfm_step())


def all_bytes(state: Any) -> list[torch.Tensor]:
    return [t.detach().clone().contiguous().view(torch.uint8) for t in tree_leaves(state) if t.dim()] + [
        t.clone() for t in tree_leaves(state) if not t.dim()
    ]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, clip_global_norm(0.1)])
@pytest.mark.parametrize("life", [None, Life(admit=at_least(2), candidates=64)], ids=["", "life"])
@pytest.mark.parametrize("batches", [0, 4])
def test_the_empty_batch_leaves_every_byte_as_it_is(accumulation, clip, life, batches):
    """Of a new state, of a trained one, and in the middle of an accumulation window that it would complete."""
    step = deepfm_step(accumulation=accumulation, clip=clip, life=life)
    for num in range(batches, batches + accumulation):
        state = eager(step, fresh(step), deepfm_batches(num))
        layout = deepfm_batches(1)[0].layout
        empty = Batch(torch.zeros(layout.num_bytes, dtype=torch.uint8), layout)
        before = all_bytes(state)
        for function in (step.in_graph_, step.evaluate_):
            with untouched(state), torch.no_grad():
                function(state, empty)
        after = all_bytes(state)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_empty_batch_alone_would_leave_a_trace():
    """What `untouched` is for."""
    step = deepfm_step()
    state = eager(step, fresh(step), deepfm_batches(2))
    batch = deepfm_batches(1)[0]
    before = all_bytes(state)
    step.update_(state, Batch(torch.zeros_like(batch.buffer), batch.layout))
    assert not all(torch.equal(a, b) for a, b in zip(before, all_bytes(state), strict=True))


def test_a_state_is_put_back_when_recording_fails(run):
    state, batches = fresh(run.step), deepfm_batches(6)
    for batch in batches[:2]:
        state, _ = run(state, batch)
    run.recorder.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run(state, layouts(2)[1])
    for batch in batches[2:]:
        state, _ = run(state, batch)
    assert_same_state(state, eager(run.step, fresh(run.step), batches))


def test_replays_are_the_eager_steps_through_growth(run):
    batches = deepfm_batches(4) + deepfm_batches(10, seed=1, ids=tuple(range(1000, 1400)), short_last=True)
    state, slots = fresh(run.step), set()
    for batch in batches:
        state, aux = run(state, batch)
        slots.add(int(state.tables[0].num_slots))
    assert len(run.recorder.made) == 1
    assert int(aux.num_samples) == int(batches[-1]["num_samples"])
    assert_same_state(state, eager(run.step, fresh(run.step), batches))


def test_aux_is_valid_until_the_next_call(run):
    first, second = deepfm_batches(2)
    state, aux = run(fresh(run.step), first)
    kept = aux.loss.clone()
    _, again = run(state, second)
    assert again.loss is aux.loss
    assert not torch.equal(kept, aux.loss)


def test_a_layout_is_recorded_once_and_the_one_that_waited_longest_is_dropped(run, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    state, (a, b, c) = fresh(run.step), layouts(3)
    for batch in (a, b, a, b, a, c, a):  # c drops b
        state, _ = run(state, batch)
    assert run.recorder.made == [a.layout, b.layout, c.layout]
    run(state, c)
    assert len(run.recorder.made) == 3
    run(state, b)
    assert run.recorder.made[3:] == [b.layout]


def test_another_state_is_recorded_anew(run):
    """A recording writes where its state lay: neither a second state nor one with a tensor replaced may use it."""
    batches = deepfm_batches(6)
    one, two = fresh(run.step), fresh(run.step)
    for batch in batches:
        one, _ = run(one, batch)
        two, _ = run(two, batch)
    assert len(run.recorder.made) == 2
    expected = eager(run.step, fresh(run.step), batches)
    assert_same_state(one, expected)
    assert_same_state(two, expected)
    moved = one._replace(params={name: p.clone() for name, p in one.params.items()})
    run(moved, batches[0])
    assert len(run.recorder.made) == 3
    assert not torch.equal(moved.params["numeric_bias"], one.params["numeric_bias"])


def test_how_full_a_table_is_is_read_once_in_many_steps(run, monkeypatch):
    monkeypatch.setattr(cuda_graph, "STEPS_AHEAD", 4)
    state, batches = fresh(run.step), deepfm_batches(12)
    for batch in batches:
        state, _ = run(state, batch)
    assert run.grown == [[4 * n for n in run.step.ids_in(batches[0])]] * 3


def test_a_table_that_others_write_to_is_read_again(run):
    """Two captures of one state, and eager steps between: room is never counted twice, so no id is refused."""
    step = deepfm_step(max_rows=4096)
    one, two = Run(step), Run(step)
    batches = [deepfm_batches(1, seed=n, ids=tuple(range(24 * n, 24 * n + 24)))[0] for n in range(90)]
    state = fresh(step)
    for n, batch in enumerate(batches):
        if n % 5 == 4:
            state = eager(step, state, [batch])
        else:
            state, _ = (one, two)[n % 2](state, batch)
    assert int(state.tables[0].num_refused) == 0
    assert len(one.grown) > 20
    assert_same_state(state, eager(step, fresh(step), batches))


def test_rows_written_by_hand_are_counted(run):
    batch = deepfm_batches(1)[0]
    state, _ = run(fresh(run.step), batch)
    state, _ = run(state, batch)
    assert len(run.grown) == 1
    state = rows.write_(run.step, state, "bias/a", torch.tensor([900, 901]), torch.zeros(2, 1))
    run(state, batch)
    assert len(run.grown) == 2


def fake_cuda(log: list) -> Any:
    """Streams and events that write down what is asked of them."""

    class Event:
        def __init__(self) -> None:
            self.name = f"event{next(names)}"

        def record(self, stream: Any) -> None:
            log.append(("record", stream.name, self.name))

        def synchronize(self) -> None:
            log.append(("synchronize", self.name))

    class Stream:
        def __init__(self, device: Any = None, name: str = "copies") -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            log.append(("wait", self.name, event.name))

        def wait_stream(self, stream: Stream) -> None:
            log.append(("wait", self.name, stream.name))

    names, main = iter(range(9)), Stream(name="main")
    return SimpleNamespace(
        Stream=Stream, Event=Event, stream=lambda _: nullcontext(), current_stream=lambda _: main,
    )  # fmt: skip


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_recording_that_fails_ends_its_use_of_the_stream_and_is_waited_for(run, monkeypatch, fails_at):
    """In both runs on the empty batch and in the recording itself, which CUDA may then refuse to end."""
    log: list[tuple] = []
    cuda, current, calls = fake_cuda(log), ["main"], []

    @contextmanager
    def stream(one: Any) -> Iterator[None]:
        before = current[:]
        current.append(one.name)
        try:
            yield
        finally:
            current[:] = before

    @contextmanager
    def graph(_: Any, *, stream: Any, **__: Any) -> Iterator[None]:
        current.append(stream.name)
        yield  # torch's stays on its stream where the recording cannot be ended
        current.pop()

    def function(state: Any, sections: list) -> None:
        assert current[-1] == "copies"
        calls.append(step(state, sections))
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")

    for name, value in (vars(cuda) | {"stream": stream, "graph": graph, "CUDAGraph": object}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    state, layout = eager(run.step, fresh(run.step), deepfm_batches(2)), deepfm_batches(1)[0].layout
    step, before = sections_function(run.step.in_graph_, layout), all_bytes(state)
    with pytest.raises(RuntimeError, match="out of memory"):
        record(function, state, layout, 1, pool=None, stream=cuda.Stream())
    assert current == ["main"]
    assert log == [("wait", "copies", "main"), ("wait", "main", "copies")]
    if fails_at < 3:  # the stand-in computes what a recording would not
        assert all(torch.equal(a, b) for a, b in zip(before, all_bytes(state), strict=True))


def test_recordings_that_share_a_pool_share_a_stream(monkeypatch):
    """Memory of a pool serves the stream alone that it was taken on."""
    used = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(capture_module, "record", lambda *_, pool, stream: used.append((pool, stream)))
    states = [SimpleNamespace(step=torch.zeros((), device=on)) for on in ("cpu", "meta", "cpu")]
    record_ = capture_module._recorder("fp32")
    for state in states:
        record_(None, state, None, 1)
    one, other, again = used
    assert one == again
    assert one[0] is other[0]
    assert [stream.device.type for _, stream in (one, other)] == ["cpu", "meta"]


def byte(n: int) -> torch.Tensor:
    return torch.full((4,), n, dtype=torch.uint8)


def test_batches_take_two_stages_in_turns_and_every_read_waits_for_its_copy():
    log: list[tuple] = []
    static = torch.zeros(3, 4, dtype=torch.uint8)
    feed = Feed(static, fake_cuda(log))
    for n in range(4):
        log.clear()
        feed.bring([byte(3 * n + k) for k in range(3)])
        assert static.tolist() == [[3 * n + k] * 4 for k in range(3)]
        arrived, taken = (f"event{2 * (n % 2) + i}" for i in range(2))
        made = [("wait", "copies", "main")] * (n == 0)  # its memory may still be in use
        assert log == [
            *made,
            ("synchronize", arrived),
            ("wait", "copies", taken),
            ("record", "copies", arrived),
            ("wait", "main", arrived),
            ("record", "main", taken),
        ]
    stages = {stage.staged.data_ptr() for stage in feed.stages}
    assert len(stages) == 2
    assert [int(stage.staged[2, 0]) for stage in feed.stages] == [8, 11]


class Elsewhere:
    """A buffer on the CPU that says it is pinned, or on a CUDA device."""

    def __init__(self, buffer: torch.Tensor, where: str) -> None:
        self.buffer, self.is_cuda, self.is_pinned = buffer, where == "cuda", lambda: where == "pinned"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(a.buffer if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def test_only_pageable_batches_are_copied_into_pinned_memory_and_only_the_host_s_take_a_stage():
    log: list[tuple] = []
    feed = Feed(torch.zeros(2, 4, dtype=torch.uint8), fake_cuda(log))

    def bring(*kinds: str) -> list[int]:
        buffers = [byte(10 * k + len(log) % 7) for k in range(2)]
        feed.bring([b if k == "pageable" else Elsewhere(b, k) for k, b in zip(kinds, buffers, strict=True)])
        assert feed.static.tolist() == [b.tolist() for b in buffers]
        return [stage for stage in vars(feed).get("stages", []) if "pinned" in vars(stage)]

    bring("cuda", "cuda")
    assert "stages" not in vars(feed)
    assert not log
    for kinds in (("pinned", "pinned"), ("cuda", "pinned"), ("pinned", "cuda")):
        assert bring(*kinds) == []
    assert not any(entry[0] == "synchronize" for entry in log)
    assert len(bring("cuda", "pageable")) == 1
    assert len(bring("pageable", "pinned")) == 2
