"""Converts Python values, such as parsed JSON, to an Arrow array that a column can be read from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recfx.checks import said
from recfx.data.columns import Column, FixedLen, VarLen
from recfx.data.exact_numbers import DIGITS, EXACT_DOUBLE, INT64_END, UINT64_END
from recfx.data.files import quoted
from recfx.data.schema import PAIRS, check_schema, type_at

__all__ = ["by_arrow", "values_array"]

NULL, LISTS = {type(None)}, {list, tuple, type(None)}
TEXT: set[type] = {str, bytes}
WHOLE: set[type] = {int}
NUMBERS: set[type] = {int, float}

Leaf = Callable[[Any], Any]


class _WrongValueError(ValueError):
    def __init__(self, value: Any, expected: str) -> None:
        super().__init__(value, expected)
        self.got, self.expected = _shown(value), expected


def values_array(values: Sequence[Any], column: Column | None, name: str, where: str) -> pa.Array:
    """An array with a value for each row, of a type that the column can be read from; None is null.

    Values are numbers and strings, or lists of them, of Python or numpy. A plain value in a column of lists is a list
    of one value; a whole number in a column of strings becomes its decimal digits. A weighted list holds pairs (value,
    weight) or objects {"k": value, "v": weight} (or key and value, id and weight, value and weight), or is one object
    of weights by value.

    Args:     column: None: the type is that of the values.
              where: the source of the values, `ARRAYS` or `ROWS`, for the error.
    Raises:   ValueError naming the first row with another value.
    """
    if column is None:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            got = str(error).splitlines()[0]
            raise ValueError(f"column '{name}' of {quoted(where)}: got {got!r}, expected values of one type.") from None
    array = by_arrow(values, column)
    if array is not None:
        return array
    convert = functools.partial(_row, column=column, leaf=_leaf_of(column))
    rows = []
    for row, value in enumerate(values):
        try:
            rows.append(convert(value))
        except _WrongValueError as wrong:
            raise ValueError(
                f"column '{name}' of {quoted(where)}, row {row}: got {wrong.got}, expected {wrong.expected}."
            ) from None
    return pa.array(rows, _type_of(rows, column, name, where))


def by_arrow(values: Sequence[Any], column: Column) -> pa.Array | None:
    """The array of `values_array`, where Arrow can convert such values directly; None where each must be checked.

    Cost:     one pass over the types. Arrow itself would guess the type, and look for pandas each time.
    """
    if _is_weighted(column):
        return None
    items: Sequence[Any] = values
    kinds, depth = set(map(type, items)) - NULL, 0
    while kinds and kinds <= LISTS and depth < column.depth:
        items = list(itertools.chain.from_iterable(item for item in items if item is not None))
        kinds, depth = set(map(type, items)), depth + 1
    takes: set[type] = TEXT if _is_text(column) else NUMBERS if column.item == pa.float32() else WHOLE
    kind = pa.binary() if takes is TEXT else pa.int64() if kinds <= WHOLE else pa.float64()
    if not kinds and not depth:
        return pa.nulls(len(values))
    has_depth = depth == column.depth or (depth == 0 and column.depth == 1)
    for _ in range(depth if has_depth else 0):
        kind = pa.list_(kind)
    try:
        if has_depth and kinds <= takes:
            return pa.array(values, kind)
        if kinds == {np.ndarray}:
            array = pa.array(values)
            return array if _reads(array.type, column) else None
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return None


@functools.lru_cache(maxsize=4096)
def _reads(kind: pa.DataType, column: Column) -> bool:
    """Whether the column can be read from this type."""
    try:
        check_schema("", pa.schema([(column.name, kind)]), [column])
    except ValueError:
        return False
    return type_at(pa.schema([(column.name, kind)]), column.name) == kind


def _is_weighted(column: Column) -> bool:
    return isinstance(column, VarLen) and column.weighted


def _is_text(column: Column) -> bool:
    return column.item == pa.binary() or (isinstance(column, VarLen) and column.string_hash is not None)


def _row(value: Any, column: Column, leaf: Leaf) -> Any:
    """Lists nested as deep as the column, or None."""
    return None if _is_null(value) else _lists(value, column, leaf, column.depth)


def _is_null(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # pandas.NA


def _lists(value: Any, column: Column, leaf: Leaf, depth: int) -> list:
    if depth == 1 and _is_weighted(column):
        return [_pair(item, leaf) for item in _kept(_pairs_of(value), column)]
    if _is_list(value):
        if depth > 1:
            return [_lists(item, column, leaf, depth - 1) for item in value]
        return [leaf(item) for item in _kept(value, column)]
    if column.depth > 1:
        raise _WrongValueError(value, f"lists in lists, {column.depth} deep")
    return [leaf(value)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _kept(items: Sequence[Any], column: Column) -> Sequence[Any]:
    """The items that the column reads; the others are not checked."""
    if isinstance(column, FixedLen) or column.truncate is None:
        return items
    num = min(column.truncate, len(items))
    return items[len(items) - num :] if column.side == "left" else items[:num]


def _pairs_of(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.items())
    if not _is_list(value):
        raise _WrongValueError(value, "a list of values with weights, or an object of weights by value")
    return value


def _pair(item: Any, leaf: Leaf) -> dict[str, Any]:
    if isinstance(item, Mapping):
        names = next((names for names in PAIRS if item.keys() == set(names)), None)
        if names is None:
            raise _WrongValueError(item, 'an object such as {"k": value, "v": weight}')
        item = [item[name] for name in names]
    if not _is_list(item) or len(item) != 2:
        raise _WrongValueError(item, "a pair, a value and its weight")
    return {"value": leaf(item[0]), "weight": _real(item[1])}


def _leaf_of(column: Column | None) -> Leaf:
    assert column is not None
    if _is_text(column):
        return _text
    if column.item == pa.float32():
        return functools.partial(_real, may_round=column.rounding == "allow")
    return _id_of_name if _is_weighted(column) else _id


def _text(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise _WrongValueError(value, "text of whole characters") from None
    if _is_whole_type(value):
        return str(int(value)).encode()
    raise _WrongValueError(value, "a string")


def _id_of_name(value: Any) -> int:
    """An id that may be a name in a JSON object of weights, where names are strings."""
    return _id(int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else value)


def _id(value: Any) -> int:
    if _is_whole_type(value) and -INT64_END <= value < UINT64_END:
        return int(value)
    if isinstance(value, float | np.floating) and abs(number := float(value)) < EXACT_DOUBLE and number.is_integer():
        return int(number)
    raise _WrongValueError(value, "an integer of 64 bits")


def _is_whole_type(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _real(value: Any, may_round: bool = False) -> float:
    if isinstance(value, float | np.floating | bool | np.bool_):
        return float(value)
    if _is_whole_type(value) and abs(int(value)) < 1 << 1023 and (may_round or int(float(value)) == value):
        return float(value)
    raise _WrongValueError(value, "a number that float32 holds")


def _shown(value: Any) -> str:
    is_number = isinstance(value, np.generic)
    return "a null element" if _is_null(value) else said(value.item() if is_number else value)


def _type_of(rows: Sequence[Any], column: Column | None, name: str, where: str) -> pa.DataType:
    assert column is not None
    if _is_text(column):
        item = pa.binary()
    elif column.item == pa.int64():
        item = _integers(rows, column, name, where)
    else:
        item = pa.float64()
    if _is_weighted(column):
        item = pa.struct([("value", item), ("weight", pa.float64())])
    for _ in range(column.depth):
        item = pa.list_(item)
    return item


def _integers(rows: Sequence[Any], column: Column, name: str, where: str) -> pa.DataType:
    """uint64 where a number exceeds int64, else int64."""
    low, high, low_row = 0, 0, 0
    for i, row in enumerate(rows):
        for number in _leaves(row, column.depth, _is_weighted(column)):
            low, low_row = (number, i) if number < low else (low, low_row)
            high = max(high, number)
    if high >= INT64_END and low < 0:
        raise ValueError(
            f"column '{name}' of {quoted(where)}, row {low_row}: got {low}, expected no number below 0, since the "
            f"column also holds {high}. Together they need more than 64 bits: two ids would become one."
        )
    return pa.uint64() if high >= INT64_END else pa.int64()


def _leaves(value: Any, depth: int, weighted: bool) -> Any:
    if depth:
        for item in value or ():
            yield from _leaves(item, depth - 1, weighted)
    else:
        yield value["value"] if weighted else value
