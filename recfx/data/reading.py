"""A reader: files in, packed batches of a static shape out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pyarrow import fs
from torch import Tensor
from torch.utils.data import IterableDataset

from recfx.checks import check_choice, check_int, check_type
from recfx.data.arguments import (
    Filter,
    check_reading,
    check_transform,
    check_transformed,
    expression_of,
)
from recfx.data.batch_iterator import BatchIterator, Position
from recfx.data.cache import cache_for
from recfx.data.checksums import read_manifest
from recfx.data.columns import Column
from recfx.data.decode import Decoder, Recipe
from recfx.data.files import File, Paths, match_files
from recfx.data.formats import Format, check_format
from recfx.data.order import ChunkStart, ReadPlan
from recfx.data.packing.pack_columns import PackPlan, Segment, count_items, pack_columns
from recfx.data.packing.pack_records import pack_records
from recfx.data.split import Split
from recfx.data.text.csv import check_named_columns
from recfx.types import NUM_SAMPLES, Batch, Ragged, pack

__all__ = ["Reader", "reader"]

Columns = dict[str, Tensor | Ragged]


def reader(
    paths: Paths,
    columns: Sequence[Column],
    batch_size: int = 1000,
    *,
    epochs: int | None = 1,
    drop_remainder: bool = False,
    shuffle_rows: int = 0,
    seed: int = 0,
    filter: Filter | None = None,
    split: Split | None = None,
    transform: Callable[[Columns], Columns] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    rank: int = 0,
    world_size: int = 1,
    shard_by: Literal["file", "unit", "row"] = "file",
    threads: int = 1,
    prefetch: int = 1,
    cache: str | os.PathLike[str] | None = None,
    checksums: str | os.PathLike[str] | None = None,
    filesystem: fs.FileSystem | None = None,
    format: Format | None = None,
    pin_memory: bool = False,
) -> Reader:
    """Batches of the rows of ORC, Parquet, Arrow IPC, CSV, JSON lines or libsvm files, in the order of their names.

    A worker's rows are one stream: a batch may hold rows of two files. Batches do not depend on threads and prefetch.
    A unit is a part of a file that can be decoded separately: an ORC stripe, a Parquet row group, an Arrow record
    batch, a block of lines of text.

    Args:     paths: files, folders, globs and URIs, a list or one string with commas between.
              columns: `fixedlen`, `varlen` and `hashed`; other columns of the files are not read.
              epochs: passes over the data; a batch never holds rows of two passes. None: without end.
              drop_remainder: drop the last rows of a pass that do not fill a batch, as is usual in training. By default
                  they come in a batch of full shape: empty lists and zeros follow the `batch["num_samples"]` real
                  samples.
              shuffle_rows: 0: rows in their order. n: files and units in a random order, and every n consecutive rows
                  of it in a random order. Both orders depend on the seed and the epoch only.
              filter: an expression of `pyarrow.dataset`, or [("clicks", ">", 0), ...] as in `pyarrow.parquet`, over
                  columns of the files. Only rows for which it is true are read. Parquet row groups whose statistics
                  exclude it are skipped.
              split: a part of the files or rows, see `Split`.
              transform: a function of each batch before it is packed, from a dict of tensors to a dict of tensors.
              on_bad: "skip" drops rows with nulls, wrong lengths or invalid values and counts them in
                  `BatchIterator.num_bad`. A file that cannot be read or has other columns is always an error. A row
                  of CSV is one line: a line that does not close a quote is bad, and the next line is a new row.
              rank, world_size: this worker reads files[rank::world_size], or, with shard_by="unit", every
                  world_size-th unit; with shard_by="row" it decodes all units and keeps every world_size-th
                  row of those that filter, split and on_bad leave; a bad row is in num_bad of one worker. The workers
                  of a DataLoader divide the rows of their process in the same way.
              threads: how many units are decoded at the same time, >= 1.
              prefetch: how many units per thread are decoded ahead, while the caller works. 0: none; the caller waits
                  while `threads` units are decoded, and no decoding runs while it works.
              cache: a folder on a local disk that stores decoded rows, uncompressed. A unit found there, by path, size
                  and time of the file and by the arguments above, is mapped into memory instead of decoded; then any
                  number of shuffle_rows costs about the same. With a user's function in a column, which may change
                  under one name, nothing is cached and the reader warns. It also warns, once, when the disk is full
                  or the folder read-only. No other program may write to the files in the folder.
              checksums: a manifest of `recfx inspect --checksums`. Every file is compared with it when it is first
                  opened.
              filesystem, format: of the files. Default: as the paths, extensions and first bytes of files specify.
              pin_memory: put batches into pinned memory, from which a captured step on a GPU copies them without
                  another copy on the host. Torch reuses such memory after the copies from it have ended.
    Cost:     memory of threads * (prefetch + 1) decoded units, and of two blocks of shuffle_rows where they are not
                  mapped; one pass over the values to pack a batch, and one before to shuffle or cache them.
    Raises:   ValueError when paths match nothing or an argument is out of range; from the iterator when a file cannot
                  be read, has another schema, or holds a bad row. A pass without a batch is a UserWarning with the
                  number of rows.
    Example:  >>> batches = reader("train/*.orc", [fixedlen("label", [0.0])])   # doctest: +SKIP
              >>> for batch in batches: print(batch["label"].shape)             # doctest: +SKIP
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
    check_int("shuffle_rows", shuffle_rows, 0)
    check_choice("shard_by", shard_by, ("file", "unit", "row"))
    check_format(format)
    expression = expression_of(filter)
    files = match_files(paths, filesystem)
    check_named_columns(files, format)
    recipe = Recipe(tuple(columns), expression, split, format, on_bad)
    kept = None if cache is None else cache_for(cache, recipe, files)
    plan = ReadPlan(
        files=files if split is None else split.files(files),
        decoder=Decoder(
            recipe,
            None if checksums is None else read_manifest(checksums),
            in_records=shuffle_rows > 0 or kept is not None,
            cache=kept,
        ),
        rank=rank,
        world_size=world_size,
        shard_by=shard_by,
        shuffle_rows=shuffle_rows,
        seed=seed,
        threads=threads,
        prefetch=prefetch,
    )
    return Reader(plan, batch_size, epochs, drop_remainder, transform, pin_memory)


