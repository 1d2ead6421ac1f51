"""Iterates over files as packed batches of a static shape."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pyarrow import fs
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from recfx.checks import check_choice, check_type
from recfx.data.arguments import (
    Filter,
    check_columns,
    check_numbers,
    check_pinned,
    check_transform,
    check_transformed,
    expression_of,
)
from recfx.data.cache import cache_for
from recfx.data.columns import Column
from recfx.data.decode import Decoder, Recipe
from recfx.data.files import File, Paths, match_files, quoted, read_manifest
from recfx.data.formats import Format, check_format
from recfx.data.order import Chunk, Place, Plan, chunks
from recfx.data.packing.pack_columns import PackPlan, Segment, count_items, pack_columns
from recfx.data.packing.pack_records import pack_records
from recfx.data.split import Split
from recfx.data.text.csv import check_named_columns
from recfx.types import NUM_SAMPLES, Batch, Ragged, pack

__all__ = ["BatchIterator", "Reader", "reader"]

Columns = dict[str, Tensor | Ragged]
Position = dict[str, Any]


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
    shard_by: Literal["file", "unit"] = "file",
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
    A unit, below, is what can be decoded by itself: an ORC stripe, a Parquet row group, an Arrow record batch, a
    block of lines of text.

    Args:     paths: files, folders, globs and URIs, a list or one string with commas between.
              columns: `fixedlen`, `varlen` and `hashed`; others in the files are not read.
              epochs: passes over the data, each with its own last batch; None: without end.
              drop_remainder: leave out the last rows of a pass that do not fill a batch, as is usual in training. By
                  default they come in a batch of full shape: empty lists and zeros follow the `batch["num_samples"]`
                  real samples.
              shuffle_rows: 0: rows in their order. n: files and units in a random order, and in it every n rows in a
                  random order, others in every epoch; they depend on seed and epoch alone.
              filter: an expression of `pyarrow.dataset`, or [("clicks", ">", 0), ...] as in `pyarrow.parquet`, over
                  columns of the files; rows for which it is true are read. Parquet row groups whose statistics
                  exclude it are skipped.
              split: a part of the files or rows, see `Split`.
              transform: dict of tensors to dict of tensors, for each batch before it is packed.
              on_bad: "skip" leaves out rows with nulls, wrong lengths or invalid values and counts them in
                  `BatchIterator.num_bad`. A file that cannot be read or has other columns is an error in any case.
                  A row of CSV is a line: one that does not close a quote is bad, and the next line a row of its own.
              rank, world_size: this worker reads files[rank::world_size], or, with shard_by="unit", every
                  world_size-th unit. Workers of a DataLoader share what their process would read in the same way.
              threads: how many units are decoded at once, >= 1.
              prefetch: how many units for each thread are decoded ahead, while the caller works; 0: none, the
                  caller waits while `threads` units are decoded, then has the cores to itself.
              cache: a folder on a local disk that keeps decoded rows, uncompressed. Units found there, by path, size
                  and time of the file and by the arguments above, are mapped into memory instead of decoded. From
                  there any number of shuffle_rows costs about the same. With a function of yours in a column, which
                  may change under one name, nothing is cached and a warning says so; so it does once where the disk
                  is full or the folder read-only. Nobody else may write into the folder's files.
              checksums: a manifest of `recfx inspect --checksums`; every file is compared with it when first opened.
              filesystem, format: where the paths are and what the files are, instead of what paths and files say.
              pin_memory: batches lie in pinned memory, from which a captured step on a GPU copies them without another
                  copy on the host. Torch keeps such memory and uses it again once the copies from it have ended.
    Cost:     memory of threads * (prefetch + 1) decoded units, and of two windows of shuffle_rows where they are not
                  mapped; one pass over the values to pack a batch, and one before to shuffle or keep them.
    Raises:   ValueError when paths match nothing or an argument is out of range; from the iterator when a file cannot
                  be read, has another schema, or holds a bad row. A pass without a batch is a UserWarning that
                  counts the rows.
    Example:  >>> batches = reader("train/*.orc", [fixedlen("label", [0.0])])   # doctest: +SKIP
              >>> for batch in batches: print(batch["label"].shape)             # doctest: +SKIP
    """
    check_numbers({"batch_size": batch_size, "epochs": 1 if epochs is None else epochs, "threads": threads}, 1)
    check_numbers({"shuffle_rows": shuffle_rows, "seed": seed, "prefetch": prefetch}, 0)
    check_choice("on_bad", on_bad, ("raise", "skip"))
    check_choice("shard_by", shard_by, ("file", "unit"))
    check_format(format)
    check_pinned(pin_memory)
    check_columns(columns)
    expression = expression_of(filter)
    files = match_files(paths, filesystem)
    check_named_columns(files, format)
    recipe = Recipe(tuple(columns), expression, split, format, on_bad)
    kept = None if cache is None else cache_for(cache, recipe, files)
    plan = Plan(
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

    The lists of a ragged column have a capacity of batch_size * 2**k items, the least that held every batch so far: it
    only rises, so layouts seldom change, and it never shows in the contents.

    Example:  >>> DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)   # doctest: +SKIP
    """

    plan: Plan
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
        self.told = False  # of columns that no file has

    @property
    def files(self) -> list[File]:
        """That this worker reads from, in their sorted order."""
        return [self.plan.files[i] for i in self.plan.own_files]

    @property
    def identity(self) -> str:
        """Of all that the order of its rows depends on: a `position` belongs to readers of one identity.

        It holds the names, sizes and samples of the files, so they may be moved. Cost: the first time, five reads of
        each file that this worker reads.
        """
        return self.plan.fingerprint

    @property
    def described(self) -> str:
        """The first of its files, by their last folder and name, and how many more there are: for a checkpoint."""
        return self.plan.described_anywhere

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self, Place(), 0, self.epochs)

    def epoch(self, number: int) -> BatchIterator:
        """One pass over the data, the number-th from 0: without shuffling they are all the same."""
        return BatchIterator(self, Place(number), 0, number + 1)

    def start_at(self, position: Position) -> BatchIterator:
        """An iterator over what follows `position`, as `BatchIterator.position` gave it, to the end of its epoch and of
        `epochs`.

        Raises:   ValueError when it was taken from other files, or with other options that change the order of rows.
        """
        it = iter(self)
        it.load_state_dict(position)
        return it

    def first(self) -> Batch:
        """Its first batch: what `capture` wants to see.

        Raises:   ValueError naming the data when they hold none.
        """
        it = self.epoch(0)
        it.warns = False
        try:
            return next(it)
        except StopIteration:
            raise ValueError(f"reader: got {it}, expected a batch at least. {it.advice}") from None
        finally:
            it.close()

    def batch(self, segments: Sequence[Segment]) -> Batch:
        """Packs the rows of the segments into one batch, after the transform."""
        if self.transform is None:
            return self._packed(segments, self.pin_memory)
        batch = self._packed(segments, False)
        columns = self.transform(dict(batch))
        check_transformed(columns, self.batch_size)
        return pack({NUM_SAMPLES: batch[NUM_SAMPLES], **columns}, pin_memory=self.pin_memory)

    def _packed(self, segments: Sequence[Segment], pin_memory: bool) -> Batch:
        if not self.plan.decoder.in_records:
            plan = self._plan_for(count_items(self.packing, segments))
            return Batch(pack_columns(plan, segments, pin_memory=pin_memory), plan.layout)
        plan = self.packing
        buffer, counts = pack_records(plan, segments, pin_memory=pin_memory)
        if (larger := self._plan_for(counts)) is not plan:
            buffer, _ = pack_records(larger, segments, pin_memory=pin_memory)
        if self._cache is not None:
            self._cache.check_pages()
        return Batch(buffer, larger.layout)

    def _plan_for(self, counts: np.ndarray) -> PackPlan:
        """The plan with its capacities raised where they are below the counts."""
        self.packing = self.packing.grown(counts)
        return self.packing


class BatchIterator(Iterator[Batch]):
    """The rest of some epochs. It ends with the data, with an error, on `close()` and when it is let go, and so do its
    threads: no batch comes after.

    Example:  >>> it = iter(batches); next(it); saved = it.position   # doctest: +SKIP
              >>> it = batches.start_at(saved)                        # doctest: +SKIP
    """

    def __init__(self, reader: Reader, place: Place, taken: int, last_epoch: int | None) -> None:
        worker = get_worker_info()
        if worker is not None and reader.pin_memory:
            raise ValueError("pin_memory: got True, expected False in a DataLoader's worker. It cannot use the GPU.")
        self._reader = reader
        self._plan = reader.plan if worker is None else reader.plan.share(worker.id, worker.num_workers)
        self.warns = True  # of a pass without a batch; False is for a caller that raises then
        self._start(place, taken, last_epoch)

    def _start(self, place: Place, taken: int, last_epoch: int | None) -> None:
        self._last_epoch = last_epoch
        self._position = (place, taken)
        self._chunk: Chunk | None = None
        self._taken = taken  # rows of the chunk
        self._chunks = chunks(self._plan, place, last_epoch)
        self._num_bad = place.num_bad
        self._num_left = 0  # rows since the last batch
        self._is_over = self._is_closed = False
        self._epoch_is_empty = taken == 0 and place == Place(place.epoch, num_bad=place.num_bad)

    @property
    def position(self) -> Position:
        """Where the batch last returned ends: a few numbers that JSON can hold."""
        place, taken = self._position
        return {**place._asdict(), "taken": taken, "of": self._plan.fingerprint}

    @property
    def described(self) -> str:
        """The place that `position` holds, for an error."""
        place, taken = self._position
        file = self._plan.files[self._plan.epoch_files(place.epoch)[place.file]]
        window = "the shuffled window that begins in " if self._plan.shuffle_rows else ""
        return f"{taken} rows after the start of {window}unit {place.unit} of {quoted(file.path)}"

    def __str__(self) -> str:
        """Where it reads and the rows that made no batch: what an error says where there was none."""
        reader, recipe = self._reader, self._plan.decoder.recipe
        bad = f", {self._num_bad} bad ones left out" if self._num_bad else ""
        options = f"batch_size={reader.batch_size}, drop_remainder={reader.drop_remainder}"
        options += "" if recipe.filter is None else f", filter={recipe.filter}"
        options += "" if recipe.split is None else f", split={recipe.split}"
        return f"{self._num_left} rows in {self._plan.described} ({options}{bad})"

    @property
    def advice(self) -> str:
        """What to do where there was no batch."""
        if self._num_left:
            return "Give more rows, a smaller batch_size, or drop_remainder=False."
        recipe = self._plan.decoder.recipe
        parts = {"a bad row": self._num_bad, "the filter": recipe.filter is not None, "the split": recipe.split}
        causes = [name for name, is_one in parts.items() if is_one]
        return f"Look at {' and '.join(causes)}." if causes else "Give more rows."

    @property
    def num_bad(self) -> int:
        """Rows that on_bad="skip" left out so far, in all epochs and before a resume too."""
        return self._num_bad

    def state_dict(self) -> Position:
        """`position`, as torchdata's StatefulDataLoader calls it."""
        return self.position

    def load_state_dict(self, state: Position) -> None:
        """Goes on from a position, see `Reader.start_at`."""
        try:
            numbers = dict(state)
            of, taken = numbers.pop("of"), operator.index(numbers.pop("taken"))
            place = Place(*map(operator.index, Place(**numbers)))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"position: got {state}, expected what `BatchIterator.position` gave.") from None
        if of not in (self._plan.fingerprint, self._plan.fingerprint_of_sizes) or min(*place, taken) < 0:
            raise ValueError(
                f"position: got one of {of}, expected one of {self._plan.fingerprint}. Resume needs the data it was "
                "taken from and the same seed, shuffling, filter, split, on_bad, rank, world_size and shard_by."
            )
        self.close()
        last_epoch = self._last_epoch
        self._start(place, taken, last_epoch and max(last_epoch, place.epoch + 1))

    def __next__(self) -> Batch:
        try:
            batch = None if self._is_closed else self._next()
        except BaseException:
            self.close()
            raise
        if batch is None:
            self.close()
            raise StopIteration
        return batch

    def _next(self) -> Batch | None:
        while True:
            segments, missing = self._cut()
            if segments and not (missing and self._reader.drop_remainder):
                batch = self._reader.batch(segments)
                assert self._chunk is not None
                self._check_ended(segments)
                self._position = (self._chunk.place, self._taken)
                self._num_bad, self._num_left, self._epoch_is_empty = self._chunk.num_bad, 0, False
                return batch
            self._num_left = self._reader.batch_size - missing if segments else self._num_left
            if self._chunk is not None:
                self._num_bad = self._chunk.num_bad  # those behind the last batch too
            if self._is_over:
                self._warn_of_absent()
                return None
            if self._epoch_is_empty:
                self._warn()
                if self._last_epoch is None:
                    return None
            self._epoch_is_empty = True

    def _warn(self) -> None:
        if self.warns:
            text = f"recfx: got no batch in a pass over the data, but {self}. {self.advice}"
            warnings.warn(text, stacklevel=4)  # where the caller asked for a batch

    def _warn_of_absent(self) -> None:
        if (absent := self._plan.decoder.absent) and not self._reader.told:
            self._reader.told = True
            warnings.warn(
                f"recfx: got no columns {absent} in any of {self._plan.described}, expected them in one at "
                "least. They were empty in every row. Correct their names, or leave them out.",
                stacklevel=4,
            )

    def close(self) -> None:
        """Ends the iteration and its threads."""
        self._is_closed = True
        self._chunks.close()

    def _cut(self) -> tuple[list[Segment], int]:
        """The next rows of this epoch, and how many are missing to a full batch: then the epoch has ended."""
        segments, missing = [], self._reader.batch_size
        while missing and (chunk := self._chunk_with_rows()) is not None:
            end = min(self._taken + missing, chunk.rows.num_rows)
            segments.append(Segment(chunk.rows, self._taken, end))
            missing -= end - self._taken
            self._taken = end
        return segments, missing

    def _chunk_with_rows(self) -> Chunk | None:
        """The chunk that has the next row of this epoch; None when there is none."""
        while self._chunk is None or self._taken >= self._chunk.rows.num_rows:
            found = next(self._chunks, False)
            self._is_over = found is False
            if self._chunk is None:
                self._check_start(found if isinstance(found, Chunk) else None)
            if not isinstance(found, Chunk):
                return None
            self._taken = 0 if self._chunk is not None else self._taken
            self._chunk = found
        return self._chunk

    def _check_ended(self, segments: Sequence[Segment]) -> None:
        """Of what was read to its end the cache's files must be whole still."""
        if (cache := self._plan.decoder.cache) is not None:
            for segment in segments:
                if segment.end == segment.block.num_rows:
                    cache.check_files(segment.block.memory)

    def _check_start(self, first: Chunk | None) -> None:
        """The first chunk must be the one that the position names: files may have changed with equal sizes."""
        place, taken = self._position
        named = place._replace(num_bad=0) != Place(place.epoch) or taken
        if named and (first is None or first.place != place or first.rows.num_rows < taken):
            raise ValueError(f"position: got {self.position}, where there is no row. It was taken from other files.")
