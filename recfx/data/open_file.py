"""A file opened for reading, unit by unit: what every format implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.unit_rows import UnitRows

__all__ = ["OpenFile"]


class OpenFile(ABC):
    """A file as it was when it was opened. Every read opens it again: no handle stays, and threads share nothing."""

    schema: pa.Schema
    num_units: int
    unit_name: str
    null_is_missing = False  # the format has no other way to write a missing value
    cells_are_bytes = False  # column types are given or guessed, and every column can be read as binary
    absent: frozenset[str] = frozenset()  # columns that the caller reads and that the first rows lack

    def matching(self, expression: pc.Expression | None) -> Iterable[int]:
        """The units that may hold a row for which the expression is true."""
        return range(self.num_units)

    @abstractmethod
    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
        """Columns by name, and fields of structs by dotted name."""

    @abstractmethod
    def num_rows(self, unit: int) -> int:
        """The number of rows of a unit, bad rows included."""
