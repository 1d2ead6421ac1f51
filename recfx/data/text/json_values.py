"""Reads JSON lines one by one with the standard library, where Arrow does not read a block exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from recfx.data.exact_numbers import DIGITS, INT64_END, UINT64_END
from recfx.data.schema import is_list, is_text, item_type
from recfx.data.unit_rows import MOST_SHOWN, BadRow, UnitRows

__all__ = ["ColumnBuilder", "Fraction", "WrongValueError", "as_parsed", "integer", "parse"]

Objects = tuple[tuple[str, Any], ...]
Convert = Callable[[Any], Any]


class Fraction(str):
    """The text of a number with a point or an exponent, which a float may not represent exactly."""

    __slots__ = ()


class WrongValueError(ValueError):
    """A value that is not of its column's type."""

    def __init__(self, column: str, got: str, expected: str) -> None:
        super().__init__(column, got, expected)
        self.column, self.got, self.expected = column, got, expected


DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_float=Fraction)


def parse(line: bytes) -> Objects:
    """The names and values of the object in a line. Inner objects are tuples of pairs too, arrays are lists, and bytes
    that are not UTF-8 are surrogates, as in file names.

    Raises:   ValueError when the line is not one object.
    Example:  >>> parse(b'{"a": [1, 2.0], "b": {"c": null}}')
              (('a', [1, '2.0']), ('b', (('c', None),)))
    """
    text = line.decode(errors="surrogateescape")
    try:
        pairs = DECODER.decode(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is not a character
            json.dumps(pairs, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(pairs, tuple):
        raise ValueError(shown(pairs))
    return pairs


def as_parsed(value: Any) -> Any:
    """A Python object from Arrow, in the form of `parse`."""
    if isinstance(value, dict):
        return tuple((name, as_parsed(item)) for name, item in value.items())
    if isinstance(value, list):
        return [as_parsed(item) for item in value]
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


class ColumnBuilder:
    """Collects rows column by column, with each value converted to its column's type.

    Args:     rounded: columns in which a double may round a whole number.
    """

    def __init__(self, types: Mapping[str, pa.DataType], rounded: Collection[str] = ()) -> None:
        self._types = dict(types)
        self._place = _CurrentRow()
        self._numbers = {name: _Numbers(name in rounded, self._place) for name in types}
        self._convert = {name: _converter(name, kind, self._numbers[name]) for name, kind in types.items()}
        self._values: dict[str, list[Any]] = {name: [] for name in types}
        self._rows: list[int] = []

    def add(self, number: int, pairs: Objects) -> None:
        """Adds one row with its number. An absent name is null.

        Raises:   WrongValueError when a value has another type, or a name occurs twice; then nothing is added.
        """
        row: dict[str, Any] = {}
        self._place.row = number
        for name, value in pairs:
            if name in self._types:
                if name in row:
                    raise WrongValueError(name, "this name twice", "a value")
                row[name] = self._convert[name](value)
        self._rows.append(number)
        for name, values in self._values.items():
            values.append(row.get(name))

    def rows(self) -> UnitRows:
        """All rows. Integers beyond int64 make a column uint64; if it has negative numbers too, their rows are bad."""
        bad: dict[int, BadRow] = {}
        for name, seen in self._numbers.items():
            for row, value in seen.large.items() if seen.is_negative else ():
                bad.setdefault(row, BadRow(row, name, str(value), "int64, since the column has negative numbers too"))
        arrays = [self._array(name, kind, bad) for name, kind in self._types.items()]
        numbers = np.array([row for row in self._rows if row not in bad], dtype=np.int64)
        return UnitRows(pa.RecordBatch.from_arrays(arrays, list(self._types)), numbers, list(bad.values()))

    def _array(self, name: str, kind: pa.DataType, bad: Collection[int]) -> pa.Array:
        values, seen = self._values[name], self._numbers[name]
        if bad:
            values = [value for row, value in zip(self._rows, values, strict=True) if row not in bad]
        if seen.is_negative or seen.large:
            kind = _with_integers(kind, pa.int64() if seen.is_negative else pa.uint64())
        return pa.array(values, kind)


class _CurrentRow:
    row = 0


class _Numbers:
    """The integers of a column so far, and whether a double may round a whole number."""

    def __init__(self, may_round: bool, place: _CurrentRow) -> None:
        self.may_round, self._place = may_round, place
        self.is_negative = False
        self.large: dict[int, int] = {}  # by row

    def note(self, value: int) -> int:
        if value < 0:
            self.is_negative = True
        elif value >= INT64_END:
            self.large[self._place.row] = value
        return value


def _converter(name: str, kind: pa.DataType, seen: _Numbers) -> Convert:
    """A function from JSON values to values for `pa.array`; None stays None. It raises WrongValueError."""
    if pa.types.is_map(kind):
        convert = _map(name, kind, seen)
    elif is_list(kind):
        convert = _list(_converter(name, item_type(kind), seen))
    elif pa.types.is_struct(kind):
        convert = _struct(name, kind, seen)
    elif is_text(kind):
        convert = _text(name, kind)
    else:
        convert = _plain(name, kind, seen)
    return lambda value: None if value is None else convert(value)


def _map(name: str, kind: pa.DataType, seen: _Numbers) -> Convert:
    key_of = _converter(name, kind.key_type, seen)
    value_of = _converter(name, kind.item_type, seen)
    is_number = pa.types.is_integer(kind.key_type)

    def convert(value: Any) -> list[tuple]:
        if not isinstance(value, tuple):
            raise WrongValueError(name, shown(value), f"an object, {kind}")
        if len({key for key, _ in value}) < len(value):
            raise WrongValueError(name, "an object with a name twice", f"{kind}")
        for key, _ in value:
            if is_number and not DIGITS.fullmatch(key):
                raise WrongValueError(name, f"the name {shown(key)}", f"{kind.key_type}")
        return [(key_of(int(key) if is_number else key), value_of(item)) for key, item in value]

    return convert


def _list(item_of: Convert) -> Convert:
    return lambda value: [item_of(item) for item in value] if isinstance(value, list) else [item_of(value)]


def _struct(name: str, kind: pa.StructType, seen: _Numbers) -> Convert:
    fields = {field.name: _converter(f"{name}.{field.name}", field.type, seen) for field in kind}

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, tuple):
            raise WrongValueError(name, shown(value), f"an object, {kind}")
        row: dict[str, Any] = {}
        for key, item in value:
            if key in fields:
                if key in row:
                    raise WrongValueError(f"{name}.{key}", "this name twice", "a value")
                row[key] = fields[key](item)
        return row

    return convert


def _text(name: str, kind: pa.DataType) -> Convert:
    how = "surrogateescape" if pa.types.is_binary(kind) else "strict"

    def convert(value: Any) -> bytes:
        if type(value) is int:
            return str(value).encode()
        if type(value) is not str:
            raise WrongValueError(name, shown(value), f"{kind}")
        try:
            return value.encode(errors=how)
        except UnicodeEncodeError as error:
            raise WrongValueError(name, f"{shown(value)}, which is not UTF-8", f"{kind}") from error

    return convert


def _plain(name: str, kind: pa.DataType, seen: _Numbers) -> Convert:
    def convert(value: Any) -> Any:
        if pa.types.is_integer(kind):
            if (number := integer(value)) is not None:
                return seen.note(number)
        elif pa.types.is_floating(kind):
            if (real := _real(value, seen.may_round)) is not None:
                return real
        elif pa.types.is_boolean(kind) and type(value) is bool:
            return value
        raise WrongValueError(name, shown(value), f"{kind}" if kind != pa.null() else "null, as in the first rows")

    return convert


def integer(value: Any) -> int | None:
    """The value if it is a whole number of 64 bits, such as 3, 3.0 or 3e0; else None."""
    if type(value) is Fraction:
        try:
            number = Decimal(value)
        except ArithmeticError:  # an exponent of 20 digits
            return None
        if not -INT64_END <= number < UINT64_END or (value := int(number)) != number:
            return None
    return value if type(value) is int and -INT64_END <= value < UINT64_END else None


def _real(value: Any, may_round: bool) -> float | None:
    """The value as a double; None when it is out of range, or a whole number that would be rounded."""
    if type(value) is int:
        return float(value) if abs(value) < 1 << 1023 and (may_round or int(float(value)) == value) else None
    if type(value) is Fraction:
        return real if math.isfinite(real := float(value)) else None
    return float(value) if type(value) in (float, bool) else None


def _with_integers(kind: pa.DataType, integer: pa.DataType) -> pa.DataType:
    """The type, with `integer` in place of its integer types."""
    if pa.types.is_map(kind):
        return pa.map_(_with_integers(kind.key_type, integer), _with_integers(kind.item_type, integer))
    if is_list(kind):
        return pa.list_(_with_integers(kind.value_type, integer))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _with_integers(field.type, integer)) for field in kind])
    return integer if pa.types.is_integer(kind) else kind


def shown(value: Any) -> str:
    """A JSON value in a few words, for an error."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, tuple):
        return "an object"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(value) if type(value) is str else str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."
