"""From a unit of a file to conformed rows: read, filtered, split, checked."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.cache import RecordCache
from recfx.data.columns import Column, VarLen
from recfx.data.conform import BadRows, conform
from recfx.data.files import File, checksum
from recfx.data.formats import Format, Source, open_source, reading
from recfx.data.identity import identity_of
from recfx.data.records import as_records
from recfx.data.rows import BadRow, Decoded, Rows
from recfx.data.schema import check_schema, type_at
from recfx.data.split import Split, check_key
from recfx.kernels.pack_columns import PackPlan

__all__ = ["Decoder", "Recipe"]

MAX_OPENED = 4  # files whose footers are kept, or of compressed CSV the text
ROW = "__recfx_row"  # a column beside the file's while they are filtered


@dataclass(frozen=True)
class Recipe:
    """What is made of the rows of a file, apart from their order."""

    columns: tuple[Column, ...]
    filter: pc.Expression | None = None
    split: Split | None = None
    format: Format | None = None
    on_bad: Literal["raise", "skip"] = "raise"

    @property
    def key(self) -> str:
        """The same for equal recipes, in any process.

        Raises:   NoIdentityError when a part of it, such as a function of the user's, cannot be told from another.
        """
        parts = {name: getattr(self, name) for name in ("columns", "filter", "split", "format", "on_bad")}
        return "; ".join(identity_of(part, name) for name, part in parts.items())

    @property
    def filter_key(self) -> bytes:
        return b"" if self.filter is None else pickle.dumps(self.filter)


class Decoder:
    """Decodes units of files after one recipe, from any thread.

    Args:     checksums: of all files by name; a file is compared with its own when it is first opened.
              in_records: make records of the rows, to be read in any order.
              cache: where records are kept.
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
        self._opened: dict[File, tuple[Source, list[str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

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
        (source, names), recipe = self._open(file), self.recipe
        columns = [replace(c, null="empty") for c in recipe.columns] if source.null_is_missing else recipe.columns
        with reading(file, f" in {source.unit_name} {unit}", "a whole file"):
            rows = source.read(unit, names)
        num_bad = self._judge(rows.bad, file, source, unit)
        with reading(file, f" in {source.unit_name} {unit}", "rows that the filter and the split can look at"):
            rows = _chosen(rows, recipe)
        while True:
            with reading(file, f" in {source.unit_name} {unit}", "columns that Arrow can convert"):
                result = _conformed(rows, columns)
            if not isinstance(result, BadRows):
                return Decoded(result, num_bad)
            numbers = rows.numbers[result.rows]
            found = [BadRow(int(number), result.column, result.got, result.expected) for number in numbers]
            num_bad += self._judge(found, file, source, unit)
            rows = _without(rows, result.rows)

    def _open(self, file: File) -> tuple[Source, list[str]]:
        """The file, and the columns of it that are read."""
        file.check_unchanged()
        opened = self._opened.get(file)
        if opened is None:
            if self._checksums is not None and file not in self._verified:
                self._verify(file)
            types = {column.name: _csv_type(column) for column in self.recipe.columns}
            source = open_source(file, types, self.recipe.format, self.recipe.columns)
            check_schema(file.path, source.schema, self.recipe.columns)
            opened = source, _needed(file, source.schema, self.recipe)
            if len(self._opened) >= MAX_OPENED:
                self._opened = {}
            self._opened[file] = opened
        return opened

    def _verify(self, file: File) -> None:
        assert self._checksums is not None
        expected = self._checksums.get(file.name)
        if expected is None:
            raise ValueError(f"file '{file.path}': got no checksum in the manifest, expected one. Write it anew.")
        with reading(file, "", "a readable file"):
            got = checksum(file)
        if got != expected:
            raise ValueError(
                f"file '{file.path}': got checksum {got}, expected {expected}. It is not the file that the manifest "
                "was written for: damaged, or changed since."
            )
        self._verified.add(file)

    def _judge(self, bad: Sequence[BadRow], file: File, source: Source, unit: int) -> int:
        """How many rows are skipped; raises the first where they are not."""
        if bad and self.recipe.on_bad == "raise":
            raise bad[0].error(file.path, sum(source.num_rows(earlier) for earlier in range(unit)))
        return len(bad)


def _conformed(rows: Rows, columns: Sequence[Column]) -> pa.RecordBatch | BadRows:
    try:
        return conform(rows.batch, columns)
    except BadRows as bad:
        return bad


def _csv_type(column: Column) -> pa.DataType:
    if column.item == pa.binary() or (isinstance(column, VarLen) and column.string_hash):
        return pa.string()
    return pa.int64() if column.item == pa.int64() else pa.float64()


def _needed(file: File, schema: pa.Schema, recipe: Recipe) -> list[str]:
    """Names of the columns that batches, filter and split read."""
    names = [column.name for column in recipe.columns]
    if recipe.split is not None and recipe.split.key is not None:
        kind = type_at(schema, recipe.split.key)
        if kind is None:
            raise ValueError(f"split: got key '{recipe.split.key}', which '{file.path}' lacks.")
        check_key(recipe.split.key, kind)
        names.append(recipe.split.key)
    if recipe.filter is not None:
        if not _binds(recipe.filter, schema):
            raise ValueError(f"filter: got {recipe.filter}, which does not fit '{file.path}', {schema.names}.")
        fields = enumerate(schema.names)
        names += [name for i, name in fields if not _binds(recipe.filter, schema.remove(i))]
    return list(dict.fromkeys(names))


def _binds(expression: pc.Expression, schema: pa.Schema) -> bool:
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _chosen(rows: Rows, recipe: Recipe) -> Rows:
    """The rows for which the filter is true, of the part that is read."""
    if recipe.filter is not None:
        places = pa.array(np.arange(rows.batch.num_rows))
        batch = rows.batch.append_column(ROW, places).filter(recipe.filter)
        kept = batch.column(ROW).to_numpy()
        rows = Rows(batch.drop_columns([ROW]), rows.numbers[kept])
    if recipe.split is not None and recipe.split.key is not None:
        kept = recipe.split.rows(rows.batch.column(recipe.split.key))
        rows = Rows(rows.batch.filter(pa.array(kept)), rows.numbers[kept])
    return rows


def _without(rows: Rows, places: np.ndarray) -> Rows:
    keep = np.ones(rows.batch.num_rows, dtype=bool)
    keep[places] = False
    return Rows(rows.batch.filter(pa.array(keep)), rows.numbers[keep])
