"""Rows as Python values, and files of every format that hold them: what the reader's tests compare with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import csv as pa_csv
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.types import NUM_SAMPLES, Batch, Ragged

FORMATS = ("orc", "parquet", "arrow")


def write(path: Path, table: pa.Table, unit_rows: int | None = None) -> str:
    """A file of the format that its extension names, of units of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unit_rows = unit_rows or max(len(table), 1)
    units = [table.slice(start, unit_rows) for start in range(0, len(table), unit_rows)] or [table]
    match path.suffix:
        case ".orc":
            with orc.ORCWriter(str(path), stripe_size=1, batch_size=unit_rows) as writer:
                for unit in units:
                    writer.write(unit)
        case ".parquet":
            pq.write_table(table, path, row_group_size=unit_rows, write_page_checksum=True)
        case ".arrow":
            with pa.ipc.new_file(str(path), table.schema) as writer:
                for unit in units:
                    writer.write_table(unit)
        case ".csv":
            pa_csv.write_csv(table, path, pa_csv.WriteOptions(quoting_style="needed"))
    return str(path)


def nested(offsets: Sequence[torch.Tensor], leaves: list, first: int, last: int) -> list:
    """Lists [first, last) of the outermost level as Python lists."""
    if not offsets:
        return leaves[first:last]
    ends = offsets[0].tolist()[first : last + 1]
    return [nested(offsets[1:], leaves, a, b) for a, b in itertools.pairwise(ends)]


def lists_of(column: Ragged, num_samples: int) -> list:
    """A ragged column's samples: numbers, (number, weight) pairs, or bytes."""
    offsets, leaves = [*column.outer, column.offsets], column.values.tolist()
    if column.values.dtype == torch.uint8:
        ends = offsets.pop().tolist()
        leaves = [bytes(column.values[a:b].tolist()) for a, b in itertools.pairwise(ends)]
    elif column.weights is not None:
        leaves = list(zip(leaves, column.weights.tolist(), strict=True))
    return nested(offsets, leaves, 0, num_samples)


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """The real samples of a batch."""
    n = batch[NUM_SAMPLES].item()
    columns = {
        name: lists_of(column, n) if isinstance(column, Ragged) else column.tolist()[:n]
        for name, column in batch.items()
        if name != NUM_SAMPLES
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def all_rows(batches: Iterable[Batch]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in rows_of(batch)]
