"""Rows decoded from a unit of a file, and the bad ones among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recfx.data.files import quoted, subject

__all__ = ["BadRow", "BadRows", "ColumnError", "Decoded", "UnitRows"]


MOST_SHOWN = 50  # characters of a value in an error


class BadRow(NamedTuple):
    """A row that cannot be read."""

    number: int  # in its unit
    column: str | None  # None: the row as a whole
    got: str
    expected: str

    def error(self, path: str, first_row: int) -> ValueError:
        """The error, naming the file and the row in it. The row's unit begins at row `first_row` of the file."""
        where = subject(path) if self.column is None else f"column '{self.column}' of {quoted(path)}"
        return ValueError(f"{where}, row {first_row + self.number}: got {self.got}, expected {self.expected}.")


class BadRows(Exception):  # noqa: N818  not an error yet: on_bad decides
    """Rows of a batch with values that a column does not accept."""

    def __init__(self, column: str, rows: np.ndarray, got: Callable[[int], str], expected: str) -> None:
        self.column = column
        self.rows = rows  # rising indices
        self.got, self.expected = got(int(rows[0])), expected


class ColumnError(ValueError):
    """A column of a batch that cannot be converted."""

    def __init__(self, column: str, error: Exception) -> None:
        self.column, self.words = column, next(iter(str(error).splitlines()), type(error).__name__)
        super().__init__(f"column '{column}': got {self.words!r}, expected values that Arrow can convert.")

    def of(self, path: str, where: str) -> ValueError:
        """The error, naming the file and the place `where` in it."""
        return ValueError(
            f"column '{self.column}' of {quoted(path)}: got {self.words!r}{where}, expected values that Arrow can "
            "convert."
        )


class UnitRows(NamedTuple):
    """The decoded rows of a unit."""

    batch: pa.RecordBatch
    numbers: np.ndarray  # i64: the number of each row in its unit
    bad: Sequence[BadRow] = ()  # rows that the format could not decode, not in the batch


class Decoded(NamedTuple):
    """The rows of a unit after filter, split and checks."""

    batch: pa.RecordBatch  # conformed rows, or the same rows as records
    num_bad: int  # rows skipped
