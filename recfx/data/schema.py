"""Which Arrow types a column can be read from, and one view of all of Arrow's list types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.columns import Column, VarLen
from recfx.data.files import quoted

__all__ = [
    "PAIRS",
    "as_list",
    "check_schema",
    "column_at",
    "decoded",
    "is_list",
    "is_plain",
    "is_text",
    "item_type",
    "map_leaves",
    "packed_list",
    "path_to",
    "type_at",
    "typed",
    "without_views",
]

PAIRS = (("k", "v"), ("key", "value"), ("id", "weight"), ("value", "weight"))  # names of a value and its weight
LISTS = frozenset({
    pa.lib.Type_LIST, pa.lib.Type_LARGE_LIST, pa.lib.Type_FIXED_SIZE_LIST,
    pa.lib.Type_LIST_VIEW, pa.lib.Type_LARGE_LIST_VIEW, pa.lib.Type_MAP,
})  # fmt: skip


ODD = frozenset({pa.lib.Type_NA, pa.lib.Type_STRING_VIEW, pa.lib.Type_BINARY_VIEW})


def check_schema(path: str, schema: pa.Schema, columns: Sequence[Column]) -> None:
    """Raises ValueError, naming file and column, when a required column is absent or a column has another type."""
    for column in columns:
        if (count := len(schema.get_all_field_indices(column.name))) > 1:
            raise ValueError(
                f"column '{column.name}' of {quoted(path)}: got {count} columns of this name, expected one."
            )
        kind = type_at(schema, column.name)
        if kind is None:
            if column.missing == "empty":
                continue
            raise ValueError(
                f"column '{column.name}' of {quoted(path)}: got no such column, expected one of {_names(schema)}. With "
                "missing='empty' for the column its rows are empty in a file that does not have it."
            )
        depth, item = _depth(kind)
        has_depth = depth == column.depth or (depth == 0 and column.depth == 1)
        if not (_is_read_as(item, column) and has_depth) and not (pa.types.is_null(item) and depth <= column.depth):
            expected = f"{_expected(column)}.{_hint(kind, item, column)}"
            raise ValueError(f"column '{column.name}' of {quoted(path)}: got {kind}, expected {expected}")


def path_to(fields: pa.Schema | pa.StructType, name: str) -> list[str]:
    """The path of a dotted name: a column of exactly this name, or fields within structs. Empty: not found. A
    column of Arrow's null type may be a struct that is null in every row.

    Example:  >>> path_to(pa.schema({"user": pa.struct({"age": pa.int8()})}), "user.age")
              ['user', 'age']
    """
    if fields.get_all_field_indices(name):
        return [name]
    for field in fields if "." in name else ():
        if pa.types.is_null(field.type) and name.startswith(f"{field.name}."):
            return [field.name]
        if pa.types.is_struct(field.type) and name.startswith(f"{field.name}."):
            inner = path_to(field.type, name.removeprefix(f"{field.name}."))
            if inner:
                return [field.name, *inner]
    return []


def type_at(schema: pa.Schema, name: str) -> pa.DataType | None:
    """The type of a column or of a field within structs, see `path_to`; None: not found."""
    kind: Any = schema
    for part in path_to(schema, name):
        kind = kind.field(part).type
    return None if kind is schema else kind


def column_at(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or a field within structs; the field is null where one of them is."""
    column, *fields = path_to(batch.schema, name)
    return pc.struct_field(batch.column(column), fields) if fields else batch.column(column)


def _names(fields: pa.Schema | pa.StructType, prefix: str = "") -> list[str]:
    names = []
    for field in fields:
        inner = _names(field.type, f"{prefix}{field.name}.") if pa.types.is_struct(field.type) else []
        names += [f"{prefix}{field.name}", *inner]
    return names


def is_list(kind: pa.DataType) -> bool:
    """Whether it is one of Arrow's list types, or a map."""
    return kind.id in LISTS


def _depth(kind: pa.DataType) -> tuple[int, pa.DataType]:
    depth = 0
    while is_list(kind):
        depth, kind = depth + 1, item_type(kind)
    return depth, kind


def item_type(kind: pa.DataType) -> pa.DataType:
    """The type of the items of a list or map."""
    return pa.struct([kind.key_field, kind.item_field]) if pa.types.is_map(kind) else kind.value_type


def as_list(array: pa.Array) -> pa.ListArray:
    """The same lists as Arrow's plain list type."""
    kind = array.type
    if pa.types.is_list(kind):
        return array
    if not (pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)):
        return array.cast(pa.list_(item_type(kind)))
    return packed_list(array, array.flatten())  # a cast of views loses lists in pyarrow 26


