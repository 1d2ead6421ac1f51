"""The Arrow types of JSON lines: guessed from the first rows, or specified by a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from recfx.data.columns import Column, FixedLen
from recfx.data.exact_numbers import INT64_END, UINT64_END
from recfx.data.schema import PAIRS, is_list, is_text, item_type, path_to
from recfx.data.text.json_values import Fraction, integer, parse

__all__ = ["guess", "item_of", "overridden", "with_columns"]

MAX_FIELDS = 1000  # of an object; an object of more names is a map
MAX_DEPTH = 32


def guess(lines: Iterable[bytes], *, keep_all: bool) -> pa.Schema:
    """The types of all names in these lines, in order of appearance. Lines that are not JSON are ignored.

    Args:     keep_all: integers become text when a name also has texts, or integers that fit neither int64 nor
                  uint64. Otherwise the type is that of most values, and the other values are bad.
    Example:  >>> guess([b'{"a": 1, "b": [0.5]}', b'{"a": 18446744073709551615}'], keep_all=True).types
              [DataType(uint64), ListType(list<item: double>)]
    """
    whole = _Shape()
    for line in lines:
        try:
            whole.add(parse(line), 0)
        except ValueError:
            continue
    return pa.schema([(name, shape.type(keep_all)) for name, shape in whole.fields.items()])


class _Shape:
    """The values seen so far under one name."""

    def __init__(self) -> None:
        self.kinds: Counter[type] = Counter()
        self.low = self.high = 0  # of integers
        self.is_whole = True  # every fraction
        self.fields: dict[str, _Shape] = {}
        self.item: _Shape | None = None

    def add(self, value: Any, depth: int) -> None:
        if value is None or depth > MAX_DEPTH:
            return
        kind = type(value)
        self.kinds[kind] += 1
        if kind is list:
            self.item = self.item or _Shape()
            for item in value:
                self.item.add(item, depth + 1)
        elif kind is tuple:
            for name, item in value:
                self.fields.setdefault(name, _Shape()).add(item, depth + 1)
        elif kind is int:
            self.low, self.high = min(self.low, value), max(self.high, value)
        elif kind is Fraction:
            self.is_whole = self.is_whole and integer(value) is not None

    def type(self, keep_all: bool) -> pa.DataType:
        """The type. It is a list when any value was one: the other values are then lists of length 1."""
        if self.item is not None:
            return pa.list_(self.item.type(keep_all)) if self.item.kinds else pa.list_(self._plain(keep_all))
        if not self.fields or self.kinds[tuple] * 2 < self.kinds.total():
            return self._plain(keep_all)
        if len(self.fields) <= MAX_FIELDS:
            pair = next((pair for pair in PAIRS if set(pair) == self.fields.keys()), None)
            return pa.struct([(name, self.fields[name].type(keep_all)) for name in pair or self.fields])
        kinds = {shape.type(keep_all) for shape in self.fields.values()} - {pa.null()}
        return pa.map_(pa.string(), kinds.pop() if len(kinds) == 1 else pa.float64())

    def _plain(self, keep_all: bool) -> pa.DataType:
        num_numbers = self.kinds[int] + self.kinds[Fraction] + self.kinds[float]
        if self.kinds[str] and (keep_all or self.kinds[str] > max(num_numbers, self.kinds[bool])):
            return pa.string()
        if self.kinds[bool] > num_numbers:
            return pa.bool_()
        if self.kinds[float] or (self.kinds[Fraction] and not (self.kinds[int] and self.is_whole)):
            return pa.float64()
        if not self.kinds[int]:
            return pa.null()
        if self.high < INT64_END and self.low >= -INT64_END:
            return pa.int64()
        if self.low >= 0 and self.high < UINT64_END:
            return pa.uint64()
        return pa.string() if keep_all else pa.int64()


def overridden(schema: pa.Schema, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """The schema with these types; for a column of lists, of its items."""
    fields = {field.name: field.type for field in schema}
    for name, kind in types.items():
        fields[name] = _with_item(fields.get(name, kind), kind)
    return pa.schema(list(fields.items()))


def _with_item(kind: pa.DataType, item: pa.DataType) -> pa.DataType:
    is_plain_list = is_list(kind) and not pa.types.is_map(kind) and not is_list(item)
    return pa.list_(_with_item(kind.value_type, item)) if is_plain_list else item


def with_columns(schema: pa.Schema, columns: Sequence[Column]) -> pa.Schema:
    """The schema with each column in the type that it is read from, where its values allow it. A column that is absent
    is null in these rows."""
    fields = {field.name: field.type for field in schema}
    for column in columns:
        _put(fields, column.name, column)
    return pa.schema(list(fields.items()))


def _put(fields: dict[str, pa.DataType], name: str, column: Column) -> None:
    """Sets the type of a dotted name, as `path_to` finds it. Missing structs are added."""
    path = path_to(pa.schema(list(fields.items())), name)
    outer = path[0] if path else name if "." not in name else _struct_for(fields, name)
    if outer == name:
        fields[name] = _type_for(column, fields.get(name, pa.null()))
        return
    kind = fields.get(outer, pa.null())
    if pa.types.is_struct(kind) or pa.types.is_null(kind):
        inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
        _put(inner, name.removeprefix(f"{outer}."), column)
        fields[outer] = pa.struct(list(inner.items()))


def _struct_for(fields: Mapping[str, pa.DataType], name: str) -> str:
    known = [n for n, kind in fields.items() if pa.types.is_struct(kind) and name.startswith(f"{n}.")]
    return known[0] if known else name.partition(".")[0]


def _type_for(column: Column, kind: pa.DataType) -> pa.DataType:
    """The type that the column is read from, given the guessed type of its values; the guess where it cannot be."""
    if not isinstance(column, FixedLen) and column.weighted:
        return _weighted(column, kind, column.depth)
    depth, leaf = 0, kind
    while is_list(leaf) and not pa.types.is_map(leaf):
        depth, leaf = depth + 1, item_type(leaf)
    if pa.types.is_null(leaf):
        depth, leaf = max(depth, column.depth), item_of(column)
    elif is_text(item_of(column)):
        leaf = pa.binary() if is_text(leaf) or pa.types.is_integer(leaf) else leaf
    elif pa.types.is_integer(leaf) or pa.types.is_floating(leaf):
        leaf = leaf if leaf == pa.uint64() and column.item == pa.int64() else item_of(column)
    for _ in range(depth):
        leaf = pa.list_(leaf)
    return leaf


def _weighted(column: Column, kind: pa.DataType, depth: int) -> pa.DataType:
    """As `_type_for`, for a weighted column: lists of pairs (value, weight), or objects of weights by value."""
    if pa.types.is_map(kind) or (pa.types.is_struct(kind) and depth == 1):
        return pa.map_(item_of(column), pa.float64())
    if pa.types.is_null(kind):
        kind = pa.list_(pa.null())
    if not is_list(kind):
        return kind
    if depth > 1:
        return pa.list_(_weighted(column, kind.value_type, depth - 1))
    item = kind.value_type
    if pa.types.is_null(item):
        item = pa.struct([("k", pa.null()), ("v", pa.null())])
    if not pa.types.is_struct(item):
        return kind
    names = {field.name for field in item}
    pair = next((pair for pair in PAIRS if names >= set(pair)), tuple(field.name for field in item))
    if len(pair) != 2:
        return kind
    key = item.field(pair[0]).type
    fits = pa.types.is_null(key) or is_text(key) == is_text(item_of(column)) or pa.types.is_integer(key)
    return pa.list_(pa.struct([(pair[0], item_of(column) if fits else key), (pair[1], pa.float64())]))


def item_of(column: Column) -> pa.DataType:
    """The type in which text is read for this column: bytes for strings, so that rows that are not UTF-8 are kept, and
    double for floats."""
    if column.item == pa.binary() or getattr(column, "string_hash", None) is not None:
        return pa.binary()
    return pa.int64() if column.item == pa.int64() else pa.float64()
