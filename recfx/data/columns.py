"""What a reader makes of a column: a fixed number of floats a row, or a list of any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Column", "FixedLen", "VarLen", "fixedlen", "varlen"]


@dataclass(frozen=True)
class FixedLen:
    """A column read as f32 [B, len(default)]. Built by `fixedlen`."""

    name: str
    default: tuple[float, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


@dataclass(frozen=True)
class VarLen:
    """A column read as `Ragged`: values of `dtype`, offsets i32 [B + 1]. Built by `varlen`."""

    name: str
    dtype: torch.dtype


Column = FixedLen | VarLen


def fixedlen(name: str, default: Sequence[float]) -> FixedLen:
    """A column of exactly len(default) numbers a row, as float32; an empty row takes the default.

    Raises:   ValueError when default is empty.
    Example:  >>> fixedlen("label", [0.0])
              FixedLen(name='label', default=(0.0,))
    """
    if len(default) == 0:
        raise ValueError(f"column '{name}': got an empty default, expected one number for each item of a row.")
    return FixedLen(name, tuple(float(x) for x in default))


def varlen(name: str, dtype: torch.dtype) -> VarLen:
    """A column of any number of values a row: float32 from floating point columns, int64 from integer columns.

    Raises:   ValueError when dtype is another.
    Example:  >>> varlen("c1", torch.int64)
              VarLen(name='c1', dtype=torch.int64)
    """
    if dtype not in (torch.float32, torch.int64):
        raise ValueError(f"column '{name}': got dtype {dtype}, expected torch.float32 or torch.int64.")
    return VarLen(name, dtype)
