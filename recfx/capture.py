"""A step captured as one compiled graph, and on a GPU as one CUDA graph.

The only module, with `compiled`, `fx_passes` and `cuda_graph`, that knows of FX, torch.compile, CUDA graphs and the
allocator.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import dtype_abbrs
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from recfx.checks import check_type
from recfx.compiled import compiled
from recfx.cuda_graph import check_sweep, record, replayed
from recfx.run_checks import check_program
from recfx.step import Step, TrainState
from recfx.types import Batch, Layout, unpack

__all__ = ["capture", "capture_evaluation", "capture_prediction", "capture_steps", "sections_function", "trace"]

NewLayout = Literal["capture", "uncaptured", "raise"]
Run = Callable[[Any, Batch], tuple[Any, Any]]
RunSteps = Callable[[Any, Sequence[Batch]], tuple[Any, list[Any]]]

ORDER = "The order is (step, state, batch)."
RECORDED_ON = ("cuda",)  # devices whose steps are recorded and replayed

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def capture(step: Step, state: Any, batch: Batch, *, new_layout: NewLayout = "capture") -> Run:
    """The training step compiled as one graph: a callable of the signature of `step.update_`.

    The first call of each batch layout compiles (seconds; `batch` itself is not trained on and `state` not changed),
    later ones run the graph and no Python of the step: what feature functions and models do besides computing, such as
    printing, they do while compiling. Tables grow between calls without a recompile.

    On a GPU what was compiled is recorded as a CUDA graph per layout, on an empty batch, and replayed: one launch and,
    for a batch on the host, one copy that overlaps the step before. Eight layouts are kept. A batch in pinned memory
    must stay as it is until the step has read it. A host read of the table happens at most every 64 steps.

    Donation: the state passed in is written to; use the one that comes back. `aux` is valid until the next call, which
    on a GPU writes over it.
    Args:     new_layout: what becomes of a batch of another layout than `batch`. "capture": it is compiled for, which a
              service may not have the seconds for. "uncaptured": it goes through `step.update_` as it is, several
              times slower. "raise": an error that names the columns, before anything is changed.
    Raises:   TypeError when the batch is not packed; torch's error where a feature op or a model cannot be captured.
    """
    check_program(step, state, ORDER)
    return _Captured(step, step.update_, step.grow_, batch, new_layout).one


def capture_evaluation(step: Step, state: Any, batch: Batch, *, new_layout: NewLayout = "capture") -> Run:
    """The evaluation step compiled as one graph: changes the state's metrics alone. Otherwise as `capture`."""
    check_program(step, state, ORDER)
    return _Captured(step, step.evaluate_, lambda s, ids: s, batch, new_layout).one


def capture_prediction(
    step: Step, state: Any, batch: Batch, *, new_layout: NewLayout = "capture"
) -> Callable[[Any, Batch], Tensor]:
    """`step.predict` compiled as one graph: (state, batch) -> logit f32 [B, 1], valid until the next call.

    The batch needs no label where that is a column of the name that `train_step(label=)` says; a feature function that
    makes it of other columns needs those. torch.sigmoid of the logit is the click rate. The state is only read, so it
    may go on being trained between calls. Requests of any size share one graph when they are packed to one layout, see
    `recfx.types.pack`.
    Args, Raises: as of `capture`.
    """

    check_program(step, state, ORDER)

    def update_(state: Any, batch: dict) -> tuple[Any, Tensor]:
        return state, step.predict(state, batch)

    run = _Captured(step, update_, lambda s, ids: s, batch, new_layout).one
    return lambda state, batch: run(state, batch)[1]


def capture_steps(
    step: Step, state: Any, batch: Batch, *, steps_per_replay: int, new_layout: NewLayout = "capture"
) -> RunSteps:
    """`capture` for small batches on a GPU: (state, batches) -> (state, aux of each), several steps by one launch.

    The results are those of `capture`, batch after batch. `steps_per_replay` batches of one layout are one replay, and
    their copies are as many. A call with fewer, or with different layouts, replays single steps, which are recorded
    when first needed; on a CPU every call runs its steps one after another. Accumulation windows may begin and end
    anywhere.

    Every aux is valid until the next call. Rows are not swept in the midst of a call, so none may go past a step after
    which `step.sweep_` has work: those that `step.sweep_every` divides. `recfx.train.train` cuts there by itself, and
    where it logs, saves or stops.
    Args:     steps_per_replay: most batches of a call. Each has a static buffer, and twice a stage.
    Raises:   ValueError, before anything is changed, for no batch, for more, or when they go past a sweep; when
              steps_per_replay is below 1. Otherwise as `capture`.
    Example:  >>> while some := list(itertools.islice(batches, 4)):  # doctest: +SKIP
              ...     state, auxes = run(state, some)
    """
    if type(steps_per_replay) is not int or steps_per_replay < 1:
        raise ValueError(f"steps_per_replay: got {steps_per_replay!r}, expected at least 1, an int.")
    check_program(step, state, ORDER)
    knobs: dict[str, Any] = {"to_sweep": functools.partial(_batches_to_sweep, step), "most": steps_per_replay}
    return _Captured(step, step.update_, step.grow_, batch, new_layout, **knobs).several


