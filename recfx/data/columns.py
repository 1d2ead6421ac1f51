"""How a reader reads a column: as a fixed number of floats per row, or as lists, nested to any depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recfx.checks import check_choice, check_function, check_int, check_type, said
from recfx.data.exact_numbers import Rounding
from recfx.data.packing.pack_columns import PackedColumn

__all__ = ["Between", "Column", "FixedLen", "OneOf", "Valid", "VarLen", "finite", "fixedlen", "hashed", "varlen"]

Null = Literal["error", "empty"]
Missing = Literal["error", "empty"]
Side = Literal["left", "right"]
# Per column, ([bytes u8], [offsets i32 [strings + 1]]) -> [hashes i64 [strings]].
StringHash = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Between:
    """Numbers from low to high, both included; not NaN.

    Example:  >>> Between(0, 1)(np.array([0.5, 2, np.nan])).tolist()
              [True, False, False]
    """

    low: float
    high: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return (values >= self.low) & (values <= self.high)

    def __str__(self) -> str:
        return "a finite number" if self == finite else f"a number from {self.low} to {self.high}"


class OneOf:
    """One of the given numbers.

    Example:  >>> OneOf(0, 1)(np.array([0.5, 1])).tolist()
              [False, True]
    """

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.isin(values, self.numbers)

    def __repr__(self) -> str:
        return f"OneOf{self.numbers}"

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.numbers))}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneOf) and self.numbers == other.numbers

    def __hash__(self) -> int:
        return hash(self.numbers)


Valid = Between | OneOf | None
ITEMS = {torch.float32: pa.float32(), torch.int64: pa.int64(), torch.uint8: pa.binary()}
finite = Between(float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


@dataclass(frozen=True)
class FixedLen:
    """A column read as f32 [B, len(default)]. Built by `fixedlen`."""

    name: str
    default: tuple[float, ...]
    valid: Valid = finite
    null: Null = "error"
    rounding: Rounding = "error"
    missing: Missing = "error"

    depth = 1  # of lists in a row
    item = pa.float32()  # of the conformed column

    @property
    def packed(self) -> PackedColumn:
        return PackedColumn(self.name, torch.float32, width=len(self.default), num_levels=0)


@dataclass(frozen=True)
class VarLen:
    """A column read as `Ragged`. Built by `varlen` and `hashed`."""

    name: str
    dtype: torch.dtype
    depth: int = 1
    weighted: bool = False
    valid: Valid = None
    null: Null = "error"
    string_hash: StringHash | None = None
    buckets: int | None = None
    rounding: Rounding = "error"
    missing: Missing = "error"
    truncate: int | None = None
    side: Side = "right"

    @property
    def item(self) -> pa.DataType:
        return ITEMS[self.dtype]

    @property
    def packed(self) -> PackedColumn:
        num_levels = self.depth + (self.dtype == torch.uint8)
        return PackedColumn(self.name, self.dtype, num_levels=num_levels, weighted=self.weighted)


Column = FixedLen | VarLen


def fixedlen(
    name: str,
    default: Sequence[float],
    *,
    valid: Valid = finite,
    null: Null = "error",
    rounding: Rounding = "error",
    missing: Missing = "error",
) -> FixedLen:
    """A column of exactly len(default) numbers per row, as float32; an empty row gets the default.

    Args:     name: of a column, or "user.age" for a field of a struct column; the field is null where the struct is.
                  Only the field is read, except from Arrow IPC.
              valid: which numbers are valid: `finite`, `OneOf(0, 1)` for a label, `Between(low, high)`, or None for
                  any number, NaN included.
              null: "empty" reads a null row as an empty one. A null inside a list is always bad.
              rounding: "error": a whole number that float32 cannot represent, such as 2**24 + 1, is bad, in a column
                  of any type. "allow" rounds it. Fractions are always rounded.
              missing: "empty" reads a column that a file does not have as empty rows. At its end the reader warns of
                  a name that no file had.
    Raises:   ValueError when default is empty, or holds a whole number that float32 would round.
    Example:  >>> fixedlen("label", [0.0], valid=OneOf(0, 1)).default
              (0.0,)
    """
    if isinstance(default, str) or not hasattr(default, "__len__"):
        raise TypeError(
            f"column '{name}': got default {said(default)}, expected a list, one number for each item of a row. Use "
            "[0.0] for one."
        )
    if len(default) == 0:
        raise ValueError(f"column '{name}': got an empty default, expected one number for each item of a row.")
    _check(name, valid, null, rounding, missing)
    numbers = tuple(float(x) for x in default)
    for given, number in zip(default, numbers, strict=True):
        with np.errstate(over="ignore"):
            kept = float(np.float32(number))
        if rounding == "error" and number == np.trunc(number) and kept != given:
            raise ValueError(
                f"column '{name}': got default {given}, which float32 would round to {kept:.0f}, expected a whole "
                "number that float32 holds, or rounding='allow'."
            )
    return FixedLen(name, numbers, valid, null, rounding, missing)


def varlen(
    name: str,
    dtype: torch.dtype,
    *,
    depth: int = 1,
    weighted: bool = False,
    valid: Valid = finite,
    null: Null = "error",
    rounding: Rounding = "error",
    missing: Missing = "error",
    truncate: int | None = None,
    side: Side = "right",
) -> VarLen:
    """A column of lists of values: float32 from numbers, int64 from whole numbers, uint8 from the bytes of strings.

    uint64 is read as int64 with the same 64 bits: 2**63 and above become negative, and all 2**64 ids stay distinct. A
    column of doubles or decimals can be read as int64 when every value is whole and exact: a double below 2**53 (pandas
    stores ids with nulls as doubles), a decimal in 64 bits. Strings may hold any bytes.

    Args:     depth: how deep lists are nested in the file; 1 also reads plain values, as lists of length 1. A string
                  counts as a value: lists of strings become `Ragged(bytes, offsets of strings, outer=(of lists,))`.
              weighted: the innermost lists hold struct{k, v}, or are maps: a value and its weight. For strings with
                  weights use `hashed`.
              rounding: as for `fixedlen`; it applies to float32 values and to weights.
              truncate: how many values of each innermost list are read, with their weights; None: all. The others are
                  not checked. A string counts as a value.
              side: "left" drops values from the left and keeps the last ones, "right" keeps the first ones, as in
                  `recfx.features.truncate`.
              name, valid, null, missing: as for `fixedlen`; integers are always valid where `valid` is `finite`.
    Raises:   ValueError when dtype is not one of these, strings are weighted, depth is below 1 or truncate below 0.
    Example:  >>> varlen("c1", torch.int64).packed
              PackedColumn(name='c1', dtype=torch.int64, width=0, num_levels=1, weighted=False)
    """
    if dtype not in (torch.float32, torch.int64, torch.uint8):
        raise ValueError(f"column '{name}': got dtype {dtype!r}, expected torch.float32, torch.int64 or torch.uint8.")
    _check(name, valid, null, rounding, missing)
    _check_lists(name, depth, truncate, side)
    checked = None if valid == finite and dtype != torch.float32 else valid
    if checked is not None and dtype == torch.uint8:
        raise ValueError(f"column '{name}': got valid={valid!r}, expected None. Bytes of strings are not checked.")
    if weighted and dtype == torch.uint8:
        raise ValueError(
            f"column '{name}': got weighted=True for strings, expected False. A weight belongs to an id or a number. "
            "Use `hashed` for ids of strings."
        )
    if rounding == "allow" and dtype != torch.float32 and not weighted:
        raise ValueError(f"column '{name}': got rounding='allow', expected 'error'. Without weights it has no floats.")
    return VarLen(
        name, dtype, depth, weighted, checked, null, rounding=rounding, missing=missing, truncate=truncate, side=side
    )


def hashed(
    name: str,
    string_hash: StringHash,
    *,
    buckets: int | None = None,
    depth: int = 1,
    weighted: bool = False,
    null: Null = "error",
    rounding: Rounding = "error",
    missing: Missing = "error",
    truncate: int | None = None,
    side: Side = "right",
) -> VarLen:
    """A column of lists of strings, of any bytes, read as int64 hashes of their bytes.

    Args:     string_hash: `recfx.kernels.lists.string_hash.farm_hashes` or `murmur_hashes`.
              buckets: n > 0: the unsigned hash modulo n; 0: the hash with its sign bit cleared; None: the signed hash.
              name, depth, weighted, null, rounding, missing, truncate, side: as for `varlen`.
    Raises:   ValueError when buckets is negative, depth below 1 or truncate below 0.
    """
    hashes = "recfx.kernels.lists.string_hash"
    check_function(
        f"column '{name}', string_hash", string_hash, "bytes, offsets", "hashes", f"Use farm_hashes of {hashes}."
    )
    check_type(f"column '{name}', buckets", buckets, int | None)
    if buckets is not None and buckets < 0:
        raise ValueError(f"column '{name}': got buckets {buckets}, expected None, 0 or a number of buckets.")
    column = varlen(
        name,
        torch.int64,
        depth=depth,
        weighted=weighted,
        null=null,
        rounding=rounding,
        missing=missing,
        truncate=truncate,
        side=side,
    )
    return replace(column, string_hash=string_hash, buckets=buckets)


def _check(name: str, valid: Valid, null: Null, rounding: Rounding, missing: Missing) -> None:
    """Checks the arguments that all kinds of columns have."""
    check_type("column", name, str, "It is the name of a column.")
    if valid is not None and not callable(valid):
        raise TypeError(f"column '{name}': got valid={valid!r}, expected OneOf(...), Between(low, high) or None.")
    if null not in ("error", "empty"):
        raise ValueError(f"column '{name}': got null={null!r}, expected 'error' or 'empty'.")
    check_choice(f"column '{name}', rounding", rounding, ("error", "allow"))
    check_choice(f"column '{name}', missing", missing, ("error", "empty"))


def _check_lists(name: str, depth: int, truncate: int | None, side: Side) -> None:
    check_type(f"column '{name}', depth", depth, int)
    if depth < 1:
        raise ValueError(f"column '{name}': got depth {depth}, expected at least 1.")
    if truncate is not None:
        check_int(f"column '{name}', truncate", truncate, 0)
    check_choice(f"column '{name}', side", side, ("left", "right"))
