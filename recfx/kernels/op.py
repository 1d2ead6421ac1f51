"""How a kernel becomes a torch operator: one schema, a definition for every device, a fast CPU kernel, a fake."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from recfx.kernels.build import library

__all__ = ["DEFINITIONS", "address", "addresses", "c_function", "define_op", "gpu_function", "int64s"]

DEFINITIONS: dict[str, Callable] = {}  # by the name of the operator, recfx::name
_LIBRARY = torch.library.Library("recfx", "DEF")
_GPU_MODULES: dict[str, str] = {}  # of the operators that have a Triton function
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
_STRIDED = {"rows", "grads", "blocks"}  # arguments whose strides the kernels know; all others are read as contiguous

UNKNOWN = -1  # row of an id that is not in the table, and of padding
REFUSED = -2  # row of an id that was to get one and did not: no room, or not admitted
FREED = -1  # vocabulary of a row that is not in use


def define_op(
    schema: str, *, definition: Callable, fake: Callable, cpu: Callable | None = None, cuda: str | None = None
) -> Callable:
    """Registers `recfx::<schema>` and returns the overload to call.

    Args:     definition: plain torch, any device; the specification. It runs where no faster kernel is registered.
              fake: shapes and dtypes of the results.
              cpu: the same through the C++ library; None: ops.cpp registers it when the library is loaded, which the
              first call on CPU tensors does. Either falls back to the definition where there is no compiler.
              cuda: module below recfx.kernels that has the same in Triton under the operator's name. It is imported at
              the first call on CUDA tensors, and gives way to the definition where there is no triton.
    Raises:   NotImplementedError, when called: an argument requires a gradient, which no operator here has. torch alone
              would go on, and take it for 0. What the operator writes to or returns decides: where it returns no
              tensor, its inputs may require one.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    torch.library.register_fake(f"recfx::{name}", fake)
    overload = getattr(torch.ops.recfx, name).default
    DEFINITIONS[f"recfx::{name}"] = definition

    def load_or_define(*args: Any) -> Any:
        return overload(*args) if all(map(_is_plain, _tensors(args))) and library() else definition(*args)

    read_flat = [argument.name not in _STRIDED for argument in overload._schema.arguments]

    def launch(*args: Any) -> Any:
        for t in _tensors(itertools.compress(args, read_flat)):
            assert t.is_contiguous(), f"{name}: got strides {t.stride()} of {list(t.shape)}, expected contiguous"
        with torch.cuda.device(next(_tensors(args)).device):  # Triton launches on the current one, wherever tensors are
            return (gpu_function(name) or definition)(*args)

    _LIBRARY.impl(name, definition if cpu else load_or_define, "CompositeExplicitAutograd")
    if cpu:
        _LIBRARY.impl(name, lambda *args: (cpu if library() else definition)(*args), "CPU")
    if cuda:
        _GPU_MODULES[name] = f"recfx.kernels.{cuda}"
        _LIBRARY.impl(name, launch, "CUDA")
    _refuse_gradients(name, overload)
    return overload


def _refuse_gradients(name: str, overload: Any) -> None:
    """Makes the overload look at its arguments where gradients are recorded.

    An Autograd kernel would say the same, and cost each call of a captured step, which records none, 5 us: it would be
    Python between the graph and the kernel. This is called by the graph too, and asks for the mode alone.
    """
    schema, call = overload._schema, overload._op
    gives_tensors = any("Tensor" in str(r.type) for r in schema.returns)
    names = [a.name for a in schema.arguments]
    looks_at = [gives_tensors or (a.alias_info is not None and a.alias_info.is_write) for a in schema.arguments]

    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, looked_at, value in zip(names, looks_at, args, strict=False):
                if looked_at and any(map(_wants_gradient, _tensors([value]))):
                    raise NotImplementedError(
                        f"{name}: got {argument} of which a gradient is required, expected none. This operator has no "
                        "gradient, and torch would take it for 0. Detach it, or call under torch.no_grad()."
                    )
        return call(*args, **kwargs)

    if any(looks_at):
        overload._op = checked


def _wants_gradient(t: Tensor) -> bool:
    """Whether torch records what happens to it, backwards or forwards."""
    return t.requires_grad or (t.is_floating_point() and unpack_dual(t).tangent is not None)


def _is_plain(t: Tensor) -> bool:
    """Whether torch hands it to a kernel for CPU tensors."""
    return t.device.type == "cpu" and t.layout == torch.strided and not t.is_quantized


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists too."""
    return (t for a in args for t in (a if isinstance(a, Sequence) else [a]) if isinstance(t, Tensor))


@functools.cache
def gpu_function(name: str) -> Callable | None:
    """The Triton function of an operator that has one, or None (with a warning) where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(f"recfx: no triton found, running the slow reference of {name}.", stacklevel=2)
        return None
    return getattr(importlib.import_module(_GPU_MODULES[name]), name)


def c_function(name: str, kinds: str) -> Callable[..., None]:
    """A C++ kernel by name, resolved at its first call; `kinds` is a letter per argument: p pointer, i int64."""
    resolved: list[Callable[..., None]] = []

    def call(*args: int | ctypes.Array | None) -> None:
        if not resolved:
            loaded = library()
            assert loaded is not None
            function = getattr(loaded, name)
            function.argtypes, function.restype = [_KINDS[k] for k in kinds], None
            resolved.append(function)
        resolved[0](*args)

    return call


def address(t: Tensor) -> int:
    """Address of a contiguous tensor's first item."""
    assert t.is_contiguous()
    return t.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """A C array of the addresses of contiguous tensors."""
    return (ctypes.c_void_p * len(tensors))(*[address(t) for t in tensors])


def int64s(values: Sequence[int]) -> ctypes.Array:
    """A C array of int64."""
    return (ctypes.c_int64 * len(values))(*values)
