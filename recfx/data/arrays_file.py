"""A table in memory that is read like a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from recfx.data.files import ARRAYS, File
from recfx.data.open_file import OpenFile
from recfx.data.schema import column_at
from recfx.data.unit_rows import UnitRows

__all__ = ["ArraysFile", "ArraysUnits", "arrays_of"]

MOST_ROWS, FEWEST_ROWS, NUM_UNITS = 1 << 16, 1 << 10, 16  # rows of a unit; units of a small table
NUM_SAMPLES, SAMPLE_ROWS = 16, 64


class ArraysUnits(OpenFile):
    """A table as units of some rows. Rows are copied only where a unit spans two chunks of the table."""

    unit_name = "unit"

    def __init__(self, table: pa.Table, unit_rows: int) -> None:
        self._table, self._unit_rows = table, unit_rows
        self.schema = table.schema
        self.num_units = -(-len(table) // unit_rows)

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
        batch = self._rows(unit * self._unit_rows, self._unit_rows)
        batch = pa.RecordBatch.from_arrays([column_at(batch, name) for name in names], list(names))
        return UnitRows(batch, np.arange(batch.num_rows))

    def num_rows(self, unit: int) -> int:
        return min(self._unit_rows, len(self._table) - unit * self._unit_rows)

    def sample(self) -> str:
        """XXH3 of the schema, the number of rows, and a sample of rows with the first and the last."""
        last = max(len(self._table) - SAMPLE_ROWS, 0)
        starts = sorted({last * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)})
        rows = [self._rows(start, SAMPLE_ROWS).to_pydict() for start in starts]
        return xxhash.xxh3_64_hexdigest(repr((str(self.schema), len(self._table), rows)).encode())

    def _rows(self, start: int, number: int) -> pa.RecordBatch:
        part = self._table.slice(start, number)
        arrays = [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in part.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=part.schema)


@dataclass(frozen=True, eq=False)
class ArraysFile(File):
    """A table in memory."""

    source: ArraysUnits

    def _read_sample(self) -> str:
        return self.source.sample()


def arrays_of(table: pa.Table, world_size: int) -> ArraysFile:
    """The table in units of a size that suits a reader, with equally many for each worker."""
    most_rows = min(max(-(-len(table) // NUM_UNITS), FEWEST_ROWS), MOST_ROWS)
    num_each = max(-(-len(table) // (most_rows * world_size)), 1)
    unit_rows = max(-(-len(table) // (num_each * world_size)), 1)
    nowhere: Any = None
    return ArraysFile(nowhere, ARRAYS, len(table), None, ArraysUnits(table, unit_rows))
