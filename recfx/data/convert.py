"""Files of any format rewritten as the reader likes them: float32, int64 and strings, in units of one size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs, orc
from pyarrow import parquet as pq

from recfx.data.csv import check_named_columns
from recfx.data.files import File, Paths, match_files
from recfx.data.formats import EXTENSIONS, Format, open_source, reading
from recfx.data.lines import COMPRESSIONS
from recfx.data.schema import as_list, decoded, is_list, item_type, packed_list

__all__ = ["TYPES", "convert"]

TYPES: dict[str, pa.DataType] = {"float": pa.float32(), "int": pa.int64(), "string": pa.string()}


def convert(
    paths: Paths,
    folder: str | os.PathLike[str],
    *,
    to: Literal["orc", "parquet"] = "parquet",
    columns: Sequence[str] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    as_lists: bool = False,
    rows_per_unit: int = 100_000,
    compression: str = "uncompressed",
    filesystem: fs.FileSystem | None = None,
    format: Format | None = None,
) -> list[Path]:
    """Writes one file for each file that the paths name, and returns them.

    Floats and decimals become float32, which is what the reader would make of them, integers int64 (uint64 bit for bit,
    as `varlen` has it), and all else but lists and structs strings. Lists stay lists and plain values plain ones, null
    where they are missing. Parquet pages carry checksums, which the reader verifies.

    Args:     columns: their names; None: all.
              types: of columns by name, where the files do not say, as CSV; other columns of CSV are guessed.
              as_lists: plain values become lists of length 1, missing ones empty lists.
              rows_per_unit: rows in an ORC stripe or a Parquet row group: what is decoded, shuffled and shared out.
              compression: of the columns, by the format's own names.
              filesystem, format: see `reader`.
    Raises:   ValueError when an output file exists, two inputs would be one, or an input cannot be read or kept. A
              file is whole or not there.
    """
    if rows_per_unit < 1:
        raise ValueError(f"rows_per_unit: got {rows_per_unit}, expected at least 1.")
    _check_compression(to, compression)
    files = match_files(paths, filesystem)
    check_named_columns(files, format)
    targets = _targets(files, Path(folder), to)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for target, file in targets.items():
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            tables = _tables(file, columns, types or {}, format, as_lists)
            (_write_orc if to == "orc" else _write_parquet)(scratch, tables, rows_per_unit, compression)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
    return list(targets)


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
    """What is written for which file.

    Raises:   ValueError when one exists already, or would be written twice.
    """
    targets: dict[Path, File] = {}
    for file in files:
        target = folder / f"{_stem(file.name)}.{to}"
        if target in targets:
            raise ValueError(
                f"paths: got '{targets[target].path}' and '{file.path}', which would both be '{target.name}', "
                "expected names that differ. Convert each folder into one of its own."
            )
        if target.exists():
            raise ValueError(
                f"folder: got '{folder}', where '{target.name}' exists, expected nothing to be overwritten."
            )
        targets[target] = file
    return targets


def _stem(name: str) -> str:
    """The name without the extensions that say format and compression."""
    for known in (COMPRESSIONS, EXTENSIONS):
        stem, dot, extension = name.rpartition(".")
        name = stem if dot and stem and extension.lower() in known else name
    return name


def _tables(
    file: File, columns: Sequence[str] | None, types: Mapping[str, pa.DataType], format: Format | None, as_lists: bool
) -> Iterator[pa.Table]:
    """The units of a file, converted, and first an empty table, for its schema."""
    source = open_source(file, types, format)
    names = list(columns or source.schema.names)
    for name in (*names, *types):
        if name not in source.schema.names:
            raise ValueError(f"column '{name}' of '{file.path}': got no such column, expected {source.schema.names}.")
    yield _converted(source.schema.empty_table().select(names), file, as_lists)
    first_row = 0
    for unit in range(source.num_units):
        with reading(file, f" in {source.unit_name} {unit}", "a whole file"):
            rows = source.read(unit, names)
        if rows.bad:
            raise rows.bad[0].error(file.path, first_row)
        first_row += rows.batch.num_rows
        yield _converted(pa.Table.from_batches([rows.batch]), file, as_lists)


def _converted(table: pa.Table, file: File, as_lists: bool) -> pa.Table:
    arrays = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = column.combine_chunks()
        try:
            array = _as_stored(array)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"column '{name}' of '{file.path}': got {array.type}, expected what can be kept as "
                f"{_stored(array.type)}: {error}. Leave it out with `columns`."
            ) from error
        arrays[name] = _as_lists(array) if as_lists and not pa.types.is_nested(array.type) else array
    return pa.table(arrays)


def _as_stored(array: pa.Array) -> pa.Array:
    if is_list(array.type):
        lists = as_list(array)
        return packed_list(lists, _as_stored(lists.flatten()))
    array = decoded(array)
    kept = array.view(pa.int64()) if array.type == pa.uint64() else array.cast(_stored(array.type))
    if (
        pa.types.is_float32(kept.type)
        and pc.any(pc.and_not(pc.is_inf(kept), pc.is_inf(array.cast(pa.float64())))).as_py()
    ):
        raise pa.ArrowInvalid("a number is too large")
    return kept


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type that stands in the new file for a type of the old one."""
    if is_list(kind):
        return pa.list_(_stored(item_type(kind)))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _stored(field.type)) for field in kind])
    if pa.types.is_dictionary(kind):
        return _stored(kind.value_type)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return pa.float32()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return pa.int64()
    return pa.string()


def _as_lists(array: pa.Array) -> pa.ListArray:
    present = array.is_valid().to_numpy(zero_copy_only=False)
    offsets = np.append(np.int32(0), np.cumsum(present, dtype=np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), array.drop_null())


def _units_of(tables: Iterator[pa.Table], rows_per_unit: int) -> Iterator[pa.Table]:
    """The same rows cut into tables of that many rows, the last one shorter."""
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
