"""How a kernel becomes a torch operator: one schema, a definition for every device, a fast CPU kernel, a fake."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recfx.kernels.build import library

__all__ = ["address", "addresses", "c_function", "define_op", "int64s"]

_LIBRARY = torch.library.Library("recfx", "DEF")
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64}

UNKNOWN = -1  # row of an id that is not in the table: pools to zeros
REFUSED = -2  # row of an id that found no room: pools to its initial value, gets no gradient
FREED = -1  # vocabulary of a row that is not in use


def define_op(schema: str, *, definition: Callable, cpu: Callable, fake: Callable) -> Callable:
    """Registers `recfx::<schema>` and returns the overload to call.

    Args:     definition: plain torch, any device; the specification. It runs where no faster kernel is registered.
              cpu: the same through the C++ library; falls back to the definition where there is no compiler.
              fake: shapes and dtypes of the results.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, definition, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, lambda *args: (cpu if library() else definition)(*args), "CPU")
    torch.library.register_fake(f"recfx::{name}", fake)
    return getattr(torch.ops.recfx, name).default


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
