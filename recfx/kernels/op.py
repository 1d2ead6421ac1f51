"""How a kernel becomes a torch operator: a schema in schemas.h, a definition for every device, a CPU kernel in C++, a
Triton kernel, a fake."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from recfx.kernels.build import PACKAGE, library

__all__ = [
    "DEFINITIONS", "SCHEMAS", "address", "c_function", "constant_result", "define_op", "gpu_function", "has_cpu_kernel",
    "int64s",
]  # fmt: skip

Result = TypeVar("Result")


def _schemas() -> dict[str, str]:
    """The schemas of schemas.h by name, that of the row optimisers once for each.

    An array of strings: a comma ends one, adjacent literals are joined.
    """
    here = Path(__file__).parent
    text, optimizers = ((here / name).read_text() for name in ("schemas.h", "rows/optimizer_rows.cpp"))
    array, of_rows = re.sub("//.*", "", text[text.index("{") :]).split("};")
    formulas = re.findall(r"FORMULA\((\w+)\)", optimizers)
    schemas = ["".join(re.findall('"([^"]*)"', item)) for item in re.split('(?<="),', array)]
    schemas += [f"{name}_" + "".join(re.findall('"([^"]*)"', of_rows)) for name in formulas]
    return {schema[: schema.index("(")]: schema for schema in schemas if schema}


SCHEMAS = _schemas()
_LIBRARY = torch.library.Library("recfx", "FRAGMENT")
DEFINITIONS: dict[str, Callable] = {}  # by the name of the operator, recfx::name
_GPU_MODULES: dict[str, str] = {}  # of the operators that have a Triton function
_STRIDED = {"rows", "grads", "blocks"}  # arguments whose strides the kernels know; all others are read as contiguous

UNKNOWN = -1  # row of an id that is not in the table, and of padding
REFUSED = -2  # row of an id that was to get one and did not: no room, or not admitted
FREED = -1  # vocabulary of a row that is not in use


def constant_result(function: Callable[..., Result]) -> Callable[..., Result]:
    """What torch.compiler.assume_constant_result does: a graph holds the result, and not how it is computed.

    That function imports Dynamo and Triton, 1.5 s of each process, and sets only this mark.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def define_op(
    name: str, *, definition: Callable, fake: Callable, cuda: str | None = None, on_cpu: bool = True
) -> Callable:
    """Registers the operator `recfx::<name>` and returns the overload to call.

    Args:     name: of a schema in schemas.h. It is not defined again where a C++ library has defined it.
              definition: plain torch, any device; the specification. It runs where no faster kernel is registered.
              fake: shapes and dtypes of the results.
              cuda: module below recfx.kernels that has the same in Triton under the operator's name. It is imported at
              the first call on CUDA tensors; without triton the definition runs.
              on_cpu: whether an ops.cpp implements it for CPU tensors. The library is compiled and loaded by the first
              call on such tensors; without a compiler the definition runs. False: the definition runs on a CPU.
    Raises:   NotImplementedError, when called: an argument requires a gradient, which no operator here has. torch alone
              would go on, and take it for 0. What the operator writes to or returns decides: where it returns no
              tensor, its inputs may require one. Or no ops.cpp implements it for CPU tensors, and `on_cpu` is true.
    """
    if not hasattr(torch.ops.recfx, name):
        tags = torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides
        _LIBRARY.define(SCHEMAS[name], tags=tags)
    torch.library.register_fake(f"recfx::{name}", fake)
    overload = getattr(torch.ops.recfx, name).default
    DEFINITIONS[f"recfx::{name}"] = definition

    def load_or_define(*args: Any) -> Any:
        tensors = [*_tensors(args)]  # none where every list is empty: torch then picks no device
        if not tensors or not all(map(_is_plain, tensors)) or not library():
            return definition(*args)
        if not has_cpu_kernel(name):  # the call would come back here for ever
            raise NotImplementedError(
                f"{name}: got CPU tensors, expected a kernel for them in the library. No ops.cpp registers one. Add it "
                "there, or define the operator with on_cpu=False."
            )
        return overload(*args)

    read_flat = [argument.name not in _STRIDED for argument in overload._schema.arguments]

    def launch(*args: Any) -> Any:
        for t in _tensors(itertools.compress(args, read_flat)):
            assert t.is_contiguous(), f"{name}: got strides {t.stride()} of {list(t.shape)}, expected contiguous"
        with torch.cuda.device(next(_tensors(args)).device):  # Triton launches on the current one, wherever tensors are
            return (gpu_function(name) or definition)(*args)

    _LIBRARY.impl(name, load_or_define if on_cpu else definition, "CompositeExplicitAutograd")
    if cuda:
        _GPU_MODULES[name] = f"recfx.kernels.{cuda}"
        _LIBRARY.impl(name, launch, "CUDA")
    _refuse_gradients(name, overload)
    return overload


def has_cpu_kernel(name: str) -> bool:
    """Whether a loaded library implements the operator for CPU tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"recfx::{name}", "CPU")


def _refuse_gradients(name: str, overload: Any) -> None:
    """Makes the overload look at its arguments where gradients are recorded.

    An Autograd kernel would raise the same, and cost each call of a captured step, which records no gradients, 5 us: it
    would be Python between the graph and the kernel. The graph calls this too, and only the mode is read then.
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


def c_function(name: str) -> Callable[..., None]:
    """A function of the C++ library that is not an operator, by name. It is resolved at its first call.

    Pointers are addresses or ctypes arrays, all else is int64: as its definition in the sources has them.
    """
    resolved: list[Callable[..., None]] = []

    def call(*args: int | ctypes.Array | None) -> None:
        if not resolved:
            loaded = library()
            assert loaded is not None
            function = getattr(loaded, name)
            function.argtypes, function.restype = _types_of(name), None
            resolved.append(function)
        resolved[0](*args)

    return call


def _types_of(name: str) -> list[type]:
    """The ctypes of the parameters of `void name(...) {` in one of the sources."""
    found = (re.search(rf"\bvoid {name}\(([^)]*)\) {{", path.read_text()) for path in PACKAGE.rglob("*.cpp"))
    (parameters,) = (match[1].split(",") for match in found if match)
    for parameter in parameters:
        assert "*" in parameter or parameter.split()[0] == "int64_t", f"{name}: {parameter}"
    return [ctypes.c_void_p if "*" in parameter else ctypes.c_int64 for parameter in parameters]


def address(t: Tensor) -> int:
    """Address of a contiguous tensor's first item."""
    assert t.is_contiguous()
    return t.data_ptr()


def int64s(values: Sequence[int]) -> ctypes.Array:
    """A C array of int64."""
    return (ctypes.c_int64 * len(values))(*values)
