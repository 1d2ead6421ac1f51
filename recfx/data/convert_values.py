"""Columns of a converted file: every value is stored exactly, or its row is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.exact_numbers import Rounding, Wrong, rounded, spelled, to_float, to_int64, uncastable
from recfx.data.schema import as_list, decoded, is_list, is_text, item_type, packed_list
from recfx.data.text.lines import is_utf8
from recfx.data.unit_rows import BadRows

__all__ = ["Keeping", "NotTextError", "check_given", "read_as", "stored", "stored_type"]

RangeOf = dict[pa.DataType, tuple[int, int]]
RANGES: RangeOf = {pa.int64(): (-(2**63), 2**63 - 1), pa.uint64(): (0, 2**64 - 1)}
RowsOf = Callable[[np.ndarray], np.ndarray]  # places of items -> the rows that they are in


class Keeping(NamedTuple):
    """How the values of a column are stored."""

    name: str
    rounding: Rounding = "error"
    is_given: bool = False  # the caller gave its type


class NotTextError(Exception):
    """A column of strings holds bytes that are not UTF-8: it must be stored as bytes."""

    def __init__(self, name: str) -> None:
        self.name = name


def check_given(name: str, kind: pa.DataType) -> pa.DataType:
    """The stored type for a type that the caller gave: int64, uint64, float32, float64, string, binary, or lists.

    Raises:   ValueError when no stored type corresponds to it.
    """
    if is_list(kind):
        return pa.list_(check_given(name, item_type(kind)))
    if is_text(kind):
        is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        return pa.string() if is_string else pa.binary()
    if pa.types.is_floating(kind):
        return pa.float64() if kind == pa.float64() else pa.float32()
    if pa.types.is_integer(kind):
        return pa.uint64() if kind == pa.uint64() else pa.int64()
    raise ValueError(
        f"types: got {kind} for '{name}', expected int64, uint64, float32, float64, string, binary or lists of them."
    )


def read_as(kind: pa.DataType, rounding: Rounding) -> pa.DataType:
    """The type in which items of such a column are read from text. It shows whether they can be stored exactly."""
    while is_list(kind):
        kind = item_type(kind)
    if kind == pa.float32() and rounding == "error":
        return pa.float64()
    return pa.binary() if is_text(kind) else kind


def stored_type(kind: pa.DataType, given: pa.DataType | None, *, null: pa.DataType) -> pa.DataType:
    """The type in the new file for a type of the old file.

    Args:     given: see `check_given`; for a list also the type of its items.
              null: the type that Arrow's null type becomes.
    Raises:   ValueError when the given type has another shape.
    """
    if pa.types.is_dictionary(kind):
        return stored_type(kind.value_type, given, null=null)
    if is_list(kind):
        inner = item_type(given) if given is not None and is_list(given) else given
        return pa.list_(stored_type(item_type(kind), inner, null=null))
    if given is not None and (is_list(given) or pa.types.is_struct(kind)):
        if pa.types.is_null(kind):
            return given
        raise ValueError(f"got {kind}, expected values that can be stored as {given}")
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, stored_type(field.type, None, null=null)) for field in kind])
    if given is not None:
        return given
    if pa.types.is_null(kind):
        return null
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (pa.types.is_decimal(kind) and kind.scale <= 0):
        return pa.int64()
    return pa.float32() if pa.types.is_floating(kind) or pa.types.is_decimal(kind) else pa.string()


def stored(array: pa.Array, kind: pa.DataType, how: Keeping) -> pa.Array:
    """A column, or some of its rows, in a type of `stored_type`.

    Raises:   BadRows where a value cannot be stored, NotTextError where bytes are not a string, an Arrow error where
              Arrow has no such conversion.
    """
    return _stored(array, kind, how, lambda places: places)


def _stored(array: pa.Array, kind: pa.DataType, how: Keeping, rows: RowsOf) -> pa.Array:
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if is_list(array.type):
        lists = as_list(array)
        ends = np.cumsum(lists.value_lengths().fill_null(0).to_numpy())
        items = _stored(
            lists.flatten(), kind.value_type, how, lambda places: rows(np.searchsorted(ends, places, side="right"))
        )
        return packed_list(lists, items)
    if pa.types.is_struct(array.type):
        inner = zip(array.flatten(), kind, strict=True)
        fields = [_stored(field, other.type, how, rows) for field, other in inner]
        return pa.StructArray.from_arrays(fields, kind.names, mask=array.is_null()) if fields else array
    array = decoded(array)
    is_valid = array.is_valid().to_numpy(zero_copy_only=False)
    kept = _kept(array.drop_null() if array.null_count else array, kind, how)
    if isinstance(kept, Wrong):
        got, places = kept.got, np.flatnonzero(is_valid)[kept.places]
        raise BadRows(how.name, rows(places), lambda _: got, kept.expected)
    if array.null_count:
        kept = kept.take(pa.array(np.cumsum(is_valid) - 1, mask=~is_valid))
    return kept


def _kept(items: pa.Array, kind: pa.DataType, how: Keeping) -> pa.Array | Wrong:
    """Stores plain values, none of them null."""
    if kind in RANGES:
        return _texts_as_integers(items, kind) if is_text(items.type) else _integers(items, kind)
    return _floats(items, kind, how) if pa.types.is_floating(kind) else _texts(items, kind, how)


def _integers(items: pa.Array, kind: pa.DataType) -> pa.Array | Wrong:
    numbers = to_int64(items)
    if isinstance(numbers, Wrong):
        return numbers._replace(expected=f"{numbers.expected}, or the type double or string")
    if kind == pa.int64():
        return numbers
    is_signed = pa.types.is_signed_integer(items.type) or pa.types.is_floating(items.type)
    if is_signed or pa.types.is_decimal(items.type):
        is_below = pc.less(items.cast(pa.float64(), safe=False), 0.0)
        places = np.flatnonzero(is_below.to_numpy(zero_copy_only=False))
        if len(places):
            return Wrong(places, f"{items[int(places[0])]}", "a whole number from 0 on, or the type int")
    return numbers.view(kind)


def _texts_as_integers(items: pa.Array, kind: pa.DataType) -> pa.Array | Wrong:
    low, high = RANGES[kind]
    numbers = spelled(items.cast(pa.binary()))
    is_in_range = np.where(numbers.is_negative, numbers.sizes <= np.uint64(-low), numbers.sizes <= np.uint64(high))
    places = np.flatnonzero(~(numbers.is_number & is_in_range) | numbers.is_larger)
    if len(places):
        return Wrong(
            places, repr(items[int(places[0])].as_py()), f"a whole number from {low} to {high}, or the type string"
        )
    bits = np.where(numbers.is_negative, ~numbers.sizes + np.uint64(1), numbers.sizes)
    return pa.array(bits.view(kind.to_pandas_dtype()))


def _floats(items: pa.Array, kind: pa.DataType, how: Keeping) -> pa.Array | Wrong:
    is_of_text = is_text(items.type)
    doubles = _doubles_in(items) if is_of_text else items
    if isinstance(doubles, Wrong):
        return doubles
    numbers = to_float(doubles, kind)
    changed = rounded(doubles, numbers, from_text=is_of_text) if how.rounding == "error" else None
    if changed is not None:
        others = "int, double or string" if kind == pa.float32() else "int or string"
        return changed._replace(expected=f"{changed.expected}, or the type {others}, or rounding='allow'")
    is_too_large = np.isinf(numbers.to_numpy())
    if is_too_large.any():
        is_too_large &= ~np.isinf(to_float(doubles, pa.float64()).to_numpy())
    if is_too_large.any():
        places = np.flatnonzero(is_too_large)
        return Wrong(places, f"{doubles[int(places[0])]}", "a number that float32 holds, or the type double or string")
    return numbers


def _doubles_in(texts: pa.Array) -> pa.Array | Wrong:
    texts = pc.utf8_trim_whitespace(texts.cast(pa.binary()).cast(pa.string()))
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        places = uncastable(texts, pa.float64())
        return Wrong(places, repr(texts[int(places[0])].as_py()), "a number")


def _texts(items: pa.Array, kind: pa.DataType, how: Keeping) -> pa.Array | Wrong:
    if not is_text(items.type):
        return (_digits(items) if pa.types.is_floating(items.type) else items.cast(pa.string())).cast(kind)
    items = items.cast(pa.binary())
    try:
        return items.cast(kind)
    except pa.ArrowInvalid:
        if not how.is_given:
            raise NotTextError(how.name) from None
        places = np.flatnonzero([not is_utf8(text) for text in items.to_pylist()])
        return Wrong(places, repr(items[int(places[0])].as_py()), "a string of UTF-8, or the type binary")


def _digits(items: pa.Array) -> pa.Array:
    """Floats as text. Exact whole numbers are written as integers are, in digits only."""
    values = items.to_numpy().astype(np.float64)
    is_whole = (np.abs(values) < 2**53) & (values == np.trunc(values))
    whole = pa.array(np.where(is_whole, values, 0).astype(np.int64)).cast(pa.string())
    return pc.if_else(pa.array(is_whole), whole, items.cast(pa.string()))
