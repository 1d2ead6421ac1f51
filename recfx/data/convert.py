"""Rewrites files of any format for fast reading: as float32, int64 and strings, in units of one size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs, orc
from pyarrow import parquet as pq

from recfx.checks import check_choice
from recfx.data.convert_values import Keeping, NotTextError, check_given, read_as, stored, stored_type
from recfx.data.exact_numbers import Rounding
from recfx.data.files import File, Paths, match_files
from recfx.data.formats import EXTENSIONS, Format, open_file, reading
from recfx.data.open_file import OpenFile
from recfx.data.schema import map_leaves
from recfx.data.text.csv import check_named_columns
from recfx.data.text.lines import COMPRESSIONS
from recfx.data.unit_rows import BadRow, BadRows, UnitRows

__all__ = ["TYPES", "convert"]

TYPES: dict[str, pa.DataType] = {
    "float": pa.float32(), "double": pa.float64(), "int": pa.int64(), "uint64": pa.uint64(), "string": pa.string(),
    "binary": pa.binary(),
}  # fmt: skip


def convert(
    paths: Paths,
    folder: str | os.PathLike[str],
    *,
    to: Literal["orc", "parquet"] = "parquet",
    columns: Sequence[str] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    rounding: Rounding = "error",
    as_lists: bool = False,
    rows_per_unit: int = 100_000,
    compression: str = "uncompressed",
    filesystem: fs.FileSystem | None = None,
    format: Format | None = None,
) -> list[Path]:
    """Writes one file for each file that the paths match, and returns the new paths.

    Without `types`, integers and decimals of scale 0 become int64 (uint64 bit for bit, as in `varlen`). Floats and
    other decimals become float32, as the reader would read them. Strings and bytes become strings, or bytes where some
    are not UTF-8. All other types except lists and structs become strings. Lists stay lists, plain values stay plain
    values, and missing values are null. No id changes: a whole number that cannot be stored as it is is an error.
    Parquet pages get checksums, which the reader verifies.

    Args:     columns: their names; None: all.
              types: of columns by name, for any format: int64, uint64, float32, float64, string, binary, or lists of
                  them; for a list column the type of its items is enough. Numbers become int64 when they are whole (a
                  double below 2**53 in size), and so do strings that spell whole numbers. ORC stores uint64 as int64,
                  bit for bit. The types of other CSV columns are guessed.
              rounding: "error": a whole number that float32 cannot represent, such as 2**24 + 1, is an error where it
                  would become float32. "allow" rounds it. Fractions are always rounded.
              as_lists: plain values become lists of length 1, missing ones empty lists.
              rows_per_unit: rows in an ORC stripe or a Parquet row group, which are decoded and shuffled together.
              compression: of the columns, by the format's names.
              filesystem, format: see `reader`.
    Raises:   ValueError when an output file exists, two inputs would have one output, or an input cannot be read or
              stored: it names file, column and row. An output file is complete or absent.
    """
    if rows_per_unit < 1:
        raise ValueError(f"rows_per_unit: got {rows_per_unit}, expected at least 1.")
    check_choice("rounding", rounding, ("error", "allow"))
    _check_compression(to, compression)
    how = _How(to, columns, {name: check_given(name, kind) for name, kind in (types or {}).items()}, rounding, as_lists)
    files = match_files(paths, filesystem)
    check_named_columns(files, format)
    targets = _targets(files, Path(folder), to)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for target, file in targets.items():
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            _write(scratch, file, how, format, rows_per_unit, compression)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
    return list(targets)


class _How(NamedTuple):
    """Arguments of `convert`."""

    to: str
    columns: Sequence[str] | None
    types: Mapping[str, pa.DataType]
    rounding: Rounding
    as_lists: bool


def _write(path: Path, file: File, how: _How, format: Format | None, rows_per_unit: int, compression: str) -> None:
    """Writes a file. Starts again when a column of strings turns out to hold bytes that are not UTF-8."""
    write, not_text = _write_orc if how.to == "orc" else _write_parquet, set[str]()
    while True:
        try:
            write(path, _tables(file, how, format, not_text), rows_per_unit, compression)
            return
        except NotTextError as found:
            not_text.add(found.name)


def _check_compression(to: str, compression: str) -> None:
    try:
        write = orc.ORCWriter if to == "orc" else pq.ParquetWriter
        schema = () if to == "orc" else (pa.schema([]),)
        write(pa.BufferOutputStream(), *schema, compression=_codec(to, compression)).close()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(
            f"compression: got '{compression}' ({error}), expected one that {to} files can have."
        ) from error


def _codec(to: str, compression: str) -> str:
    return "none" if to == "parquet" and compression == "uncompressed" else compression


def _targets(files: Sequence[File], folder: Path, to: str) -> dict[Path, File]:
    """The input of each output file.

    Raises:   ValueError when an output exists already, or would be written twice.
    """
    targets: dict[Path, File] = {}
    for file in files:
        target = folder / f"{_stem(file.name)}.{to}"
        if target in targets:
            raise ValueError(
                f"paths: got '{targets[target].path}' and '{file.path}', which would both be '{target.name}', "
                "expected names that differ. Convert each folder into a separate one."
            )
        if target.exists():
            raise ValueError(
                f"folder: got '{folder}', where '{target.name}' exists, expected nothing to be overwritten."
            )
        targets[target] = file
    return targets


def _stem(name: str) -> str:
    """The name without the extensions of format and compression."""
    for known in (COMPRESSIONS, EXTENSIONS):
        stem, dot, extension = name.rpartition(".")
        name = stem if dot and stem and extension.lower() in known else name
    return name


def _tables(file: File, how: _How, format: Format | None, not_text: Set[str]) -> Iterator[pa.Table]:
    """An empty table with the schema, then the units of a file, converted."""
    source = _open(file, how, format)
    names = list(dict.fromkeys(how.columns or source.schema.names))
    for name in (*names, *how.types):
        if name not in source.schema.names:
            raise ValueError(f"column '{name}' of '{file.path}': got no such column, expected {source.schema.names}.")
        if (count := source.schema.names.count(name)) > 1:
            raise ValueError(f"column '{name}' of '{file.path}': got {count} columns of this name, expected one.")
    kinds = {name: _kind(file, name, source.schema.field(name).type, how, not_text) for name in names}
    empty = [column.combine_chunks() for column in source.schema.empty_table().select(names).columns]
    first_row = 0
    no_rows = UnitRows(pa.RecordBatch.from_arrays(empty, names), np.empty(0, np.int64))
    yield _converted(no_rows, file, 0, kinds, how)
    for unit in range(source.num_units):
        with reading(file, f" in {source.unit_name} {unit}", "a whole file"):
            rows = source.read(unit, names)
        if rows.bad:
            raise rows.bad[0].error(file.path, first_row)
        yield _converted(rows, file, first_row, kinds, how)
        first_row += rows.batch.num_rows


def _open(file: File, how: _How, format: Format | None) -> OpenFile:
    """The open file. Strings of CSV are read as bytes: later rows may not be UTF-8."""
    types = {name: read_as(kind, how.rounding) for name, kind in how.types.items()}
    source = open_file(file, types, format)
    if source.cells_are_bytes:
        strings = {field.name for field in source.schema if field.type in (pa.string(), pa.list_(pa.string()))}
        if strings:
            return open_file(file, {**dict.fromkeys(strings, pa.binary()), **types}, format)
    return source


def _kind(file: File, name: str, kind: pa.DataType, how: _How, not_text: Set[str]) -> pa.DataType:
    given = how.types.get(name)
    try:
        new = stored_type(kind, given, null=pa.null() if how.to == "parquet" else pa.float32())
    except ValueError as error:
        raise ValueError(f"column '{name}' of '{file.path}': {error}, the given type.") from None
    return _with_bytes(new) if name in not_text else new


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The type, with bytes for strings."""
    if pa.types.is_list(kind):
        return pa.list_(_with_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _with_bytes(field.type)) for field in kind])
    return pa.binary() if kind == pa.string() else kind


