"""Converts numbers to another type: every whole number stays exact, or its place is reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["Rounding", "Spelled", "Wrong", "rounded", "spelled", "to_float", "to_int64", "uncastable"]

Rounding = Literal["error", "allow"]
EXACT_BITS = {16: 11, 32: 24, 64: 53}  # of a float: below 2**n every whole number is a separate float
INT64_END, UINT64_END = 2**63, 2**64
EXACT_DOUBLE = 2**53  # every whole number below is a separate double
DIGITS = re.compile(r"0|-?[1-9][0-9]*")  # the only spelling of a whole number: two names never become one id
SPELLED = r"^\s*[+-]?[0-9]+(?:\.0*)?\s*$"
PARTS = r"^\s*(?P<sign>[+-]?)0*(?P<digits>[0-9]*)(?:\.0*)?\s*$"
ZERO, HALF, END = (pa.scalar(Decimal(n), pa.decimal128(20, 0)) for n in (0, 2**63, 2**64))


class Wrong(NamedTuple):
    """Items that a type cannot represent."""

    places: np.ndarray  # i64, rising
    got: str  # the first of them
    expected: str


def to_int64(items: pa.Array) -> pa.Array | Wrong:
    """Whole numbers, none null, as int64. uint64, and decimals from 2**63 on, keep their 64 bits.

    A double is accepted below 2**53 in size, a float32 below 2**24: a larger one may have been rounded from another
    whole number.
    """
    if items.type == pa.uint64():
        return items.view(pa.int64())
    if pa.types.is_floating(items.type):
        return _int64_of_floats(items)
    return _int64_of_decimals(items) if pa.types.is_decimal(items.type) else items.cast(pa.int64())


def _int64_of_floats(items: pa.Array) -> pa.Array | Wrong:
    bits = EXACT_BITS[items.type.bit_width]
    values = items.to_numpy().astype(np.float64)
    places = np.flatnonzero(~((np.abs(values) < 2.0**bits) & (values == np.trunc(values))))
    if not len(places):
        return pa.array(values.astype(np.int64))
    first = values[places[0]]
    if np.isnan(first):
        return Wrong(places, "nan", "a whole number, or null where there is none")
    if first != np.trunc(first) or np.isinf(first):
        return Wrong(places, f"{first}", "a whole number")
    name = "double" if bits == 53 else f"float{items.type.bit_width}"
    return Wrong(places, f"{first}, which may have been rounded", f"a whole number below 2**{bits} of a {name}")


def _int64_of_decimals(items: pa.Array) -> pa.Array | Wrong:
    wide = items.cast(pa.decimal256(76, max(items.type.scale, 0)))
    whole = pc.trunc(wide)
    fits = pc.and_(pc.greater_equal(whole, pc.negate(HALF)), pc.less(whole, END))
    places = np.flatnonzero(~pc.and_(pc.equal(whole, wide), fits).to_numpy(zero_copy_only=False))
    if len(places):
        return Wrong(places, f"{items[places[0]]}", "a whole number of 64 bits")
    numbers = whole.cast(END.type)
    is_high = pc.greater_equal(numbers, HALF)
    low, high = pc.if_else(is_high, ZERO, numbers).cast(pa.int64()), pc.if_else(is_high, numbers, ZERO)
    return pa.array(low.to_numpy() | high.cast(pa.uint64()).to_numpy().view(np.int64))


def to_float(items: pa.Array, kind: pa.DataType) -> pa.Array:
    """Numbers, none null, as float32 or float64, the nearest ones; see `rounded`."""
    if pa.types.is_decimal(items.type):
        items = items.cast(pa.float64())
    return items if items.type == kind else items.cast(kind, safe=False)


def rounded(items: pa.Array, numbers: pa.Array, *, from_text: bool = False) -> Wrong | None:
    """Where a whole number became another one in `numbers`, which `to_float` made of the items. Fractions may round.

    Args:     from_text: doubles were read from text, so from 2**53 on they may be rounded already.
    Cost:     one pass over the numbers, where the items' type is wider than theirs.
    """
    kind, values = numbers.type, numbers.to_numpy()
    limit = 2 ** EXACT_BITS[kind.bit_width]
    if not len(values) or not _is_wider(items.type, kind, from_text):
        return None
    if values.min() > -limit and values.max() < limit:  # neither is true where there is NaN
        return None
    places = np.flatnonzero(np.abs(values) >= limit)
    is_float = pa.types.is_floating(items.type)
    changed = (
        _changed_floats if is_float else _changed_decimals if pa.types.is_decimal(items.type) else _changed_integers
    )
    places = places[changed(items.take(pa.array(places)), kind)]
    if from_text and is_float:
        places = np.union1d(places, np.flatnonzero(np.isfinite(values) & (np.abs(values) >= 2**53)))
    if not len(places):
        return None
    first, number, name = items[int(places[0])].as_py(), float(values[places[0]]), f"float{kind.bit_width}"
    if number == first:
        return Wrong(places, f"{first}, a double that may have been rounded", "a whole number below 2**53 in text")
    became = int(number) if np.isfinite(number) else number
    return Wrong(places, f"{first}, which {name} would round to {became}", f"a whole number that {name} holds")


def _is_wider(kind: pa.DataType, target: pa.DataType, from_text: bool) -> bool:
    """Whether a type has whole numbers that a float type cannot represent."""
    if pa.types.is_floating(kind):
        return kind.bit_width > target.bit_width or (from_text and kind == pa.float64())
    return pa.types.is_decimal(kind) or (pa.types.is_integer(kind) and kind.bit_width > EXACT_BITS[target.bit_width])


def _changed_integers(large: pa.Array, kind: pa.DataType) -> np.ndarray:
    sizes = np.abs(large.to_numpy()).astype(np.uint64)
    lowest_bits = sizes & (~sizes + np.uint64(1))
    return sizes // lowest_bits >= 2 ** EXACT_BITS[kind.bit_width]


def _changed_floats(large: pa.Array, kind: pa.DataType) -> np.ndarray:
    """Which whole numbers change."""
    values = large.to_numpy()
    with np.errstate(over="ignore"):
        return (values.astype(kind.to_pandas_dtype()) != values) & (values == np.trunc(values))


def _changed_decimals(large: pa.Array, kind: pa.DataType) -> np.ndarray:
    """Which whole numbers change, one by one: few decimals are that large."""
    to_kind = kind.to_pandas_dtype()
    with np.errstate(over="ignore"):
        changed = [x == x.to_integral_value() and Decimal(float(to_kind(x))) != x for x in large.to_pylist()]
    return np.array(changed, dtype=bool)


def uncastable(texts: pa.Array, kind: pa.DataType) -> np.ndarray:
    """The places of texts that Arrow cannot cast to this type: i64, rising. Arrow itself names only the first.

    Cost:     casts of halves: about 2 log2(n) casts for each such text.
    """
    return np.array(list(_uncastable(texts, kind, 0)), dtype=np.int64)


def _uncastable(texts: pa.Array, kind: pa.DataType, first: int) -> Iterator[int]:
    try:
        texts.cast(kind)
    except pa.ArrowInvalid:
        half = len(texts) // 2
        if half == 0:
            yield first
        else:
            yield from _uncastable(texts.slice(0, half), kind, first)
            yield from _uncastable(texts.slice(half), kind, first + half)


class Spelled(NamedTuple):
    """The whole numbers that texts spell. The size is 0 for other texts, and beyond 64 bits."""

    is_number: np.ndarray  # bool [n]
    is_negative: np.ndarray  # bool [n]
    sizes: np.ndarray  # u64 [n]: without the sign
    is_larger: np.ndarray  # bool [n]: than 2**64 - 1
    digits: pa.Array  # binary [n], without leading zeros


def spelled(texts: pa.Array) -> Spelled:
    """Reads whole numbers in decimal digits, with optional sign, leading zeros, blanks around and an ending as ".0".

    Args:     texts: binary, none null.
    Cost:     no Python loop; about 0.5 us for each text.
    Example:  >>> spelled(pa.array([b" -007.0 ", b"1e5"]))[:3]
              (array([ True, False]), array([ True, False]), array([7, 0], dtype=uint64))
    """
    is_number = pc.match_substring_regex(texts, SPELLED)
    parts = pc.extract_regex(pc.if_else(is_number, texts, b"0"), PARTS)
    sign, digits = parts.field("sign"), parts.field("digits")
    lengths = pc.binary_length(digits)
    is_larger = pc.or_(
        pc.greater(lengths, 20), pc.and_(pc.equal(lengths, 20), pc.greater(digits, f"{2**64 - 1}".encode()))
    )
    sizes = pc.if_else(pc.or_(is_larger, pc.equal(lengths, 0)), b"0", digits).cast(pa.string()).cast(pa.uint64())
    number, negative, larger = (
        mask.to_numpy(zero_copy_only=False) for mask in (is_number, pc.equal(sign, b"-"), is_larger)
    )
    return Spelled(number, negative, sizes.to_numpy(), larger, digits)
