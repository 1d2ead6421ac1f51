"""Converts CSV cells, as bytes, to values: exact numbers, lists, weights; and guesses the type of a column."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.exact_numbers import EXACT_DOUBLE, uncastable

__all__ = ["Cells", "guess", "is_fast", "may_be_rounded", "read_cells"]

WHOLE, UNSIGNED = r"^-?(0|[1-9][0-9]*)$", r"^(0|[1-9][0-9]*)$"  # one spelling for each number, except -0
BOOLEANS = (r"^(true|false)$", r"^(True|False)$", r"^(TRUE|FALSE)$")
DECIMAL = (  # 1e-05 is how Python and Arrow write 0.00001; other exponents without a point may be codes
    r"^(-?((0|[1-9][0-9]*)(\.[0-9]*([eE][+-]?[0-9]+)?)?|\.[0-9]+([eE][+-]?[0-9]+)?|[1-9]e[+-][0-9]{2,3}|inf)|nan|NaN)$"
)
TIMES = (pa.date32(), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.timestamp("ns", "UTC"))
DOUBLE = pa.float64()
NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Cells:
    """How the cells of a column are read.

    Args:     item: the type of a value.
              pattern: a regex that every value must match, when `item` was guessed; None: the caller gave the type.
              separator, weight_separator: between the items of a list, and between an item and its weight.
              weight: the type of a weight.
    """

    item: pa.DataType
    pattern: str | None = None
    separator: str | None = None
    weight_separator: str | None = None
    is_guessed: bool = False
    weight: pa.DataType = DOUBLE

    @property
    def type(self) -> pa.DataType:
        """The type of the column."""
        if self.weight_separator is not None:
            return pa.list_(pa.struct([("k", self.item), ("v", self.weight)]))
        return self.item if self.separator is None else pa.list_(self.item)

    @property
    def fast(self) -> pa.DataType | None:
        """The type in which pyarrow's parser reads the cells; None: it cannot read them."""
        is_plain = not self.is_guessed and self.separator is None and self.weight_separator is None
        return self.item if is_plain else None


def guess(
    cells: pa.Array,
    nulls: pa.Array,
    *,
    separator: str | None,
    weight_separator: str | None,
    is_named: tuple[bool, bool],
) -> Cells:
    """Guesses how to read a column: as a type whose values are spelled exactly like the cells, as numbers with a point,
    or else as text.

    Args:     cells: binary; of the first rows.
              is_named: whether the caller named this column for the separator, and for the weight separator; other
                  columns are split only when they are text, and weighted only when every item has a weight.
    """
    kind, pattern = _guess(cells)
    is_text = kind in (pa.string(), pa.binary())
    if not (separator and (is_named[0] or is_text)):
        separator = None
    if not (weight_separator and (is_named[1] or (is_text and separator is not None))):
        weight_separator = None
    if separator is None and weight_separator is None:
        return Cells(kind, pattern, is_guessed=True)
    items, _ = _items(cells, separator, nulls)
    if weight_separator is not None:
        keys, weights = _weighted(items, weight_separator)
        if is_named[1] or (weights.null_count == items.null_count and not len(_float64(_trimmed(weights))[1])):
            return Cells(*_guess(keys), separator, weight_separator, is_guessed=True)
    return Cells(*_guess(items), separator, is_guessed=True)


def read_cells(cells: pa.Array, how: Cells, nulls: pa.Array) -> tuple[pa.Array, dict[int, bytes]]:
    """The column in its type, and by row number the cells or items that have another type; their values are
    meaningless. A missing list is empty.

    Args:     cells: binary.
    """
    if how.separator is None and how.weight_separator is None:
        values, wrong = _values(cells, how.item, how.pattern)
        return values, {int(i): cells[int(i)].as_py() for i in wrong}
    items, offsets = _items(cells, how.separator, nulls)
    if how.weight_separator is None:
        values, wrong = _values(items, how.item, how.pattern)
    else:
        keys, weights = _weighted(items, how.weight_separator)
        ids, wrong = _values(keys, how.item, how.pattern)
        numbers, no_weights = _values(weights, how.weight, None)
        numbers = pc.if_else(pc.and_(weights.is_null(), items.is_valid()), pa.scalar(1.0, how.weight), numbers)
        values = pa.StructArray.from_arrays([ids, numbers], ["k", "v"], mask=items.is_null())
        wrong = np.union1d(wrong, no_weights)
    rows = np.searchsorted(offsets, wrong, side="right") - 1
    lists = pa.ListArray.from_arrays(pa.array(offsets), values)
    return lists, {int(row): items[int(i)].as_py() for row, i in zip(rows[::-1], wrong[::-1], strict=True)}


