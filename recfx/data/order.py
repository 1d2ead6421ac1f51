"""The order of rows: which units of which files one worker reads in an epoch, and how rows are shuffled.

The order is a function of (seed, epoch) and the files, so a place in it is a few numbers.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from recfx.data.conform import block_of
from recfx.data.decode import Decoder
from recfx.data.files import File, quoted
from recfx.data.packing.pack_columns import Block
from recfx.data.packing.pack_records import Records
from recfx.data.records import records_of

__all__ = ["Chunk", "ChunkStart", "ReadPlan", "chunks"]

MAX_NAMED = 3  # files in an error
SAMPLING_THREADS = 32  # each waits for a file system, which may be remote


class ChunkStart(NamedTuple):
    """The place where a chunk begins."""

    epoch: int = 0
    file: int = 0  # in the epoch's order of files
    unit: int = 0  # in the epoch's order of the file's units
    row: int = 0  # of the rows that are left of the unit; always 0 without shuffling
    window: int = 0  # number of the shuffle block in the epoch
    num_bad: int = 0  # rows skipped before the unit


class Chunk(NamedTuple):
    """Rows that are ready to be cut into batches."""

    rows: Block | Records
    place: ChunkStart
    num_bad: int  # rows skipped so far, in the chunk's units too


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """What one worker reads, in which order, and how many units ahead."""

    files: Sequence[File]  # of all workers
    decoder: Decoder
    rank: int
    world_size: int
    shard_by: Literal["file", "unit", "row"]
    shuffle_rows: int  # 0: rows in the order of the files
    seed: int
    threads: int
    prefetch: int

    def check(self) -> ReadPlan:
        """Raises ValueError when the rank is out of range, or a worker would have no file."""
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: got {self.rank} of world_size {self.world_size}, expected 0 <= rank < world_size.")
        if not self.own_files:
            raise _no_share(self)
        return self

    def share(self, worker: int, num_workers: int) -> ReadPlan:
        """The part of this plan that one of `num_workers` workers reads."""
        rank, world_size = self.rank + worker * self.world_size, self.world_size * num_workers
        return replace(self, rank=rank, world_size=world_size).check()

    @property
    def own_files(self) -> list[int]:
        """Indices of the files that this worker reads from."""
        all_files = range(len(self.files))
        return list(all_files[self.rank :: self.world_size] if self.shard_by == "file" else all_files)

    @property
    def described(self) -> str:
        """The paths of this worker's first files, and the number of the others, for errors."""
        return self._listed(None)

    @property
    def described_anywhere(self) -> str:
        """As `described`, with the last folder and the name only: the same after the files are moved together."""
        return self._listed(2)

    def _listed(self, num_parts: int | None) -> str:
        """The last `num_parts` parts of the paths of the first files; None: all parts."""
        paths = [self.files[i].path.split("/") for i in self.own_files]
        named = [quoted("/".join(parts[-num_parts:] if num_parts else parts)) for parts in paths[:MAX_NAMED]]
        return ", ".join(named) + f" and {len(paths) - MAX_NAMED} more" * (len(paths) > MAX_NAMED)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the order of rows depends on, and of samples of this worker's files, without folders.

        Cost:     the first time, `File.sample` of each of this worker's files, several at once.
        Raises:   ValueError when a file cannot be read.
        """
        files = [self.files[i] for i in self.own_files]
        with ThreadPoolExecutor(min(len(files), SAMPLING_THREADS), thread_name_prefix="recfx-sample") as pool:
            samples = list(pool.map(File.sample, files))
        return xxhash.xxh3_64_hexdigest(repr((self.fingerprint_of_sizes, samples)).encode())

    @functools.cached_property
    def fingerprint_of_sizes(self) -> str:
        """The fingerprint in positions of older versions, without samples of files. They are still accepted."""
        recipe = self.decoder.recipe
        rows = (recipe.filter_key, recipe.split, recipe.format, recipe.on_bad)
        order = (self.rank, self.world_size, self.shard_by, self.shuffle_rows, self.seed)
        files = [(file.name, file.size) for file in self.files]
        return xxhash.xxh3_64_hexdigest(repr((files, rows, order)).encode())

    def epoch_files(self, epoch: int) -> list[int]:
        """This worker's files in the order of the epoch."""
        return self._shuffled(self.own_files, epoch, 0)

    def units(self, epoch: int, file: int) -> list[int]:
        """This worker's units of a file, by its index, in the order of the epoch."""
        units = self.decoder.units(self.files[file])
        if self.shard_by == "unit":
            units = [unit for unit in units if (file + unit) % self.world_size == self.rank]
        return self._shuffled(units, epoch, 1, file)

    def window(self, epoch: int, number: int, batches: Sequence[pa.RecordBatch]) -> Records:
        """The rows of a shuffle block in its random order."""
        records = records_of(batches)
        np.random.default_rng([self.seed, epoch, 2, number]).shuffle(records.addresses)
        return records

    def _shuffled(self, items: list[int], *key: int) -> list[int]:
        if not self.shuffle_rows:
            return items
        return [items[i] for i in np.random.default_rng([self.seed, *key]).permutation(len(items))]


