"""A process that reads damaged files, one after the other, and may die of it: `python -m tests.data.damage`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from recfx.data import fixedlen, reader, varlen
from tests.data.rows import all_rows

COLUMNS = [fixedlen("label", [0.5]), varlen("x", torch.float32), varlen("c", torch.int64), varlen("word", torch.uint8)]


def outcome(path: str, checksums: str | None) -> dict[str, Any]:
    """Rows read before an error, as text, and the error."""
    rows: list[str] = []
    try:
        for batch in reader(path, COLUMNS, 8, drop_remainder=False, prefetch=0, checksums=checksums):
            rows += map(repr, all_rows([batch]))
    except ValueError as error:
        return {"rows": rows, "error": str(error)}
    return {"rows": rows, "error": None}


def main() -> None:
    """Answers each line of standard input, [path, checksums], with a line."""
    for line in sys.stdin:
        path, checksums = json.loads(line)
        print(json.dumps(outcome(path, checksums)), flush=True)


if __name__ == "__main__":
    main()
