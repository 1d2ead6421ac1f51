"""A reader of data in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from recfx.checks import check_type
from recfx.data.arguments import Filter, check_reading, expression_of
from recfx.data.arrays_file import arrays_of
from recfx.data.arrow_tables import table_of
from recfx.data.columns import Column
from recfx.data.decode import Decoder, Recipe
from recfx.data.order import ReadPlan
from recfx.data.reading import Columns, Reader
from recfx.data.split import Split

__all__ = ["from_arrays"]


def from_arrays(
    data: Any,
    columns: Sequence[Column],
    batch_size: int = 1000,
    *,
    shuffle: bool = False,
    epochs: int | None = 1,
    drop_remainder: bool = False,
    seed: int = 0,
    filter: Filter | None = None,
    split: Split | None = None,
    transform: Callable[[Columns], Columns] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
    prefetch: int = 1,
    pin_memory: bool = False,
) -> Reader:
    """Batches of the rows of arrays or a frame, read as `reader` reads a file with the same columns.

    Args:     data: a dict by column name of numpy arrays, lists, torch tensors or Ragged; a pandas or polars DataFrame;
                  an Arrow table, record batch or reader of record batches, or an object with the Arrow interface. A
                  two-dimensional array is a column of lists of one length. A pandas frame is read like the file that
                  `to_parquet` writes: NaN is null, so a column of ids with missing values is exact below 2**53 and
                  needs `null="empty"`.
              columns: as for `reader`. Python lists may hold the values that `pack_rows` accepts.
              shuffle: all rows in a random order that depends on the seed and the epoch only.
              split: with a key; arrays are split by row.
              rank, world_size: this worker reads every world_size-th run of rows.
              epochs, drop_remainder, seed, filter, transform, on_bad, threads, prefetch, pin_memory: see `reader`.
    Returns:  a `Reader`, with `epoch`, `start_at` and `position`. A reader of other arrays rejects a position: their
              types, the number of rows and a sample of rows are compared. Arrays must not change while they are read.
    Cost:     numbers, and Arrow strings and lists, are not copied. With shuffle all rows are copied in each epoch,
              100 to 400 bytes each.
    Raises:   TypeError when data is something else. ValueError naming the column when one is absent or has another
              type or length; from the iterator, naming the row, when one is bad.
    Example:  >>> import numpy as np, torch
              >>> from recfx.data import fixedlen, varlen
              >>> columns = [fixedlen("label", [0.0]), varlen("item", torch.int64)]
              >>> batches = from_arrays({"label": np.array([0.0, 1.0]), "item": [[7, 8], [9]]}, columns, 2)
              >>> next(iter(batches))["item"].offsets.tolist()
              [0, 2, 3]
    """
    check_reading(
        columns,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        threads=threads,
        prefetch=prefetch,
        on_bad=on_bad,
        pin_memory=pin_memory,
    )
    check_type("shuffle", shuffle, bool, "All rows are shuffled, or none.")
    if split is not None and split.key is None:
        raise ValueError("split: got no key, expected one: arrays are split by row. Name a key column.")
    expression = expression_of(filter)
    keys = [] if split is None or split.key is None else [split.key]
    table = table_of(data, columns, keys, others=expression is not None)
    recipe = Recipe(tuple(columns), expression, split, None, on_bad)
    plan = ReadPlan(
        files=[arrays_of(table, world_size)],
        decoder=Decoder(recipe, in_records=shuffle),
        rank=rank,
        world_size=world_size,
        shard_by="unit",
        shuffle_rows=max(len(table), 1) if shuffle else 0,
        seed=seed,
        threads=threads,
        prefetch=prefetch,
    )
    return Reader(plan, batch_size, epochs, drop_remainder, transform, pin_memory)