def sections_function(update_: Callable, layout: Layout) -> Callable[[Any, list[Tensor]], Any]:
    """`update_` over the sections of a packed batch; returns aux alone, as every tensor of the state is in place."""

    def run(state: Any, sections: list[Tensor]) -> Any:
        return update_(state, unpack(sections, layout))[1]

    # Dynamo keeps its cache per code object: a copy gives each layout its own.
    code = run.__code__.replace(co_name="step")
    return types.FunctionType(code, run.__globals__, "step", run.__defaults__, run.__closure__)


def trace(update_: Callable, state: Any, batch: Batch) -> torch.fx.GraphModule:
    """The ATen graph of `sections_function(update_, batch.layout)`, a callable of the same signature.

    Traced on fake tensors: nothing is computed and `state` is neither read nor written, so tables of any size will do.
    Inputs are named by their path, `params_dnn_0_weight`, `tables_0_slots`, `sections_i64`; writes stay visible as
    in-place ops; what nothing uses is left out. Depends on the program alone, not on the process.
    """
    run = sections_function(update_, batch.layout)
    with torch.no_grad():
        graph_module = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(state, batch.sections)
    names = [re.sub(r"\W+", "_", keystr(path)).strip("_") for path, _ in tree_flatten_with_path(state)[0]]
    names += [f"sections_{dtype_abbrs[dtype]}" for dtype in batch.layout.dtypes]
    for node, name in zip(graph_module.graph.find_nodes(op="placeholder"), names, strict=True):
        node.name = node.target = name
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


