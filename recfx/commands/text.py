"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(table: Sequence[Sequence[str]], *, num_left: int) -> str:
    """Rows of cells as lines, the first columns aligned to the left, the others to the right.

    Example:  >>> print(aligned([("name", "rows"), ("item", "7")], num_left=1))
              name  rows
              item     7
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)
