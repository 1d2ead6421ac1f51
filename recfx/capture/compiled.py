"""A function of a training state and a packed batch as one graph, called with as little Python as can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from recfx.capture.one_at_a_time import one_at_a_time
from recfx.capture.passes import StepPasses, UnfuseBias
from recfx.capture.rehearsal import mistake_in
from recfx.kernels.build import build_ahead, library

__all__ = ["compiled", "options_for"]

CAT_PARTS = 32  # a kernel finds out for each item which part it is from

Function = Callable[[Any, list[Tensor]], Any]  # (state, sections of the batch) -> aux


def compiled(function: Function, state: Any, sections: list[Tensor]) -> Function:
    """`function` compiled by torch.compile as one graph, for states and sections of these shapes. Runs nothing.

    Nothing checks the shapes of later calls: Dynamo's guards are dropped, and Dynamo is not called any more. The
    function as it is without a C++ compiler: slow, but the same results.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn("recfx: no C++ compiler found, running the step uncompiled.", stacklevel=2)
        return function
    device, options = sections[0].device.type, options_for(sections[0].device.type)
    graphs: list[tuple[Callable, Sequence[Tensor], Sequence[Tensor]]] = []
    is_compiling = True

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        with one_at_a_time():
            graph: Any = compile_fx(module, inputs, config_patches=options)
        outputs: Any = module.graph.output_node().args[0]
        results = [_empty_like(node.meta["example_value"]) for node in outputs]

        def call(*args: Tensor) -> Sequence[Tensor]:
            if not is_compiling:
                return graph(*args)
            graphs.append((graph, args, results))
            return results

        return call

    guards: dict[str, Any] = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    by_dynamo = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=guards)
    on_cpu = device == "cpu"
    if on_cpu:
        build_ahead()
    try:
        with warnings.catch_warnings():
            # Dynamo makes an instance of each autograd.Function that it meets, and torch warns of instances.
            warnings.filterwarnings("ignore", ".*autograd.*should not be instantiated", DeprecationWarning)
            if device == "cuda":  # which precision products have is the step's to say
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
            aux = by_dynamo(state, sections)
    except TorchDynamoException:
        mistake = mistake_in(function, state, sections)
        if mistake is None:
            raise
        raise mistake from None
    is_compiling = False
    if on_cpu:
        library()  # so that the first step does not wait for it
    return _past_dynamo(*graphs.pop(), state, sections, aux) or by_dynamo


def options_for(device: str) -> dict[str, Any]:
    """Inductor's options for a step on that kind of device.

    On CUDA launches are what a small batch waits for: independent kernels become one, and so does a `cat` of up to
    CAT_PARTS, at which Inductor would make a kernel of each part above 8. Padding of products is left out, which it
    would decide by timing them: it adds launches. Older versions of torch lack some names, and join fewer kernels.
    """
    options: dict[str, Any] = {
        "post_grad_custom_pre_pass": StepPasses(),
        "post_grad_custom_post_pass": UnfuseBias(),
        "size_asserts": False,
        "triton.cudagraphs": False,  # `cuda_graph` records the whole step itself
        "fallback_random": True,  # torch's random functions draw what they draw uncompiled
    }
    if device == "cuda":
        joined: dict[str, Any] = {"combo_kernels": True, "shape_padding": False}
        joined |= dict.fromkeys(("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs"), CAT_PARTS)
        options |= {name: value for name, value in joined.items() if hasattr(torch._inductor.config, name)}
    return options


def _empty_like(fake: Tensor) -> Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


def _past_dynamo(
    graph: Callable, args: Sequence[Tensor], results: Sequence[Tensor], state: Any, sections: list[Tensor], aux: Any
) -> Function | None:
    """`graph` as a function of (state, sections), by what Dynamo gave it and made of its results in one call.

    Dynamo does the same, in bytecode and checks that are in no cache any more when a step ends: 0.06 to 0.1 ms a step.
    A tensor that is not in the state, which the program holds, stays that of the first call. None where a part of `aux`
    is not a result of the graph.
    """
    where = {id(leaf): f"state{keystr(path)}" for path, leaf in tree_flatten_with_path(state)[0]}
    where |= {id(section): f"sections[{i}]" for i, section in enumerate(sections)}
    constants = [arg for arg in args if id(arg) not in where]
    where |= {id(constant): f"constants[{i}]" for i, constant in enumerate(constants)}
    args_of = eval(f"lambda state, sections: [{', '.join(where[id(arg)] for arg in args)}]", {"constants": constants})
    places = {id(result): i for i, result in enumerate(results)}
    leaves, spec = tree_flatten(aux)
    if any(id(leaf) not in places for leaf in leaves):
        return None
    order = [places[id(leaf)] for leaf in leaves]

    def direct(state: Any, sections: list[Tensor]) -> Any:
        results = graph(*args_of(state, sections))
        return tree_unflatten([results[i] for i in order], spec)

    return direct