@dataclass(eq=False)
class Reader(IterableDataset):
    """An iterable of `Batch`, and a data set for torch's DataLoader. Built by `reader`.

    The capacity of a ragged column is batch_size * 2**k items, the smallest that fits every batch so far. It only
    grows, so layouts seldom change. It does not change the contents of a batch.

    Example:  >>> DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)   # doctest: +SKIP
    """

    plan: ReadPlan
    batch_size: int
    epochs: int | None
    drop_remainder: bool
    transform: Callable[[Columns], Columns] | None
    pin_memory: bool
    packing: PackPlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan.check()
        check_type("drop_remainder", self.drop_remainder, bool)
        check_transform(self.transform)
        self.packing = PackPlan.of(self.batch_size, [column.packed for column in self.plan.decoder.recipe.columns])
        self._cache = self.plan.decoder.cache
        self.has_warned_of_absent = False  # columns that no file has

    @property
    def files(self) -> list[File]:
        """The files that this worker reads, sorted."""
        return [self.plan.files[i] for i in self.plan.own_files]

    @property
    def identity(self) -> str:
        """Hash of everything that the order of rows depends on. A `position` is valid for readers of one identity.

        It contains names, sizes and samples of the files, not folders, so files may be moved. Cost: the first time,
        five reads of each file that this worker reads.
        """
        return self.plan.fingerprint

    @property
    def described(self) -> str:
        """Its first files, by last folder and name, and the number of the others, for a checkpoint."""
        return self.plan.described_anywhere

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self, ChunkStart(), 0, self.epochs)

    def epoch(self, number: int) -> BatchIterator:
        """The pass over the data with this number, from 0. Without shuffling all passes are the same."""
        return BatchIterator(self, ChunkStart(number), 0, number + 1)

    def start_at(self, position: Position) -> BatchIterator:
        """An iterator from a `BatchIterator.position` on: the next batch is exactly the one that would have followed.

        It ends with the position's epoch or the last of `epochs`, whichever is later.

        Raises:   ValueError when the position comes from other files, or from options with another order of rows.
        """
        it = iter(self)
        it.load_state_dict(position)
        return it

    def first(self) -> Batch:
        """The first batch, from which `capture` takes its shapes.

        Raises:   ValueError naming the data when there is none.
        """
        it = self.epoch(0)
        it.warns = False
        try:
            return next(it)
        except StopIteration:
            raise ValueError(f"reader: got {it}, expected at least one batch. {it.advice}") from None
        finally:
            it.close()

    def batch(self, segments: Sequence[Segment]) -> Batch:
        """Packs the rows of the segments into one batch, after the transform."""
        if self.transform is None:
            return self.packed(segments, self.pin_memory)
        batch = self.packed(segments, False)
        columns = self.transform(dict(batch))
        check_transformed(columns, self.batch_size)
        return pack({NUM_SAMPLES: batch[NUM_SAMPLES], **columns}, pin_memory=self.pin_memory)

    def packed(self, segments: Sequence[Segment], pin_memory: bool) -> Batch:
        """Packs the rows of the segments into one batch, before the transform."""
        if not self.plan.decoder.in_records:
            plan = self.plan_for(count_items(self.packing, segments))
            return Batch(pack_columns(plan, segments, pin_memory=pin_memory), plan.layout)
        plan = self.packing
        buffer, counts = pack_records(plan, segments, pin_memory=pin_memory)
        if (larger := self.plan_for(counts)) is not plan:
            buffer, _ = pack_records(larger, segments, pin_memory=pin_memory)
        self.check_pages()
        return Batch(buffer, larger.layout)

    def check_pages(self) -> None:
        """Raises ValueError when the cache's files, from which rows were packed, have become shorter."""
        if self._cache is not None:
            self._cache.check_pages()

    def plan_for(self, counts: np.ndarray) -> PackPlan:
        """The plan, with its capacities raised to the counts where they are smaller."""
        self.packing = self.packing.grown(counts)
        return self.packing
