"""Reads a unit of a file and turns it into conformed rows: filters, splits and checks them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.cache import RecordCache
from recfx.data.checksums import checksum
from recfx.data.columns import Column, VarLen
from recfx.data.conform import conform
from recfx.data.files import File, quoted
from recfx.data.formats import Format, open_file, reading
from recfx.data.identity import identity_of
from recfx.data.kept_units import KeptUnits
from recfx.data.open_file import OpenFile
from recfx.data.packing.pack_columns import PackPlan
from recfx.data.records import as_records
from recfx.data.schema import check_schema, column_at, is_plain, path_to, type_at, without_views
from recfx.data.split import Split, check_key
from recfx.data.unit_rows import BadRow, BadRows, ColumnError, Decoded, UnitRows

__all__ = ["Decoder", "Recipe"]

MAX_OPENED = 4  # files whose footers stay in memory, or whose text when it was compressed
ROW = "__recfx_row"  # a column added to those of the file while they are filtered


@dataclass(frozen=True)
class Recipe:
    """How the rows of a file are read, apart from their order."""

    columns: tuple[Column, ...]
    filter: pc.Expression | None = None
    split: Split | None = None
    format: Format | None = None
    on_bad: Literal["raise", "skip"] = "raise"

    @property
    def key(self) -> str:
        """A text that is the same for equal recipes, in any process.

        Raises:   NoIdentityError when a part, such as a user's function, cannot be told apart from another.
        """
        parts = {name: getattr(self, name) for name in ("columns", "filter", "split", "format", "on_bad")}
        return "; ".join(identity_of(part, name) for name, part in parts.items())

    @property
    def filter_key(self) -> bytes:
        return b"" if self.filter is None else pickle.dumps(self.filter)


class Decoder:
    """Decodes units of files by one recipe, from any thread.

    Args:     checksums: of all files by name; a file is compared with its checksum when it is first opened.
              in_records: return rows as records, which can be read in any order.
              cache: where records are stored.
    """

    def __init__(
        self,
        recipe: Recipe,
        checksums: dict[str, str] | None = None,
        *,
        in_records: bool = False,
        cache: RecordCache | None = None,
    ) -> None:
        assert in_records or cache is None
        self.recipe, self.in_records = recipe, in_records
        self._plan = PackPlan.of(1, [column.packed for column in recipe.columns])
        self.cache = cache
        self._checksums = checksums
        self._verified: set[File] = set()
        self._units: dict[File, list[int]] = {}
        self._opened: dict[File, tuple[OpenFile, _Names]] = {}
        self._absent: set[str] | None = None  # columns that no file had so far; None: before the first
        self._kept: KeptUnits | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def keeping(self, kept: KeptUnits) -> Decoder:
        """The same decoder, which decodes a unit once while it is kept."""
        other = copy.copy(self)
        other._opened, other._kept = {}, kept
        return other

    @property
    def absent(self) -> list[str]:
        """Columns with missing="empty" that none of the files opened so far had: their names may be misspelt."""
        return sorted(self._absent or ())

    def units(self, file: File) -> list[int]:
        """The units that may hold rows of the recipe.

        Raises:   ValueError when the file cannot be opened or lacks a column.
        """
        if file not in self._units:
            source, _ = self._open(file)
            with reading(file, "", "a readable file"):
                self._units[file] = list(source.matching(self.recipe.filter))
        return self._units[file]

    def read(self, file: File, unit: int) -> Decoded:
        """The unit's rows.

        Raises:   ValueError naming file, row and column when a row is bad and the recipe does not skip it.
        """
        return self._read(file, unit) if self._kept is None else self._kept.read(file, unit, self._read)

    def _read(self, file: File, unit: int) -> Decoded:
        cached = None if self.cache is None else self.cache.load(file, unit)
        if cached is not None:
            return cached
        decoded = self._decode(file, unit)
        if self.in_records:
            decoded = decoded._replace(batch=as_records(self._plan, decoded.batch))
        if self.cache is not None:
            self.cache.store(file, unit, decoded)
        return decoded

    def _decode(self, file: File, unit: int) -> Decoded:
        (source, names), recipe, num_bad = self._open(file), self.recipe, 0
        columns = [replace(c, null="empty") if _may_be_null(c, source) else c for c in recipe.columns]
        where = f" in {source.unit_name} {unit}"
        with reading(file, where, "a whole file"):
            rows = source.read(unit, names.read)
        num_bad += self._judge(rows.bad, file, source, unit)
        with reading(file, where, "rows that the filter can read"):
            rows = rows if names.are_plain else rows._replace(batch=_named(rows.batch, columns, recipe.split))
            rows = _filtered(rows, recipe.filter)
        split = None if recipe.split is None or recipe.split.key is None else recipe.split
        while True:
            try:
                if split is not None:
                    rows, split = _part(rows, split), None
                return Decoded(conform(rows.batch, columns), num_bad)
            except BadRows as bad:
                found = [BadRow(int(number), bad.column, bad.got, bad.expected) for number in rows.numbers[bad.rows]]
                num_bad += self._judge(found, file, source, unit)
                rows = _without(rows, bad.rows)
            except ColumnError as error:
                raise error.of(file.path, where) from error

    def _open(self, file: File) -> tuple[OpenFile, _Names]:
        """The open file, and the names of the columns that are read from it."""
        file.check_unchanged()
        opened = self._opened.get(file)
        if opened is None:
            if self._checksums is not None and file not in self._verified:
                self._verify(file)
            opened = self._open_file(file)
            if len(self._opened) >= MAX_OPENED:
                self._opened = {}
            self._opened[file] = opened
        return opened

    def _open_file(self, file: File) -> tuple[OpenFile, _Names]:
        key = None if self.recipe.split is None else self.recipe.split.key
        types = {} if key is None else {key: pa.binary()}
        types |= {column.name: _csv_type(column) for column in self.recipe.columns}
        source = open_file(file, types, self.recipe.format, self.recipe.columns)
        check_schema(file.path, source.schema, self.recipe.columns)
        names = _needed(file, source.schema, self.recipe)
        absent = {column.name for column in self.recipe.columns if not path_to(source.schema, column.name)}
        self._absent = absent if self._absent is None else self._absent & absent
        if names.read:
            return source, names
        first = source.schema.names[:1]  # of any type: it gives the number of rows
        if source.cells_are_bytes:
            source = open_file(file, dict.fromkeys(first, pa.binary()), self.recipe.format)
        return source, _Names(first, True)

    def _verify(self, file: File) -> None:
        assert self._checksums is not None
        expected = self._checksums.get(file.name)
        if expected is None:
            raise ValueError(f"file '{file.path}': got no checksum in the manifest, expected one. Write it again.")
        with reading(file, "", "a readable file"):
            got = checksum(file)
        if got != expected:
            raise ValueError(
                f"file '{file.path}': got checksum {got}, expected {expected}. The file is damaged, or was "
                "changed after the manifest was written."
            )
        self._verified.add(file)

    def _judge(self, bad: Sequence[BadRow], file: File, source: OpenFile, unit: int) -> int:
        """The number of rows to skip. Raises the error of the first where bad rows are errors."""
        if bad and self.recipe.on_bad == "raise":
            raise bad[0].error(file.path, sum(source.num_rows(earlier) for earlier in range(unit)))
        return len(bad)


def _csv_type(column: Column) -> pa.DataType:
    """The type in which formats without types read the column."""
    is_text = column.item == pa.binary() or (isinstance(column, VarLen) and column.string_hash)
    number = pa.float32() if column.rounding == "allow" else pa.float64()  # float64: read exactly, or bad
    item = pa.binary() if is_text else pa.int64() if column.item == pa.int64() else number
    is_weighted = isinstance(column, VarLen) and column.weighted
    return pa.struct([("k", item), ("v", number)]) if is_weighted else item


def _may_be_null(column: Column, source: OpenFile) -> bool:
    """Whether a null is a missing value: in CSV, and where the first JSON lines lack a column that may be missing."""
    return source.null_is_missing or (column.missing == "empty" and column.name in source.absent)


class _Names(NamedTuple):
    """The columns that are read from a file."""

    read: list[str]
    are_plain: bool  # they have the names of the recipe, and types that Arrow can filter


def _needed(file: File, schema: pa.Schema, recipe: Recipe) -> _Names:
    """Names of the file's columns that batches, filter and split read."""
    paths = [path_to(schema, column.name) for column in recipe.columns]
    if recipe.split is not None and recipe.split.key is not None:
        kind = type_at(schema, recipe.split.key)
        if kind is None:
            raise ValueError(
                f"split: got key '{recipe.split.key}', which {quoted(file.path)} lacks, expected one of {schema.names}."
            )
        check_key(file.path, recipe.split.key, kind)
        paths.append(path_to(schema, recipe.split.key))
    names = [".".join(path) for path in paths if path]
    if recipe.filter is not None:
        if not _binds(recipe.filter, schema):
            raise ValueError(f"filter: got {recipe.filter}, which does not fit {quoted(file.path)}, {schema.names}.")
        fields = enumerate(schema.names)
        names += [name for i, name in fields if not _binds(recipe.filter, schema.remove(i))]
    kinds = [type_at(schema, name) for name in names]
    return _Names(list(dict.fromkeys(names)), all(kind is not None and is_plain(kind) for kind in kinds))


