"""Rows on their way from a file to a batch, and what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recfx.data.files import quoted, subject

__all__ = ["BadRow", "BadRows", "ColumnError", "Decoded", "UnitRows"]


MOST_SHOWN = 50  # characters of a value in an error


class BadRow(NamedTuple):
    """A row that cannot be used."""

    number: int  # in its unit
    column: str | None  # None: the row as a whole
    got: str
    expected: str

    def error(self, path: str, first_row: int) -> ValueError:
        """Names the file and the row in it, whose unit begins at `first_row`."""
        where = subject(path) if self.column is None else f"column '{self.column}' of {quoted(path)}"
        return ValueError(f"{where}, row {first_row + self.number}: got {self.got}, expected {self.expected}.")


class BadRows(Exception):  # noqa: N818  not an error yet: the policy decides
    """Rows of a batch that a column cannot take."""

    def __init__(self, column: str, rows: np.ndarray, got: Callable[[int], str], expected: str) -> None:
        self.column = column
        self.rows = rows  # rising indices
        self.got, self.expected = got(int(rows[0])), expected


class ColumnError(ValueError):
    """A column of a batch as a whole that cannot be converted."""

    def __init__(self, column: str, error: Exception) -> None:
        self.column, self.words = column, next(iter(str(error).splitlines()), type(error).__name__)
        super().__init__(f"column '{column}': got {self.words!r}, expected values that Arrow can convert.")

    def of(self, path: str, where: str) -> ValueError:
        """Names the file, and `where` in it."""
        return ValueError(
            f"column '{self.column}' of {quoted(path)}: got {self.words!r}{where}, expected values that Arrow can "
            "convert."
        )


class UnitRows(NamedTuple):
    """Decoded rows of a unit."""

    batch: pa.RecordBatch
    numbers: np.ndarray  # i64, of each row in its unit
    bad: Sequence[BadRow] = ()  # left out of the batch by the format itself


class Decoded(NamedTuple):
    """What is left of a unit."""

    batch: pa.RecordBatch  # conformed, or these rows as records
    num_bad: int  # rows skipped