def packed_list(array: pa.Array, items: pa.Array) -> pa.ListArray:
    """Lists with the lengths and nulls of the array's lists, and with these items, end to end."""
    lengths = array.value_lengths().fill_null(0).to_numpy()
    offsets = np.append(np.int32(0), np.cumsum(lengths, dtype=np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), items, mask=array.is_null())


def map_leaves(array: pa.Array, f: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """The same lists and structs with `f` applied to the plain arrays in them. Lists become plain lists."""
    if is_list(array.type):
        lists = as_list(array)
        return packed_list(lists, map_leaves(lists.flatten(), f))
    if pa.types.is_struct(array.type) and array.type.num_fields:
        fields = [map_leaves(field, f) for field in array.flatten()]
        return pa.StructArray.from_arrays(fields, array.type.names, mask=array.is_null())
    return f(array)


def without_views(array: pa.Array) -> pa.Array:
    """String views converted to strings: Arrow can neither filter nor take from views, or lists of them.

    Cost:     none without views.
    """
    return array if is_plain(array.type) else map_leaves(array, decoded)


def is_plain(kind: pa.DataType) -> bool:
    """Whether it contains neither Arrow's null type nor string views."""
    if pa.types.is_dictionary(kind):
        return is_plain(kind.value_type)
    return kind.id not in ODD and all(is_plain(kind.field(i).type) for i in range(kind.num_fields))


def typed(array: pa.Array, column: Column) -> pa.Array:
    """The array, with the column's type in place of Arrow's null type. Null rows, lists and items stay null."""
    kind = array.type
    if is_plain(kind):
        return array
    wanted: pa.DataType = column.item
    if isinstance(column, VarLen):
        wanted = pa.binary() if _is_of_text(column) else wanted
        wanted = pa.struct([("value", wanted), ("weight", pa.float32())]) if column.weighted else wanted
    if column.depth > 1 or not pa.types.is_null(kind):
        for _ in range(column.depth):
            wanted = pa.list_(wanted)
    return _filled_in(array, wanted)


def _filled_in(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    """The array, with the wanted type where its type is null."""
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), wanted)
    if is_list(array.type):
        lists = as_list(array)
        return packed_list(lists, _filled_in(lists.flatten(), wanted.value_type))
    if pa.types.is_struct(array.type):
        fields = [_filled_in(field, other.type) for field, other in zip(array.flatten(), wanted, strict=True)]
        return pa.StructArray.from_arrays(fields, array.type.names, mask=array.is_null())
    return array


def _is_read_as(kind: pa.DataType, column: Column) -> bool:
    if isinstance(column, VarLen) and column.weighted:
        if not pa.types.is_struct(kind) or kind.num_fields != 2 or not _is_number(kind.field(1).type):
            return False
        kind = kind.field(0).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return True
    if _is_of_text(column):
        return is_text(kind)
    return _is_number(kind) and not (column.item == pa.int64() and pa.types.is_boolean(kind))


def _is_of_text(column: Column) -> bool:
    return isinstance(column, VarLen) and (column.item == pa.binary() or column.string_hash is not None)


def _hint(whole: pa.DataType, kind: pa.DataType, column: Column) -> str:
    """Another way to read values of this type."""
    if pa.types.is_temporal(kind):
        return " `recfx convert` turns times into strings."
    if pa.types.is_struct(whole) and whole.num_fields:
        return f" A field of it can be read as a column: '{column.name}.{whole.field(0).name}'."
    return " Strings are read by `hashed`." if column.item == pa.int64() and is_text(kind) else ""


def is_text(kind: pa.DataType) -> bool:
    """Whether it is one of Arrow's types of strings or bytes."""
    return any(
        f(kind) for f in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
                          pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
                          pa.types.is_fixed_size_binary)
    )  # fmt: skip


def _is_number(kind: pa.DataType) -> bool:
    return any(
        f(kind) for f in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal,
                          pa.types.is_null)
    )  # fmt: skip


def _expected(column: Column) -> str:
    if _is_of_text(column):
        item, others = "string", "binary"
    elif column.item == pa.int64():
        item, others = "int64", "another type of whole numbers. Ids must be exact"
    else:
        item, others = "double", "another type of numbers"
    if isinstance(column, VarLen) and column.weighted:
        item = f"struct<k: {item}, v: double>"
    return "list<" * column.depth + item + ">" * column.depth + f" or {others}"


def decoded(array: pa.Array) -> pa.Array:
    """The array without a dictionary (its entries may be null) and without string views."""
    if pa.types.is_dictionary(array.type):
        values = decoded(array.dictionary)
        if values.type != array.type.value_type:
            array = pa.DictionaryArray.from_arrays(array.indices, values)
        return array.dictionary_decode()
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        return array.cast(pa.string() if pa.types.is_string_view(array.type) else pa.binary())
    return array
