"""How large a table may become: in rows, in bytes, and in distinct ids of one step."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from recfx.checks import check_type
from recfx.table.index import slots_for
from recfx.table.memory import padded

__all__ = ["Limits"]

BOOKKEEPING_BYTES = 32  # of a row: id 8, vocabulary 4, seen 8, born 4, count 4, its place in the free list 4
CANDIDATE_BYTES = 16  # id 8, vocabulary 4, count 4
WHOLE = "1e3 is a float: write 1000."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of every physical table of a step.

    Args:     max_rows: hard cap; ids beyond it are unknown (`Embedding.unknown` is their value), are not trained, and
              are counted. On a CPU a reserved row costs address space only, on a GPU it costs its memory.
              max_bytes: the same in bytes of memory: index, bookkeeping, candidates, and the gradients of as many rows
              as one step may touch included. The lower cap counts.
              max_unique: most distinct ids one optimiser step may touch. Default max_rows.
    Raises:   TypeError when one is not an int; ValueError when max_rows is not in [1, 2**31) or max_unique is below 1.
    """

    max_rows: int = 2**26
    max_bytes: int | None = None
    max_unique: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_bytes", "max_unique"):
            if isinstance(getattr(self, name), bool):  # an int for Python
                raise TypeError(f"{name}: got {getattr(self, name)}, expected int. It is a number.")
        check_type("max_rows", self.max_rows, int, WHOLE)
        check_type("max_bytes", self.max_bytes, int | None, WHOLE)
        check_type("max_unique", self.max_unique, int | None, WHOLE)
        if not 1 <= self.max_rows < 2**31:
            raise ValueError(f"max_rows: got {self.max_rows}, expected 1 to 2**31 - 1. Row numbers are 32-bit.")
        if self.max_unique is not None and self.max_unique < 1:
            raise ValueError(f"max_unique: got {self.max_unique}, expected at least 1. A step could train nothing.")

    def rows(self, *, floats: int, width: int, candidates: int) -> int:
        """Rows of `floats` f32, of which `width` are weights, that a table with so many candidates has room for.

        Raises:   ValueError when max_bytes has no room for one.
        """
        if self.max_bytes is None:
            return self.max_rows
        of_candidates = CANDIDATE_BYTES * candidates + 8 * slots_for(candidates, 7 / 8)

        def num_bytes(rows: int) -> int:
            bookkeeping = BOOKKEEPING_BYTES * rows + 8 * slots_for(rows, 7 / 8) + of_candidates
            of_a_step = self.unique(rows) * 4 * (1 + padded(width, most_padding=1.0))
            return rows * 4 * padded(floats, most_padding=0.25) + bookkeeping + of_a_step

        rows = bisect.bisect_right(range(2**31), self.max_bytes, key=num_bytes) - 1
        if rows < 1:
            raise ValueError(
                f"max_bytes: got {self.max_bytes}, expected at least {num_bytes(1)}, the bytes of one row and "
                f"{candidates} candidates."
            )
        return min(self.max_rows, rows)

    def unique(self, rows: int) -> int:
        """Distinct ids that one optimiser step of a table of so many rows may touch."""
        return rows if self.max_unique is None else min(rows, self.max_unique)
