"""Iterates over ORC files as packed batches of a static shape."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from recfx.data.columns import Column, FixedLen
from recfx.data.orc import Paths, count_stripes, locate_row, match_files, read_block, shard_files
from recfx.kernels.pack_columns import Block, PackPlan, Segment, count_values, pack_columns
from recfx.types import NUM_SAMPLES, Batch, Ragged, pack

__all__ = ["BatchIterator", "Reader", "orc_reader"]

Columns = dict[str, Tensor | Ragged]
Position = dict[str, int]


def orc_reader(
    paths: Paths,
    columns: Sequence[Column],
    batch_size: int = 1000,
    *,
    drop_remainder: bool = True,
    threads: int = 1,
    prefetch: int = 1,
    rank: int = 0,
    world_size: int = 1,
    transform: Callable[[Columns], Columns] | None = None,
) -> Reader:
    """Batches of the rows of ORC files, in the order of the sorted file names, each file's rows in order.

    A worker's rows are one stream: a batch may hold rows of two files. Batches do not depend on threads and prefetch.

    Args:     paths: files, folders and globs, a list or one string with commas between.
              columns: `fixedlen` and `varlen`; others in the file are not read. Lists of numbers, or flat numbers
                  as lists of length 1.
              drop_remainder: leave out the last rows that do not fill a batch. Otherwise they come in a batch of full
                  shape: empty lists and zeros follow the `batch["num_samples"]` real samples.
              threads: how many stripes are decoded at once, >= 1.
              prefetch: how many stripes for each thread are decoded ahead, while the caller works; 0: none, the
                  caller waits while `threads` stripes are decoded, then has the cores to itself.
              rank, world_size: this worker reads files[rank::world_size].
              transform: dict of tensors to dict of tensors, for each batch before it is packed.
    Cost:     memory of threads * (prefetch + 1) decoded stripes; one pass over the values to pack a batch.
    Raises:   ValueError when paths match nothing or an argument is out of range; from the iterator when a file cannot
                  be read, has another schema, or holds a null.
    Example:  >>> reader = orc_reader("train/*.orc", [fixedlen("label", [0.0])])   # doctest: +SKIP
              >>> for batch in reader: print(batch["label"].shape)                 # doctest: +SKIP
    """
    for name, value, least in [("batch_size", batch_size, 1), ("threads", threads, 1), ("prefetch", prefetch, 0)]:
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}.")
    names = [column.name for column in columns]
    if not names or len(set(names)) < len(names) or NUM_SAMPLES in names:
        raise ValueError(f"columns: got {names}, expected distinct names, at least one, none of them '{NUM_SAMPLES}'.")
    files = shard_files(match_files(paths), rank, world_size)
    return Reader(files, tuple(columns), batch_size, drop_remainder, threads, prefetch, transform)


class Reader:
    """An iterable of `Batch`; each iteration is one epoch. Built by `orc_reader`.

    The values of a ragged column have a capacity of batch_size * 2**k, the least that held every batch so far: it only
    rises, so layouts seldom change, and it never shows in the contents.
    """

    def __init__(
        self,
        files: list[str],
        columns: tuple[Column, ...],
        batch_size: int,
        drop_remainder: bool,
        threads: int,
        prefetch: int,
        transform: Callable[[Columns], Columns] | None,
    ) -> None:
        self.files = files
        self.columns = columns
        self.batch_size = batch_size
        self.drop_remainder = drop_remainder
        self.threads = threads
        self.prefetch = prefetch
        self.transform = transform
        self._plan = self._build_plan(np.full(len(columns), batch_size, dtype=np.int64))

    def __iter__(self) -> BatchIterator:
        return self.start_at({"file": 0, "row": 0})

    def start_at(self, position: Position) -> BatchIterator:
        """An iterator over what follows `position`, as `BatchIterator.position` gave it.

        Raises:   ValueError when there is no such file or row.
        """
        return BatchIterator(self, position)

    def batch(self, segments: Sequence[Segment]) -> Batch:
        """Packs the rows of the segments into one batch, after the transform."""
        counts = count_values(segments)
        if (counts > self._plan.capacities).any():
            steps = np.maximum(-(-counts // self.batch_size), 1)
            needed = self.batch_size * np.array([1 << (int(n) - 1).bit_length() for n in steps], dtype=np.int64)
            self._plan = self._build_plan(np.maximum(needed, self._plan.capacities))
        batch = Batch(pack_columns(self._plan, segments), self._plan.layout)
        if self.transform is None:
            return batch
        return pack({NUM_SAMPLES: batch[NUM_SAMPLES], **self.transform(dict(batch))})

    def _build_plan(self, capacities: np.ndarray) -> PackPlan:
        fixed = [column for column in self.columns if isinstance(column, FixedLen)]
        return PackPlan.of(
            self.batch_size,
            dtypes={column.name: column.dtype for column in self.columns},
            defaults={column.name: np.array(column.default, dtype=np.float32) for column in fixed},
            capacities=capacities,
        )


class BatchIterator(Iterator[Batch]):
    """One epoch, or the rest of one. Its threads end with the data, with an error, on `close()` and when it is let go.

    Example:  >>> it = iter(reader); next(it); saved = it.position   # doctest: +SKIP
              >>> it = reader.start_at(saved)                        # doctest: +SKIP
    """

    def __init__(self, reader: Reader, position: Position) -> None:
        self._reader = reader
        self._file, row = position["file"], position["row"]
        if not 0 <= self._file <= len(reader.files) or row < 0:
            raise ValueError(f"position: got {position}, expected a row of one of {len(reader.files)} files.")
        stripe, first_row = 0, 0
        if row:
            stripe, first_row = locate_row(reader.files[self._file], reader.columns, row)
        self._block: Block | None = None
        self._block_row = first_row  # of the block's first row, in its file
        self._row = row - first_row  # the next row of the block
        self._position = dict(position)
        tasks = _stripe_tasks(reader.files, reader.columns, self._file, stripe)
        self._stripes = _decoded(tasks, reader.threads, reader.prefetch)

    @property
    def position(self) -> Position:
        """Where the batch last returned ends: {"file": index in the reader's files, "row": next row in it}."""
        return dict(self._position)

    def __next__(self) -> Batch:
        segments, missing = [], self._reader.batch_size
        while missing and (block := self._block_with_rows()) is not None:
            end = min(self._row + missing, block.num_rows)
            segments.append(Segment(block, self._row, end))
            missing -= end - self._row
            self._row = end
        if not segments or (missing and self._reader.drop_remainder):
            self.close()
            raise StopIteration
        batch = self._reader.batch(segments)
        self._position = {"file": self._file, "row": self._block_row + self._row}
        return batch

    def close(self) -> None:
        """Ends the iteration and its threads."""
        self._stripes.close()
        self._block = None

    def _block_with_rows(self) -> Block | None:
        """The block that has the next row; None at the end of the data."""
        while self._block is None or self._row >= self._block.num_rows:
            stripe = next(self._stripes, None)
            if stripe is None:
                return None
            if self._block is not None:
                self._block_row = self._block_row + self._block.num_rows if stripe.file == self._file else 0
                self._row = 0
            elif stripe.file != self._file:
                self._block_row = self._row = 0
            self._file, self._block = stripe.file, stripe.block
        return self._block


class _Stripe(NamedTuple):
    file: int  # index in the reader's files
    block: Block


def _stripe_tasks(
    files: Sequence[str], columns: Sequence[Column], first_file: int, first_stripe: int
) -> Iterator[Callable[[], _Stripe]]:
    """One task for each stripe, in order. A file that cannot be opened is a task that fails, the last one."""
    for file in range(first_file, len(files)):
        try:
            num_stripes = count_stripes(files[file], columns)
        except ValueError as error:
            yield functools.partial(_fail, error)
            return
        for stripe in range(first_stripe if file == first_file else 0, num_stripes):
            yield functools.partial(_read_stripe, file, files[file], stripe, columns)


def _read_stripe(file: int, path: str, stripe: int, columns: Sequence[Column]) -> _Stripe:
    return _Stripe(file, read_block(path, stripe, columns))


def _fail(error: ValueError) -> Any:
    raise error


def _decoded(tasks: Iterator[Callable[[], _Stripe]], threads: int, prefetch: int) -> Generator[_Stripe, None, None]:
    """The results of the tasks, in order. See `orc_reader` for threads and prefetch."""
    if threads == 1 and prefetch == 0:
        yield from (task() for task in tasks)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="recfx-read")
    pending: deque = deque()
    try:
        while True:
            if prefetch or not pending:
                pending.extend(pool.submit(task) for task in islice(tasks, threads * (prefetch + 1) - len(pending)))
            if not pending:
                return
            if not prefetch:
                wait(pending)
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
