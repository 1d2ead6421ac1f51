"""Steps recorded as CUDA graphs, one per batch layout, and fed while the one before runs. Part of `recfx.capture`."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves

from recfx.types import Batch, Layout

__all__ = ["Feed", "Replays", "check_sweep", "record", "untouched"]

Function = Callable[[Any, list[Tensor]], Any]  # (state, sections of a batch) -> aux, writes into the state
Replay = Callable[[Sequence[Tensor]], list[Any]]  # (buffers of the batches) -> aux of each

MOST_GRAPHS = 8
STEPS_AHEAD = 64
WARM_UPS = 2


class Replays:
    """Steps on a GPU as replays of what `record` makes of them.

    A recording belongs to a layout, a number of batches and the places of a state's tensors: any other is recorded
    when it comes, and of more than MOST_GRAPHS the one that waited longest is dropped. Growth moves no tensor, and a
    recorded kernel reads how much of an index is in use from the device, so a table that grows needs no new recording.

    Reading how full a table is would stop the host at every step. So room is made for STEPS_AHEAD steps at once, and
    the table is read again when so many ids may have come, or when anything else has written to the state.

    Args:     grow_: (state, ids per table) -> state.
              to_sweep: (state) -> batches until rows are swept, read from the device as rarely.
              record: (function, state, layout, number of batches) -> replay.
    """

    def __init__(
        self,
        grow_: Callable[[Any, Sequence[int]], Any],
        to_sweep: Callable[[Any], int],
        record: Callable[[Function, Any, Layout, int], Replay],
    ) -> None:
        self._grow_, self._to_sweep, self._record = grow_, to_sweep, record
        self._graphs: OrderedDict[tuple, Replay] = OrderedDict()
        self._known: tuple = ()
        self._left: list[int] = []  # batches until a sweep, and room for ids per table

    def prepare(self, state: Any, layout: Layout, num: int, function: Function) -> Replay:
        """The recording of `num` batches of that layout, made if it is not there. The state comes out as it was."""
        key = _places(state), layout, num
        if key not in self._graphs:
            self._graphs[key] = self._record(function, state, layout, num)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def run(
        self, state: Any, batches: Sequence[Batch], function: Function, ids: Sequence[int]
    ) -> tuple[Any, list[Any]]:
        """(state, aux of each batch). Batches are of one layout, `function` and the most ids per table of one batch.

        Raises:   ValueError when a sweep would come in the middle of the batches.
        """
        num, places = len(batches), _places(state)
        needed = [num, *(num * n for n in ids)]
        has_room = self._known == (places, _versions(state)) and all(
            l >= n for l, n in zip(self._left, needed, strict=True)
        )
        self._known = ()  # until the steps have ended
        if not has_room:
            ahead, until_sweep = max(STEPS_AHEAD, num), self._to_sweep(state)
            check_sweep(num, until_sweep)
            self._left = [until_sweep, *(ahead * n for n in ids)]
            state = self._grow_(state, self._left[1:])
        self._left = [l - n for l, n in zip(self._left, needed, strict=True)]
        aux = self.prepare(state, batches[0].layout, num, function)([batch.buffer for batch in batches])
        increment_version(state.step)  # a replay is a write that autograd does not see
        self._known = places, _versions(state)
        return state, [*aux]  # a list of the caller's own: that one is the recording's


def check_sweep(num: int, most: int) -> None:
    """Raises where a sweep would come in the middle of `num` batches."""
    if num > most:
        raise ValueError(
            f"batches: got {num}, expected at most {most}. After those rows are swept, which must not wait for the "
            "others. Cut there and call step.sweep_, as recfx.train.train does."
        )


def _places(state: Any) -> tuple:
    """Where a state's tensors lie and what shape they have: what a recording is true for."""
    return tuple((t.data_ptr(), t.shape, t.dtype) for t in _tensors(state))


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The leaves of tuples and dicts of tensors: `tree_leaves` in a sixth of its time, as this runs at every step."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _versions(state: Any) -> tuple[int, ...]:
    """Rise whenever a step, a replay, a checkpoint or `recfx.rows` writes to the state. On the host."""
    return tuple(t._version for t in (state.step, *(s.counters for s in state.tables)))