def is_fast(cells: pa.Array, kind: pa.DataType) -> bool:
    """Whether pyarrow's parser reads these cells exactly."""
    text = cells if kind in (pa.binary(), pa.string()) else _trimmed(cells)
    try:
        values = text.cast(kind)
    except pa.ArrowInvalid:
        return False
    return kind != pa.float64() or not may_be_rounded(values)


def may_be_rounded(numbers: pa.Array) -> bool:
    """Whether float64 may have rounded whole numbers among the cells of a column."""
    limits = pc.min_max(numbers)
    return any((limit.as_py() or 0) >= EXACT_DOUBLE for limit in (limits["max"], pc.negate(limits["min"])))


def _items(cells: pa.Array, separator: str | None, nulls: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The items of the cells, end to end, and the offsets of the cells: i32 [cells + 1]."""
    if separator is None:
        lengths, items = cells.is_valid().to_numpy(zero_copy_only=False), cells.drop_null()
    else:
        lists = pc.split_pattern(cells, separator)
        lengths, items = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), lists.flatten()
    if len(nulls):
        items = pc.if_else(pc.is_in(items, value_set=nulls), pa.scalar(None, pa.binary()), items)
    return items, np.append(0, np.cumsum(lengths)).astype(np.int32)


def _weighted(items: pa.Array, separator: str) -> tuple[pa.Array, pa.Array]:
    """The items without their weights, and the weights, null for items without one."""
    parts = pc.split_pattern(items, separator, max_splits=1, reverse=True)
    has_weight = pc.equal(pc.list_value_length(parts), 2).fill_null(False).to_numpy(zero_copy_only=False)
    places = np.where(items.is_valid().to_numpy(zero_copy_only=False), parts.offsets.to_numpy()[:-1], 0)
    missing = items.is_null().to_numpy(zero_copy_only=False)
    keys = parts.values.take(pa.array(places, mask=missing))
    return keys, parts.values.take(pa.array(places + 1, mask=~has_weight))


def _values(cells: pa.Array, kind: pa.DataType, pattern: str | None) -> tuple[pa.Array, np.ndarray]:
    """The cells as values, and the places of cells of another type."""
    if pa.types.is_null(kind):
        return pa.nulls(len(cells)), _places(cells.is_valid())
    if kind in (pa.binary(), pa.string()):
        return _cast(cells, kind)
    if pattern is not None:
        return _guessed(cells.view(pa.string()), kind, pattern)
    text = _trimmed(cells)
    if kind == pa.int64():
        return _int64(text)
    return _float64(text) if kind == pa.float64() else _cast(text, kind)


def _trimmed(cells: pa.Array) -> pa.Array:
    """The cells as text, without the blanks that pyarrow's parser ignores."""
    return pc.ascii_trim(cells.view(pa.string()), characters=" \t")


def _guessed(text: pa.Array, kind: pa.DataType, pattern: str) -> tuple[pa.Array, np.ndarray]:
    if pa.types.is_integer(kind):
        try:
            values = text.cast(kind)
            if _is_canonical(text, values):
                return values, NO_ROWS
        except pa.ArrowInvalid:
            pass
    other = _places(pc.invert(pc.match_substring_regex(text, pattern)))
    text = _without(text, other)
    values, wrong = _float64(text, EXACT_DOUBLE) if kind == pa.float64() else _cast(text, kind)
    return values, np.union1d(wrong, other)


def _is_canonical(text: pa.Array, values: pa.Array) -> bool:
    """Whether all texts are decimals without leading zeros, given that they spell these whole numbers: other decimals
    are longer. Hexadecimal numbers may be as short."""
    _, offsets, data = text.buffers()
    if data is None:
        return True
    ends = np.frombuffer(offsets, np.int32)
    begin, end = ends[text.offset], ends[text.offset + len(text)]
    letters = np.frombuffer(data, np.uint8)[begin:end]
    numbers = values.drop_null().to_numpy()
    sizes = np.abs(numbers).view(np.uint64)
    num_letters = len(numbers) + np.count_nonzero(numbers < 0)
    for power in range(1, 20):
        longer = np.count_nonzero(sizes >= np.uint64(10**power))
        if not longer:
            break
        num_letters += longer
    return num_letters == end - begin and not bool(np.any((letters | 32) == ord("x")))


def _int64(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Whole numbers up to 2**64 - 1, those above 2**63 - 1 as the same 64 bits. A point and zeros may follow.

    A number from 2**63 on is wrong when a negative number in the column has the same bits.
    """
    try:
        return text.cast(pa.int64()), NO_ROWS
    except pa.ArrowInvalid:
        text = pc.replace_substring_regex(text, r"^(-?[0-9]+)\.0+$", r"\1")
        is_negative, none = pc.starts_with(text, "-"), pa.scalar(None, pa.string())
        negative, wrong = _cast(pc.if_else(is_negative, text, none), pa.int64())
        other, also_wrong = _cast(pc.if_else(is_negative, none, text), pa.uint64())
        values = pc.coalesce(negative, other.view(pa.int64()))
        is_wrong_too = pc.and_(pc.less(other.view(pa.int64()), 0), pc.is_in(values, value_set=negative.drop_null()))
        return values, np.union1d(np.union1d(wrong, also_wrong), _places(is_wrong_too))


def _float64(text: pa.Array, most: int | None = None) -> tuple[pa.Array, np.ndarray]:
    """Numbers. A whole number in decimal digits must be exact and at most `most`."""
    numbers, wrong = _cast(text, pa.float64())
    large = _places(pc.greater_equal(pc.abs(numbers), float(EXACT_DOUBLE)))
    inexact = [i for i in large.tolist() if not _is_exact(text[i].as_py(), most)]
    return numbers, np.union1d(wrong, inexact).astype(np.int64)


def _is_exact(text: str, most: int | None) -> bool:
    """Whether float64 represents this whole number in decimal digits exactly; True for any other text."""
    found = re.fullmatch(r"[+-]?([0-9]+)(\.0*)?", text)
    if found is None:
        return True
    number = int(found[1]) if len(found[1]) < 400 else 10**400  # int() rejects thousands of digits
    return number <= most if most is not None else number < 2**1023 and int(float(number)) == number


def _cast(text: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """The values, null where a text cannot be cast, and these places."""
    try:
        return text.cast(kind), NO_ROWS
    except pa.ArrowInvalid:
        wrong = uncastable(text, kind)
        return _without(text, wrong).cast(kind), wrong


def _without(text: pa.Array, places: np.ndarray) -> pa.Array:
    """The text with null in these places."""
    if not len(places):
        return text
    mask = np.zeros(len(text), dtype=bool)
    mask[places] = True
    return pc.if_else(pa.array(mask), pa.scalar(None, text.type), text)


def _places(flags: pa.Array) -> np.ndarray:
    return np.flatnonzero(flags.fill_null(False).to_numpy(zero_copy_only=False))


def _guess(cells: pa.Array) -> tuple[pa.DataType, str | None]:
    """Type and pattern of the values that are not null."""
    cells = cells.drop_null()
    if not len(cells):
        return pa.null(), None
    try:
        text = cells.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.binary(), None
    for kind, pattern in _candidates(text[0].as_py()):
        if all(_fits(part, kind, pattern) for part in (text.slice(0, 1), text.slice(0, 100), text)):
            is_text = kind == pa.float64() and not pc.any(pc.match_substring(text, ".")).as_py()
            return (pa.string(), None) if is_text else (kind, pattern)
    return pa.string(), None


def _candidates(first: str) -> Iterator[tuple[pa.DataType, str]]:
    yield pa.int64(), WHOLE
    yield pa.uint64(), UNSIGNED
    for pattern in BOOLEANS:
        yield pa.bool_(), pattern
    if re.fullmatch(r"[0-9:.TZ -]+", first):  # times, all in the first one's shape: no two spellings of one time
        shape = re.sub("[0-9]", "[0-9]", first.replace(".", r"\."))
        for kind in TIMES:
            yield kind, f"^{shape}$"
    yield pa.float64(), DECIMAL


def _fits(text: pa.Array, kind: pa.DataType, pattern: str) -> bool:
    _, wrong = _guessed(text, kind, pattern)
    return not len(wrong)