def _converted(rows: UnitRows, file: File, first_row: int, kinds: Mapping[str, pa.DataType], how: _How) -> pa.Table:
    arrays = {}
    for name, kind in kinds.items():
        array = rows.batch.column(name)
        keeping = Keeping(name, how.rounding, name in how.types)
        try:
            kept = stored(array, kind, keeping)
        except BadRows as bad:
            row = BadRow(int(rows.numbers[bad.rows[0]]), name, bad.got, bad.expected)
            raise row.error(file.path, first_row) from None
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"column '{name}' of '{file.path}': got {array.type}, expected values that can be stored as "
                f"{kind}: {error}. Leave it out with `columns`."
            ) from error
        kept = map_leaves(kept, _signed) if how.to == "orc" else kept
        arrays[name] = _as_lists(kept) if how.as_lists and not pa.types.is_nested(kept.type) else kept
    return pa.table(arrays)


def _signed(array: pa.Array) -> pa.Array:
    """ORC has no unsigned integers, so they are stored as int64 with the same bits."""
    return array.view(pa.int64()) if array.type == pa.uint64() else array


def _as_lists(array: pa.Array) -> pa.ListArray:
    present = array.is_valid().to_numpy(zero_copy_only=False)
    offsets = np.append(np.int32(0), np.cumsum(present, dtype=np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), array.drop_null())


def _units_of(tables: Iterator[pa.Table], rows_per_unit: int) -> Iterator[pa.Table]:
    """The same rows in tables of that many rows; the last one may be shorter."""
    rest = next(tables)
    for table in tables:
        rest = pa.concat_tables([rest, table])
        while len(rest) >= rows_per_unit:
            yield rest.slice(0, rows_per_unit).combine_chunks()
            rest = rest.slice(rows_per_unit)
    if len(rest):
        yield rest.combine_chunks()


def _write_orc(path: Path, tables: Iterator[pa.Table], rows_per_unit: int, compression: str) -> None:
    empty = next(tables)
    with orc.ORCWriter(str(path), compression=compression, stripe_size=1, batch_size=rows_per_unit) as writer:
        writer.write(empty)
        for table in _units_of(itertools.chain([empty], tables), rows_per_unit):
            writer.write(table)


def _write_parquet(path: Path, tables: Iterator[pa.Table], rows_per_unit: int, compression: str) -> None:
    empty = next(tables)
    with pq.ParquetWriter(
        str(path), empty.schema, compression=_codec("parquet", compression), write_page_checksum=True
    ) as writer:
        for table in _units_of(itertools.chain([empty], tables), rows_per_unit):
            writer.write_table(table, row_group_size=rows_per_unit)
