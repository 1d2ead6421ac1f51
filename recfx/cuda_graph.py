"""A step recorded as CUDA graphs, one per batch layout, and fed while the one before runs. Part of `recfx.capture`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves

from recfx.types import Batch, Layout

__all__ = ["Feed", "record", "replayed", "untouched"]

Function = Callable[[Any, list[Tensor]], Any]  # (state, sections of a batch) -> aux, writes into the state
Replay = Callable[[Tensor], Any]  # (buffer of a batch) -> aux

MOST_GRAPHS = 8
STEPS_AHEAD = 64
WARM_UPS = 2


def replayed(
    grow_: Callable[[Any, Sequence[int]], Any], record: Callable[[Function, Any, Layout], Replay]
) -> Callable[[Any, Batch, Function, Sequence[int]], tuple[Any, Any]]:
    """(state, batch, function, most new ids per table) -> (state, aux), by replaying what `record` made of `function`.

    A recording belongs to a layout and to the places of a state's tensors: any other is recorded anew, and of more than
    MOST_GRAPHS the one that waited longest is dropped. Growth moves no tensor, and a recorded kernel reads how much of
    an index is in use from the device, so a table that grows needs no new recording.

    Reading how full a table is would stop the host at every step. So room is made for STEPS_AHEAD steps at once, and
    the table is read again when so many ids may have come, or when anything else has written to the state.
    """
    graphs: OrderedDict[tuple, Replay] = OrderedDict()
    known: tuple = ()
    left: list[int] = []

    def run(state: Any, batch: Batch, function: Function, ids: Sequence[int]) -> tuple[Any, Any]:
        nonlocal known, left
        places = _places(state)
        if known != (places, _versions(state)) or any(l < n for l, n in zip(left, ids, strict=True)):
            left = [STEPS_AHEAD * n for n in ids]
            state = grow_(state, left)
        left = [l - n for l, n in zip(left, ids, strict=True)]
        known = ()  # until the step has ended
        key = places, batch.layout
        if key not in graphs:
            graphs[key] = record(function, state, batch.layout)
            if len(graphs) > MOST_GRAPHS:
                graphs.popitem(last=False)
        graphs.move_to_end(key)
        aux = graphs[key](batch.buffer)
        increment_version(state.window.num_samples)  # a replay is a write that autograd does not see
        known = places, _versions(state)
        return state, aux

    return run


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
    counters = (t for s in state.tables for t in (s.num_rows, s.num_unique))
    return tuple(t._version for t in (state.window.num_samples, *counters))


@contextmanager
def untouched(state: Any) -> Iterator[None]:
    """Runs of `update_` or `evaluate_` on an empty batch leave no trace in the state.

    An empty batch reaches no row: it has no ids, and the step is not due. What it writes beside the rows (counters,
    dense parameters, metrics) is put back. Nothing as large as a table is copied.
    """
    of_tables = [t for s in state.tables for t in (*(t for t in tree_leaves(s) if t.dim() == 0), s.tally)]
    written = [*of_tables, *tree_leaves(state._replace(tables=()))]
    kept = [t.clone() for t in written]
    state.window.num_batches.fill_(-1)  # one more batch is still fewer than any accumulation
    try:
        yield
    finally:
        for t, value in zip(written, kept, strict=True):
            t.copy_(value)


def record(function: Function, state: Any, layout: Layout, *, pool: Any) -> Replay:
    """`function` as one CUDA graph over a static buffer. Compiles and warms up on the empty batch: zeros.

    Args:     pool: memory of the temporaries and of aux, shared by recordings of which one runs at a time.
    """
    device = state.window.num_samples.device
    empty = Batch(torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device), layout)
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    with torch.no_grad():
        stream.wait_stream(current)
        with torch.cuda.stream(stream), untouched(state):
            for _ in range(WARM_UPS):
                function(state, empty.sections)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: reader threads may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            aux = function(state, empty.sections)
    feed = Feed(empty.buffer)

    def replay(buffer: Tensor) -> Any:
        feed.bring(buffer)
        graph.replay()
        return aux

    return replay


class _Stage(NamedTuple):
    """A batch on its way."""

    pinned: Tensor
    staged: Tensor
    arrived: Any  # event: staged holds the batch
    taken: Any  # event: staged has been read


class Feed:
    """Brings batches into one static buffer on the device, those from the host through two stages in turns.

    While the step reads the static buffer, the next batch is copied to a stage on a stream of its own. From the stage
    to the static buffer it is one copy within the device, in order with the steps.

    Args:     cuda: torch.cuda, or what stands in for it in a test.
    """

    def __init__(self, static: Tensor, cuda: Any = torch.cuda) -> None:
        self.static, self.cuda = static, cuda
        self.stream = cuda.Stream(static.device)
        self.stream.wait_stream(cuda.current_stream(static.device))  # which may still use the stages' memory
        self.stages = [self._stage(), self._stage()]

    def _stage(self) -> _Stage:
        pinned = torch.empty(self.static.shape, dtype=torch.uint8, pin_memory=self.static.is_cuda)
        return _Stage(pinned, torch.empty_like(self.static), self.cuda.Event(), self.cuda.Event())

    def bring(self, buffer: Tensor) -> None:
        """Queues the copy of a batch's buffer. One in pinned memory is read later, by the device: leave it as it is."""
        if buffer.is_cuda:
            self.static.copy_(buffer)
            return
        stage = self.stages[0]
        self.stages.reverse()
        if not buffer.is_pinned():
            stage.arrived.synchronize()  # the pinned copy of two batches ago has been read
            buffer = stage.pinned.copy_(buffer)
        with self.cuda.stream(self.stream):
            self.stream.wait_event(stage.taken)
            stage.staged.copy_(buffer, non_blocking=True)
            stage.arrived.record(self.stream)
        current = self.cuda.current_stream(self.static.device)
        current.wait_event(stage.arrived)
        self.static.copy_(stage.staged)
        stage.taken.record(current)
