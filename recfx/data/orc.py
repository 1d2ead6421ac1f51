"""From paths to files, and from the stripes of an ORC file to blocks of checked columns."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from pyarrow import orc

from recfx.data.columns import Column, FixedLen
from recfx.kernels.pack_columns import Block

__all__ = ["Paths", "count_stripes", "locate_row", "match_files", "read_block", "shard_files"]


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def match_files(paths: Paths) -> list[str]:
    """The files that the paths name, sorted, each once.

    Args:     paths: a file, glob or folder, a list of them, or one string with commas between. A folder stands for the
                  files directly in it whose names start with neither '.' nor '_'.
    Raises:   ValueError when a path matches no file.
    """
    if isinstance(paths, str):
        items = [item.strip() for item in paths.split(",") if item.strip()]
    else:
        items = [os.fspath(path) for path in ([paths] if isinstance(paths, os.PathLike) else paths)]
    if not items:
        raise ValueError(f"paths: got {paths!r}, expected at least one file, folder or glob.")
    return sorted({file for item in items for file in _match(item)})


def _match(item: str) -> list[str]:
    if os.path.isfile(item):
        return [item]
    if os.path.isdir(item):
        inside = [os.path.join(item, name) for name in os.listdir(item) if not name.startswith((".", "_"))]
    else:
        inside = glob.glob(item, recursive=True)
    files = [file for file in inside if os.path.isfile(file)]
    if not files:
        raise ValueError(f"paths: got '{item}', which matches no file, expected a file, a folder of files or a glob.")
    return files


def shard_files(files: Sequence[str], rank: int, world_size: int) -> list[str]:
    """files[rank::world_size]: whole files for each worker.

    Raises:   ValueError when the rank is out of range, or a worker would be left without a file.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of world_size {world_size}, expected 0 <= rank < world_size.")
    if len(files) < world_size:
        raise ValueError(
            f"rank: got {rank} of {world_size} workers for {len(files)} files, expected a file for each worker. A "
            "worker without rows would leave the others waiting. Start fewer workers or cut the data into more files."
        )
    return list(files[rank::world_size])


def count_stripes(path: str, columns: Sequence[Column]) -> int:
    """Opens the file and checks that it has the columns, of the right types."""
    file = _open(path)
    types = {field.name: field.type for field in file.schema}
    for column in columns:
        if column.name not in types:
            raise ValueError(f"column '{column.name}' of '{path}': got no such column, expected one of {list(types)}.")
        _check_type(path, column, types[column.name])
    return file.nstripes


def locate_row(path: str, columns: Sequence[Column], row: int) -> tuple[int, int]:
    """The stripe that holds a row of the file, and that stripe's first row; (stripes, rows) when row is the end.

    Raises:   ValueError when the file has fewer rows.
    """
    num_stripes, first_row = count_stripes(path, columns), 0
    if row == 0:
        return 0, 0
    for stripe in range(num_stripes):
        num_rows = len(_read(path, stripe, [columns[0].name]))
        if row < first_row + num_rows:
            return stripe, first_row
        first_row += num_rows
    if row > first_row:
        raise ValueError(
            f"position: got row {row} of '{path}', which has {first_row} rows. Resume needs the files that the "
            "position was taken from."
        )
    return num_stripes, first_row


def read_block(path: str, stripe: int, columns: Sequence[Column]) -> Block:
    """Decodes one stripe; without copying where the file's types are lists of double, float or int64.

    Raises:   ValueError naming file, row and column when a list or an element is null, or a row of a fixed-length
                  column has another length.
    """
    table = _read(path, stripe, [column.name for column in columns])
    values, offsets = [], []
    for column in columns:
        array = table.column(column.name)

        def fail(row: int, got: str, expected: str, name: str = column.name) -> ValueError:
            in_file = row + sum(len(_read(path, earlier, [name])) for earlier in range(stripe))
            return ValueError(f"column '{name}' of '{path}', row {in_file}: got {got}, expected {expected}.")

        column_values, column_offsets = _lists(array, fail)
        if isinstance(column, FixedLen):
            _check_lengths(column, column_offsets, fail)
        values.append(column_values)
        offsets.append(column_offsets)
    return Block.of(values, offsets)


Fail = Callable[[int, str, str], ValueError]


def _lists(array: pa.Array, fail: Fail) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column, or of a flat one as lists of length 1."""
    is_list = pa.types.is_list(array.type)
    if array.null_count:
        raise fail(_first_null(array), "null", "a list, empty if missing" if is_list else "a number")
    if not is_list:
        return _numbers(array), np.arange(len(array) + 1, dtype=np.int32)
    offsets = array.offsets.to_numpy()
    if array.values.null_count:
        row = int(np.searchsorted(offsets, _first_null(array.values), side="right")) - 1
        raise fail(row, "a null element", "numbers only")
    return _numbers(array.values), offsets


def _first_null(array: pa.Array) -> int:
    return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))


def _numbers(array: pa.Array) -> np.ndarray:
    if pa.types.is_integer(array.type) and array.type != pa.int64():
        array = array.cast(pa.int64())
    return array.to_numpy()


def _check_lengths(column: FixedLen, offsets: np.ndarray, fail: Fail) -> None:
    lengths, width = np.diff(offsets), len(column.default)
    wrong = (lengths != width) & (lengths != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise fail(row, f"{lengths[row]} values", f"{width}, the length of the default, or none")


def _check_type(path: str, column: Column, got: pa.DataType) -> None:
    item = got.value_type if pa.types.is_list(got) else got
    is_float = item in (pa.float64(), pa.float32())
    is_integer = pa.types.is_signed_integer(item)
    if column.dtype == torch.int64 and not is_integer:
        expected = "list<int64> or another integer type. Ids must be exact"
    elif column.dtype == torch.float32 and not is_float:
        expected = "list<double> or another floating point type"
    else:
        return
    raise ValueError(f"column '{column.name}' of '{path}': got {got}, expected {expected}.")


def _open(path: str) -> orc.ORCFile:
    try:
        if os.path.getsize(path) == 0:
            raise ValueError(f"file '{path}': got 0 bytes, expected an ORC file. It was cut short when it was written.")
        return orc.ORCFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"file '{path}': got {_words(error)!r}, expected a readable ORC file.") from error


def _read(path: str, stripe: int, names: list[str]) -> pa.RecordBatch:
    file = _open(path)
    try:
        return file.read_stripe(stripe, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"file '{path}': got {_words(error)!r} in stripe {stripe}, expected a whole ORC file."
        ) from error


def _words(error: Exception) -> str:
    return next(itertools.chain(str(error).splitlines(), [type(error).__name__]))
