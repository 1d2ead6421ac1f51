"""Texts by which a cache tells recipes apart: equal for equal values, in any process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import xxhash

from recfx.data.columns import Between, FixedLen, OneOf, VarLen
from recfx.data.split import Split
from recfx.data.text.csv import Csv
from recfx.data.text.json_lines import JsonLines
from recfx.data.text.libsvm import Libsvm
from recfx.kernels.lists.string_hash import farm_hashes, murmur_hashes

__all__ = ["NoIdentityError", "identity_of"]

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype)
OWN_TYPES = (Between, OneOf, FixedLen, VarLen, Split, Csv, JsonLines, Libsvm)
OWN_FUNCTIONS = {"farm_hashes 1": farm_hashes, "murmur_hashes 1": murmur_hashes}  # count up with a change


class NoIdentityError(ValueError):
    """A value that may change without looking different; the message names it and its place."""


def identity_of(value: Any, where: str) -> str:
    """A text that is equal for equal values, and differs when any part of them differs.

    Args:     where: the place of the value, for the error.
    Raises:   NoIdentityError for a user's function, and for any other value that is not known here: a function may
              change under one name, and an object may hold more than its repr shows.
    """
    kind = type(value)  # not isinstance: a subclass of a known class may do anything
    if kind in PLAIN:
        return f"{kind.__name__} {value!r}"
    if kind in (tuple, list):
        return f"{kind.__name__}({', '.join(identity_of(item, where) for item in value)})"
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":  # repr omits most of a long array
        content = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(value).tobytes())
        return f"array {value.dtype.str} {value.shape} {content}"
    if kind in OWN_TYPES:
        return f"{kind.__name__}({', '.join(_parts(value, where))})"
    if isinstance(value, pc.Expression):
        return _expression(value, where)
    for name, function in OWN_FUNCTIONS.items():
        if value is function:
            return name
    raise NoIdentityError(f"{where}: {_shown(value)}")


def _parts(value: Any, where: str) -> list[str]:
    """The attributes of one of recfx's objects."""
    if isinstance(value, FixedLen | VarLen):
        where = f"column '{value.name}'"
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else sorted(vars(value))
    return [f"{name}={identity_of(getattr(value, name), f'{where}, {name}')}" for name in names]


def _expression(expression: pc.Expression, where: str) -> str:
    _, (serialized,) = expression.__reduce__()
    content = serialized.to_pybytes()
    for name in pc.list_functions():
        if not hasattr(pc, name) and pc.get_function(name).kind == "scalar" and name.encode() in content:
            raise NoIdentityError(f"{where}: a registered function '{name}'")  # Arrow's functions are attributes of pc
    return f"expression {content.hex()}"


def _shown(value: Any) -> str:
    name = getattr(value, "__qualname__", None) if isinstance(value, Callable) else None  # type: ignore[arg-type]
    return f"the function '{name}'" if isinstance(name, str) else f"an object of {type(value).__qualname__}"