class _Unit(NamedTuple):
    batch: pa.RecordBatch
    num_bad: int
    place: ChunkStart


def chunks(plan: ReadPlan, start: ChunkStart, last_epoch: int | None) -> Generator[Chunk | None, None, None]:
    """The rows from a place on, and None at the end of each epoch before `last_epoch` (None: without end)."""
    units = _decoded(_tasks(plan, start, last_epoch), plan.threads, plan.prefetch)
    try:
        yield from _windows(plan, start, units) if plan.shuffle_rows else _whole_units(plan, start, units)
    finally:
        units.close()


def _whole_units(plan: ReadPlan, start: ChunkStart, units: Iterator[_Unit | None]) -> Iterator[Chunk | None]:
    num_bad = start.num_bad
    for unit in units:
        if unit is None:
            yield None
        else:
            place, num_bad = unit.place._replace(num_bad=num_bad), num_bad + unit.num_bad
            yield Chunk(records_of([unit.batch]) if plan.decoder.in_records else block_of(unit.batch), place, num_bad)


def _windows(plan: ReadPlan, start: ChunkStart, units: Iterator[_Unit | None]) -> Iterator[Chunk | None]:
    """Blocks of `shuffle_rows` rows, each in a random order. A block is known by its first place and its number, so
    resuming is cheap."""
    held: list[pa.RecordBatch] = []
    row, number, num_bad, place = start.row, start.window, start.num_bad, start
    missing = plan.shuffle_rows

    def window() -> Chunk:
        return Chunk(plan.window(place.epoch, place.window, held), place, num_bad)

    for unit in units:
        if unit is not None:
            before, num_bad = num_bad, num_bad + unit.num_bad
            while row < unit.batch.num_rows:
                if not held:
                    place = unit.place._replace(row=row, window=number, num_bad=before)
                held.append(unit.batch.slice(row, missing))
                row, missing = row + held[-1].num_rows, missing - held[-1].num_rows
                if not missing:
                    yield window()
                    held, number, missing = [], number + 1, plan.shuffle_rows
            row = 0
        else:
            if held:
                yield window()
            yield None
            held, number, missing = [], 0, plan.shuffle_rows


def _tasks(plan: ReadPlan, start: ChunkStart, last_epoch: int | None) -> Iterator[Callable[[], _Unit | None]]:
    """One task for each unit, in order, and one for the end of each epoch. A task that fails is the last one."""
    for epoch in count(start.epoch) if last_epoch is None else range(start.epoch, last_epoch):
        at = start if epoch == start.epoch else ChunkStart(epoch)
        files, num_units = plan.epoch_files(epoch), 0
        for file in range(at.file, len(files)):
            try:
                units = plan.units(epoch, files[file])
            except ValueError as error:
                yield functools.partial(_fail, error)
                return
            num_units += len(units)
            for unit in range(at.unit if file == at.file else 0, len(units)):
                yield functools.partial(_read, plan, ChunkStart(epoch, file, unit), files[file], units[unit])
        if not num_units and plan.shard_by == "unit" and plan.world_size > 1 and at == ChunkStart(epoch):
            yield functools.partial(_fail, _no_share(plan))
            return
        yield _end_of_epoch


def _read(plan: ReadPlan, place: ChunkStart, file: int, unit: int) -> _Unit:
    rows, num_bad = plan.decoder.read(plan.files[file], unit)
    if plan.shard_by != "row" or plan.world_size == 1:
        return _Unit(rows, num_bad, place)
    own = _every_nth(rows, (plan.rank - file - unit) % plan.world_size, plan.world_size)
    if plan.decoder.cache is not None:
        plan.decoder.cache.check_files([rows])  # they were copied, so no batch that holds them will look
    counts_bad = (file + unit) % plan.world_size == plan.rank  # all workers see a unit's bad rows, one counts them
    return _Unit(own, num_bad if counts_bad else 0, place)


def _every_nth(rows: pa.RecordBatch, first: int, n: int) -> pa.RecordBatch:
    """Rows first, first + n, ... The last of all follows them in memory: reading a record reads 8 bytes after it."""
    if not rows.num_rows:
        return rows
    places = np.append(np.arange(first, rows.num_rows, n), rows.num_rows - 1)
    return rows.take(pa.array(places)).slice(0, len(places) - 1)


def _end_of_epoch() -> None:
    return None


def _fail(error: ValueError) -> Any:
    raise error


def _no_share(plan: ReadPlan) -> ValueError:
    by_unit = ", share the files with shard_by='unit'" if plan.shard_by == "file" else ""
    return ValueError(
        f"rank: got {plan.rank} of {plan.world_size} workers for {len(plan.files)} files, expected a {plan.shard_by} "
        f"for each worker. The others would wait for a worker without rows. Start fewer workers{by_unit} or split the "
        "data."
    )


def _decoded(tasks: Iterator[Callable[[], Any]], threads: int, prefetch: int) -> Generator[Any, None, None]:
    """The results of the tasks, in order. See `reader` for threads and prefetch."""
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