@contextmanager
def untouched(state: Any) -> Iterator[None]:
    """Runs of `update_` or `evaluate_` on an empty batch leave no trace in the state.

    An empty batch reaches no row: it has no ids, and the step is not due. What else it writes (counters,
    dense parameters, metrics) is put back. Nothing as large as a table is copied.
    """
    written = [*(s.counters for s in state.tables), *tree_leaves(state._replace(tables=()))]
    kept = [t.clone() for t in written]
    state.window.num_batches.fill_(-1)  # one more batch is still fewer than any accumulation
    try:
        yield
    finally:
        for t, value in zip(written, kept, strict=True):
            t.copy_(value)


def record(function: Function, state: Any, layout: Layout, num: int, *, pool: Any, stream: Any) -> Replay:
    """`num` calls of `function`, one after another, as one CUDA graph over as many static buffers.

    Compiles and warms up on the empty batch: zeros.
    Args:     pool: memory of the temporaries and of aux, shared by recordings of which one runs at a time.
              stream: on the state's device, to record on. The allocator gives memory of a pool back to the stream that
              it was taken on alone: recordings that share the pool share this too.
    """
    device = state.step.device
    static = torch.zeros(num, layout.num_bytes, dtype=torch.uint8, device=device)
    batches = [Batch(buffer, layout) for buffer in static]
    current, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    # The outer context ends the use of the stream where that of a recording which failed does not.
    with torch.no_grad(), torch.cuda.stream(stream):
        stream.wait_stream(current)
        try:
            with untouched(state):
                for _ in range(WARM_UPS):
                    function(state, batches[0].sections)
        finally:
            current.wait_stream(stream)
        # Thread-local: reader threads may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            aux = [function(state, batch.sections) for batch in batches]
    feed = Feed(static)

    def replay(buffers: Sequence[Tensor]) -> list[Any]:
        feed.bring(buffers)
        graph.replay()
        return aux

    return replay


class _Stage:
    """Batches on their way.

    Args:     arrived, taken: events: `staged` holds the batches; it has been read.
    """

    def __init__(self, static: Tensor, cuda: Any) -> None:
        self.staged, self.arrived, self.taken = torch.empty_like(static), cuda.Event(), cuda.Event()

    @functools.cached_property
    def pinned(self) -> Tensor:
        """For batches that are not in pinned memory themselves."""
        return torch.empty(self.staged.shape, dtype=torch.uint8, pin_memory=self.staged.is_cuda)


class Feed:
    """Brings batches into static buffers on the device, those from the host through two stages in turns.

    While the steps read the static buffers, the next batches are copied to a stage on a separate stream. From the
    stage to the static buffers it is one copy within the device, in order with the steps. What only batches from the
    host or from pageable memory need is made when the first one comes.

    Args:     static: u8 [batches, bytes].  cuda: torch.cuda, or its replacement in a test.
    """

    def __init__(self, static: Tensor, cuda: Any = torch.cuda) -> None:
        self.static, self.cuda = static, cuda
        self.stream = cuda.Stream(static.device)

    @functools.cached_property
    def stages(self) -> list[_Stage]:
        stages = [_Stage(self.static, self.cuda) for _ in range(2)]
        self.stream.wait_stream(self.cuda.current_stream(self.static.device))  # which may still use their memory
        return stages

    def bring(self, buffers: Sequence[Tensor]) -> None:
        """Queues the copies. A buffer in pinned memory is read later, by the device: leave it as it is."""
        if not all(buffer.is_cuda for buffer in buffers):
            self._bring_from_host({k: buffer for k, buffer in enumerate(buffers) if not buffer.is_cuda})
        for k, buffer in enumerate(buffers):
            if buffer.is_cuda:
                self.static[k].copy_(buffer)

    def _bring_from_host(self, buffers: dict[int, Tensor]) -> None:
        stage = self.stages[0]
        self.stages.reverse()
        if not all(buffer.is_pinned() for buffer in buffers.values()):
            stage.arrived.synchronize()  # what was pinned two calls ago has been read
            buffers = {k: b if b.is_pinned() else stage.pinned[k].copy_(b) for k, b in buffers.items()}
        with self.cuda.stream(self.stream):
            self.stream.wait_event(stage.taken)
            for k, buffer in buffers.items():
                stage.staged[k].copy_(buffer, non_blocking=True)
            stage.arrived.record(self.stream)
        current = self.cuda.current_stream(self.static.device)
        current.wait_event(stage.arrived)
        self.static.copy_(stage.staged)
        stage.taken.record(current)