class _Captured:
    """What `capture` and its relatives return: `one` batch, or `several`.

    Args:     to_sweep: (state) -> batches until rows are swept.  most: batches that `several` takes.
    """

    def __init__(
        self,
        step: Step,
        update_: Callable,
        grow_: Callable,
        first: Batch,
        new_layout: NewLayout,
        *,
        to_sweep: Callable[[Any], int] = lambda state: sys.maxsize,
        most: int = 1,
    ) -> None:
        if new_layout not in get_args(NewLayout):
            raise ValueError(f"new_layout: got {new_layout!r}, expected one of {get_args(NewLayout)}.")
        _check_packed(first)
        _keep_freed_memory()
        self.step, self.update_, self.grow_, self.to_sweep, self.most = step, update_, grow_, to_sweep, most
        self.first_layout, self.new_layout = first.layout, new_layout
        self.compiled: dict[tuple, dict[tuple[Layout, int], tuple[Callable, tuple[int, ...]]]] = {}
        self.known_state: Callable[[], Tensor | None] | None = None
        self.is_recorded = False  # of states like that one
        self.graphs: dict[tuple[Layout, int], tuple[Callable, tuple[int, ...]]] = {}  # of states shaped like that one

    def one(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        _check_packed(batch)
        check_type("state", state, TrainState, "Use the state that the call before returned.")
        if self.new_layout != "capture" and batch.layout != self.first_layout:
            self._refuse(batch)
            return self._uncaptured(state, batch)
        function, ids = self._function_for(state, batch)
        if self.is_recorded:
            state, (aux,) = self._replay(state, [batch], function, ids)
            return state, aux
        state = self.grow_(state, ids)
        with torch.no_grad():
            return state, function(state, batch.sections)

    def several(self, state: Any, batches: Sequence[Batch]) -> tuple[Any, list[Any]]:
        if not 1 <= len(batches) <= self.most:
            raise ValueError(f"batches: got {len(batches)}, expected 1 to {self.most}, the steps_per_replay.")
        for batch in batches:
            _check_packed(batch)
            self._refuse(batch)
        is_recorded = _is_recorded(state)
        layout = batches[0].layout if self.new_layout == "capture" else self.first_layout
        if is_recorded and len(batches) == self.most and all(batch.layout == layout for batch in batches):
            return self._replay(state, batches, *self._function_for(state, batches[0]))
        check_sweep(len(batches), self.to_sweep(state))
        auxes = []
        for batch in batches:
            state, aux = self.one(state, batch)
            auxes.append(tree_map(torch.clone, aux) if is_recorded else aux)  # the next replay writes over it
        return state, auxes

    def _refuse(self, batch: Batch) -> None:
        if self.new_layout == "raise" and batch.layout != self.first_layout:
            raise ValueError(_difference(batch.layout, self.first_layout))

    def _function_for(self, state: Any, batch: Batch) -> tuple[Callable, tuple[int, ...]]:
        """The step for the batch's layout, and the most ids per table that it holds."""
        # By a weak reference: a state that its owner drops must free its tables.
        if self.known_state is None or state.dense.step is not self.known_state():
            self.known_state, self.is_recorded = weakref.ref(state.dense.step), _is_recorded(state)
            self.graphs = self.compiled.setdefault(_shapes(state), {})
        key = batch.layout, torch.get_num_threads()
        if key not in self.graphs:
            self.graphs[key] = compiled(sections_function(self.update_, batch.layout)), self.step.ids_in(batch)
        return self.graphs[key]

    @functools.cached_property
    def _replay(self) -> Callable[..., tuple[Any, list[Any]]]:
        return replayed(self.grow_, self.to_sweep, _recorder(self.step.precision))

    def _uncaptured(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        state = self.grow_(state, self.step.ids_in(batch))
        with torch.no_grad(), _f32_products(self.step.precision):
            return self.update_(state, Batch(batch.buffer.to(state.dense.step.device), batch.layout))


def _is_recorded(state: Any) -> bool:
    return state.dense.step.device.type in RECORDED_ON


def _batches_to_sweep(step: Step, state: Any) -> int:
    """Micro-batches until `step.sweep_` has work, read from the device."""
    if not step.sweep_every:
        return sys.maxsize
    period = step.sweep_every * step.accumulation
    return period - (int(state.dense.step) * step.accumulation + int(state.window.num_batches)) % period


def _check_packed(batch: Any) -> None:
    if not isinstance(batch, Batch):
        raise TypeError(f"batch: got {type(batch).__name__}, expected recfx.types.Batch. Use recfx.types.pack.")


def _difference(got: Layout, expected: Layout) -> str:
    """The error for a batch that does not fit: at most three columns whose parts differ in dtype or capacity."""

    def parts(layout: Layout, name: str) -> str:
        fields = layout.columns.get(name, {}).values()
        return ", ".join(f"{f.part} {dtype_abbrs[f.dtype]}{list(f.shape)}" for f in fields) or "no such column"

    pairs = {name: (parts(got, name), parts(expected, name)) for name in {**expected.columns, **got.columns}}
    unequal = [f"feature '{name}': got {a}, expected {b}" for name, (a, b) in pairs.items() if a != b]
    if not unequal:
        unequal = [f"columns: got them in the order {list(got.columns)}, expected {list(expected.columns)}"]
    more = f" and {len(unequal) - 3} more" if len(unequal) > 3 else ""
    return (
        f"{'; '.join(unequal[:3])}{more}. The step was captured for another layout and new_layout is 'raise'. Pack "
        "batches with the same columns and capacities."
    )


def _recorder(precision: str) -> Callable[..., Any]:
    pool, stream_on = torch.cuda.graph_pool_handle(), functools.cache(torch.cuda.Stream)

    def record_in_precision(function: Callable, state: Any, layout: Layout, num: int) -> Any:
        with _f32_products(precision):
            return record(function, state, layout, num, pool=pool, stream=stream_on(state.dense.step.device))

    return record_in_precision


@contextmanager
def _f32_products(precision: str) -> Iterator[None]:
    """Lets cuBLAS use tf32 where a step asks for it. Inductor reads this when it compiles and cuBLAS when it is called,
    so a recording keeps what held while it was made."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if precision == "tf32":
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _shapes(state: Any) -> tuple:
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tree_leaves(state))


@functools.cache
def _keep_freed_memory() -> None:
    """Lets the C allocator keep what a step frees for the next one, where it is glibc's.

    Activations of a few MB are otherwise returned to the system and faulted in again at every step: 1.3 to 1.7 times
    the time of a DeepFM step at batch 4096 and above. The process keeps its peak in exchange.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_MMAP_THRESHOLD, 2**30)
