"""Converts frames and arrays of other libraries to Arrow tables, without importing these libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recfx.checks import names as shown_names
from recfx.checks import said
from recfx.data.columns import Column
from recfx.data.files import ARRAYS
from recfx.data.python_values import values_array
from recfx.data.schema import is_list, item_type
from recfx.kernels.lists.flatten_lists import numpy_of
from recfx.types import NUM_SAMPLES, Batch, Ragged

__all__ = ["table_of"]

ACCEPTED = (
    "a dict of arrays, lists, tensors or Ragged by column name, a pandas or polars DataFrame, or an Arrow table, "
    "record batch or reader of record batches"
)
NOT_NUMBERS = "Convert it first, to numbers such as the hour or the day, or to strings."


def table_of(data: Any, columns: Sequence[Column], keys: Sequence[str], *, others: bool) -> pa.Table:
    """The columns of a frame, or of a dict of arrays. Arrays that Arrow can share are not copied.

    Args:     columns, keys: what is read: columns, and names of columns of any type.
              others: add the other columns that Arrow can convert.
    Raises:   TypeError when data is something else, ValueError naming a column that is absent or cannot be read.
    """
    names, get = _opened(data)
    wanted = {column.name: column for column in columns}
    for name in (*(c.name for c in columns if c.missing != "empty"), *keys):
        if not any(_leads_to(top, name) for top in names):
            hint = "" if name in keys else " With missing='empty' for the column its rows are empty."
            raise ValueError(
                f"column '{name}' of {ARRAYS}: got no such column, expected one of "
                f"{shown_names(dict.fromkeys(names))}.{hint}"
            )
    arrays = {}
    for name in dict.fromkeys(names):
        count = names.count(name)
        if any(_leads_to(name, one) for one in (*wanted, *keys)):
            if count > 1:
                raise ValueError(f"column '{name}' of {ARRAYS}: got {count} columns of this name, expected one.")
            arrays[name] = _column(get, name, wanted.get(name))
            _check_type(name, arrays[name].type)
        elif others and count == 1:
            try:
                arrays[name] = _column(get, name, None)
            except (ValueError, TypeError):
                continue
    _check_lengths({name: len(array) for name, array in arrays.items()})
    table = pa.table(arrays) if arrays else pa.table({"": pa.nulls(_num_rows(data, names, get))})
    return table.slice(0, int(data[NUM_SAMPLES])) if isinstance(data, Batch) else table


def _leads_to(name: str, wanted: str) -> bool:
    """Whether the column is the wanted one, or a struct that contains it."""
    return name == wanted or wanted.startswith(f"{name}.")


def _opened(data: Any) -> tuple[list[str], Callable[[str], Any]]:
    """The names of its columns, and a function from a name to the column."""
    if isinstance(data, Mapping):
        return [name for name in data if isinstance(name, str) and name != NUM_SAMPLES], data.__getitem__
    if _is_of(data, "pandas") and hasattr(data, "columns"):
        return [name for name in data.columns if isinstance(name, str)], data.__getitem__
    if isinstance(data, pa.RecordBatchReader):
        data = data.read_all()
    if isinstance(data, pa.RecordBatch):
        data = pa.Table.from_batches([data])
    if not isinstance(data, pa.Table):
        if not hasattr(data, "__arrow_c_stream__") or not hasattr(data, "columns"):
            hint = " Collect it first." if hasattr(data, "collect") else ""
            hint = " Use recfx.data.pack_rows for rows." if _is_of_dicts(data) else hint
            raise TypeError(f"data: got {said(data)}, expected {ACCEPTED}.{hint}")
        try:
            data = pa.table(data)
        except (pa.ArrowException, NotImplementedError) as error:  # such as of polars' Int128, in any column
            words = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"data: got {said(data)} ({words}), expected columns that Arrow has types for.") from error
    return data.column_names, data.column


def _is_of(value: Any, package: str) -> bool:
    return any(kind.__module__.split(".")[0] == package for kind in type(value).__mro__)


def _is_of_dicts(data: Any) -> bool:
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], Mapping)


def _num_rows(data: Any, names: Sequence[str], get: Callable[[str], Any]) -> int:
    """The number of rows when every column that is read is missing."""
    return len(_column(get, names[0], None)) if names else 0


def _check_lengths(lengths: Mapping[str, int]) -> None:
    first = next(iter(lengths), None)
    for name, length in lengths.items():
        if first is not None and length != lengths[first]:
            raise ValueError(
                f"column '{name}' of {ARRAYS}: got {length} rows, expected {lengths[first]}, as '{first}' has."
            )


def _check_type(name: str, kind: pa.DataType) -> None:
    item = kind
    while is_list(item):
        item = item_type(item)
    if pa.types.is_temporal(item):
        raise ValueError(f"column '{name}' of {ARRAYS}: got {kind}, expected numbers or strings. {NOT_NUMBERS}")


def _column(get: Callable[[str], Any], name: str, column: Column | None) -> Any:
    """An Arrow array, or a chunked one."""
    values = get(name)
    try:
        return _array(values, column, name)
    except (pa.ArrowException, OverflowError, RuntimeError, TypeError) as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"column '{name}' of {ARRAYS}: got {said(values)} ({words}), expected values that Arrow can convert."
        ) from error


def _array(values: Any, column: Column | None, name: str) -> Any:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, Ragged):
        return _of_ragged(values)
    if isinstance(values, torch.Tensor):
        values = numpy_of(values)
    if _is_of(values, "pandas"):
        return _of_pandas(values, column, name)
    if isinstance(values, np.ndarray):
        return _of_numpy(values, column, name)
    if hasattr(values, "__arrow_c_stream__"):
        return pa.chunked_array(values)
    if hasattr(values, "__arrow_c_array__"):
        return pa.array(values)
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ValueError(f"column '{name}' of {ARRAYS}: got {said(values)}, expected an array, a tensor or a list.")
    return values_array(values, column, name, ARRAYS)


def _of_pandas(values: Any, column: Column | None, name: str) -> Any:
    """The values that `DataFrame.to_parquet` writes: NaN and NaT are null."""
    if values.ndim != 1:
        raise ValueError(f"column '{name}' of {ARRAYS}: got {said(values)}, expected one column.")
    if values.dtype != object:
        return pa.array(values, from_pandas=True)
    items = values.tolist()
    return values_array([None if item is not item else item for item in items], column, name, ARRAYS)


def _of_numpy(values: np.ndarray, column: Column | None, name: str) -> pa.Array:
    """More dimensions become lists of one length. A masked item is null."""
    if values.ndim == 0:
        raise ValueError(f"column '{name}' of {ARRAYS}: got one value, expected an array with a value for each row.")
    if values.dtype == object:
        return values_array(values.tolist() if values.ndim > 1 else list(values), column, name, ARRAYS)
    mask = np.ma.getmaskarray(values).ravel() if isinstance(values, np.ma.MaskedArray) else None
    items = np.asarray(values)
    if items.dtype.kind in "iufc" and not items.dtype.isnative:
        items = items.astype(items.dtype.newbyteorder("="))
    array = pa.array(np.ascontiguousarray(items).ravel(), mask=mask)
    for width in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, width) if width else _empty_lists(array, values.shape)
    return array


def _empty_lists(items: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    if len(shape) > 2:
        raise ValueError(f"got an array {list(shape)} without an item, expected at least one, or two dimensions.")
    return pa.ListArray.from_arrays(pa.array(np.zeros(shape[0] + 1, np.int32)), items)


def _of_ragged(column: Ragged) -> pa.Array:
    """The lists, without the padding after the last one."""
    offsets = [numpy_of(o) for o in (*column.outer, column.offsets)]
    values = numpy_of(column.values)[: offsets[-1][-1]]
    items = pa.array(values)
    if column.values.dtype == torch.uint8:
        own = np.ascontiguousarray(offsets.pop())
        items = pa.Array.from_buffers(pa.binary(), len(own) - 1, [None, pa.py_buffer(own), pa.py_buffer(values)])
    elif column.weights is not None:
        weights = pa.array(numpy_of(column.weights)[: len(values)])
        items = pa.StructArray.from_arrays([items, weights], ["value", "weight"])
    for level in reversed(offsets):
        items = pa.ListArray.from_arrays(pa.array(level), items.slice(0, int(level[-1])))
    return items
