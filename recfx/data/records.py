"""Conformed rows as records in one Arrow array, for shuffling and for the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from recfx.data.conform import block_of
from recfx.data.packing.pack_columns import PackPlan
from recfx.data.packing.pack_records import Records, write_records

__all__ = ["as_records", "records_of"]


def as_records(plan: PackPlan, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a conformed batch as one column of records of `write_records`."""
    starts, records = write_records(plan, block_of(batch), _from_arrows_pool)
    buffers = [None, pa.py_buffer(starts), pa.py_buffer(records)]
    array = pa.LargeBinaryArray.from_buffers(pa.large_binary(), batch.num_rows, buffers)
    return pa.RecordBatch.from_arrays([array], ["record"])


def _from_arrows_pool(number: int) -> np.ndarray:
    return np.frombuffer(pa.allocate_buffer(number), np.uint8)


def records_of(batches: Sequence[pa.RecordBatch]) -> Records:
    """The rows of batches of records, end to end, without copying."""
    parts, num_bytes = [np.empty(0, np.int64)], 0
    for batch in batches:
        array = batch.column(0)
        _, offsets, data = array.buffers()
        starts = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        parts.append(starts[:-1] + data.address)
        num_bytes += int(starts[-1] - starts[0])
    addresses = np.concatenate(parts)
    return Records(addresses, num_bytes // max(len(addresses), 1), batches)