def _binds(expression: pc.Expression, schema: pa.Schema) -> bool:
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _named(batch: pa.RecordBatch, columns: Sequence[Column], split: Split | None) -> pa.RecordBatch:
    """The batch, with a column for each field that is read of an all-null struct, and without views of strings."""
    names, arrays = list(batch.schema.names), [without_views(array) for array in batch.columns]
    wanted = [column.name for column in columns] + ([split.key] if split is not None and split.key is not None else [])
    for name in wanted:
        if name not in names and path_to(batch.schema, name):
            names.append(name)
            arrays.append(column_at(batch, name))
    return pa.RecordBatch.from_arrays(arrays, names)


def _filtered(rows: UnitRows, filter: pc.Expression | None) -> UnitRows:
    """The rows for which the filter is true."""
    if filter is None:
        return rows
    places = pa.array(np.arange(rows.batch.num_rows))
    batch = rows.batch.append_column(ROW, places).filter(filter)
    kept = batch.column(ROW).to_numpy()
    return UnitRows(batch.drop_columns([ROW]), rows.numbers[kept])


def _part(rows: UnitRows, split: Split) -> UnitRows:
    """The rows of the part of the split that is read."""
    assert split.key is not None
    try:
        kept = split.rows(rows.batch.column(split.key))
    except (pa.ArrowException, ValueError) as error:
        raise ColumnError(split.key, error) from error
    return UnitRows(rows.batch.filter(pa.array(kept)), rows.numbers[kept])


def _without(rows: UnitRows, places: np.ndarray) -> UnitRows:
    keep = np.ones(rows.batch.num_rows, dtype=bool)
    keep[places] = False
    return UnitRows(rows.batch.filter(pa.array(keep)), rows.numbers[keep])
