"""A step captured as one compiled graph, and on a GPU as one CUDA graph.

The only module, with `fx_passes` and `cuda_graph`, that knows of FX, torch.compile, CUDA graphs and the allocator.
"""

from __future__ import annotations

import ctypes
import functools
import re
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import dtype_abbrs
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from recfx.cuda_graph import record, replayed
from recfx.fx_passes import StepPasses
from recfx.step import Step
from recfx.types import Batch, Layout, unpack

__all__ = ["capture", "capture_evaluation", "sections_function", "trace"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def capture(step: Step, state: Any, batch: Batch) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The training step compiled as one graph: a callable of the signature of `step.update_`.

    The first call of each batch layout compiles (seconds; `batch` itself is not trained on and `state` not changed),
    later ones run the graph. Tables grow between calls without a recompile.

    On a GPU what was compiled is recorded as a CUDA graph per layout, on an empty batch, and replayed: one launch and,
    for a batch on the host, one copy that overlaps the step before. Eight layouts are kept. A batch in pinned memory
    must stay as it is until the step has read it. A host read of the table happens at most every 64 steps.

    Donation: the state passed in is written to; use the one that comes back. `aux` is valid until the next call, which
    on a GPU writes over it.
    Raises:   TypeError when the batch is not packed; torch's error where a feature op or a model cannot be captured.
    """
    return _captured(step, step.update_, lambda s, ids: step.grow_(s, ids))


def capture_evaluation(step: Step, state: Any, batch: Batch) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The evaluation step compiled as one graph: changes the state's metrics alone."""
    return _captured(step, step.evaluate_, lambda s, ids: s)


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


def _captured(step: Step, update_: Callable, grow_: Callable) -> Callable[[Any, Batch], tuple[Any, Any]]:
    _keep_freed_memory()
    compiled: dict[tuple, dict[tuple[Layout, int], tuple[Callable, tuple[int, ...]]]] = {}
    replay: Callable[..., tuple[Any, Any]] | None = None
    known_state: Callable[[], Tensor | None] | None = None
    graphs: dict[tuple[Layout, int], tuple[Callable, tuple[int, ...]]] = {}  # of states shaped like the known one

    def run(state: Any, batch: Batch) -> tuple[Any, Any]:
        nonlocal known_state, graphs, replay
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: got {type(batch).__name__}, expected recfx.types.Batch. Use recfx.types.pack.")
        # By a weak reference: a state that its owner drops must free its tables.
        if known_state is None or state.dense.step is not known_state():
            known_state, graphs = weakref.ref(state.dense.step), compiled.setdefault(_shapes(state), {})
        key = batch.layout, torch.get_num_threads()
        if key not in graphs:
            graphs[key] = _compile(sections_function(update_, batch.layout)), step.ids_in(batch)
        function, ids = graphs[key]
        if state.dense.step.is_cuda:
            replay = replay or replayed(grow_, _recorder(step.precision))
            return replay(state, batch, function, ids)
        state = grow_(state, ids)
        with torch.no_grad():
            return state, function(state, batch.sections)

    return run


def _compile(function: Callable) -> Callable:
    """One graph, without Dynamo's guards: `run` looks up by all that they would check, in a tenth of the time.

    The function as it is where there is no C++ compiler: slow, but the same results.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn("recfx: no C++ compiler found, running the step uncompiled.", stacklevel=2)
        return function
    options: dict[str, Any] = {
        "guard_filter_fn": lambda guards: [False for _ in guards],
        "post_grad_custom_pre_pass": StepPasses(),
        "size_asserts": False,
        "triton.cudagraphs": False,  # `cuda_graph` records the whole step itself
    }
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def _recorder(precision: str) -> Callable[..., Any]:
    pool = torch.cuda.graph_pool_handle()

    def record_in_precision(function: Callable, state: Any, layout: Layout) -> Any:
        with _f32_products(precision):
            return record(function, state, layout, pool=pool)

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
