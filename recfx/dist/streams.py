"""`deal`: the rows of a reader, dealt to streams, and the streams to ranks.

Stream v of V reads every V-th unit of the files, or every V-th row where a stream would have no unit. A whole batch
has batch_size / V rows of each stream. The rows of a stream and their order do not depend on the number of ranks, so a
run may go on with another number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xxhash

from recfx.checks import check_type
from recfx.data import Reader
from recfx.data.arguments import check_transformed
from recfx.data.batch_iterator import BatchIterator
from recfx.data.kept_units import KeptUnits
from recfx.data.packing.pack_columns import Segment, count_items
from recfx.data.packing.pack_records import pack_records
from recfx.dist.group import Group
from recfx.types import NUM_SAMPLES, Batch, Layout, pack

__all__ = ["RankIterator", "RankReader", "deal"]

Position = dict[str, Any]


def deal(reader: Reader, group: Group) -> RankReader:
    """This rank's share of a reader's rows, as a reader that `recfx.train.train` takes.

    A batch holds the rows of this rank's streams, in their order; of a deterministic group, of one stream, and
    `group.rounds` batches are the share of a whole batch. All ranks give the same number of batches, of the same
    layout: one that has run out gives batches without samples.

    Args:     reader: of all rows; its batch_size is that of the whole batch.
    Raises:   ValueError when the reader is one of several workers', or its batch_size cannot be divided by the number
              of streams.
    """
    check_type("reader", reader, Reader, "Use recfx.data.reader(...).")
    check_type("group", group, Group, "Use recfx.dist.join().")
    if reader.plan.world_size != 1:
        raise ValueError(
            f"reader: got one of world_size {reader.plan.world_size}, expected one of all rows. They are dealt here. "
            "Leave out rank and world_size."
        )
    if reader.batch_size % group.streams:
        raise ValueError(
            f"batch_size: got {reader.batch_size} for {group.streams} streams, expected a multiple. A batch has as "
            "many rows of each. Change it, or the number of streams: join(streams=...), --virtual_shards."
        )
    return RankReader(reader, group)


class RankReader:
    """A rank's share of a reader. Made by `deal`. Every rank must use it in the same way: its iterators exchange small
    messages."""

    def __init__(self, whole: Reader, group: Group) -> None:
        self.group, self.whole = group, whole
        self.sizes: list[int] = []  # of the parts of a batch after the transform
        self.by_row = not _has_unit_for_each(whole, group.streams)
        self.per_stream = whole.batch_size // group.streams
        own = group.own_streams
        places = 1 if group.deterministic else group.streams_per_rank
        self.packer = replace(whole, batch_size=places * self.per_stream)
        threads = max(1, whole.plan.threads // max(1, len(own)))
        shard_by: Any = "row" if self.by_row else "unit"
        plan = replace(whole.plan, world_size=group.streams, shard_by=shard_by, threads=threads)
        ahead = threads * (plan.prefetch + 1) + 2  # streams of one rank are less than a unit apart
        self.kept = KeptUnits(ahead, group.streams * plan.shuffle_rows)
        if self.by_row and len(own) > 1:
            plan = replace(plan, decoder=plan.decoder.keeping(self.kept))
        self.streams = {v: _Stream(replace(plan, rank=v), self.per_stream, 1, False, None, False) for v in own}
        for v, stream in self.streams.items():  # one of them warns of columns that no file has
            stream.has_warned_of_absent = v != own[0] or not group.is_first
        if not own:
            warnings.warn(
                f"recfx: rank {group.rank} has no rows: they are dealt to {group.streams} streams, the number of the "
                "first run, and there are more ranks. It only holds its share of the tables.",
                stacklevel=3,
            )

    @property
    def batch_size(self) -> int:
        """Samples of a whole batch."""
        return self.whole.batch_size

    @property
    def identity(self) -> str:
        """Of the rows and their order in the streams: the same for any number of ranks."""
        return xxhash.xxh3_64_hexdigest(repr((self.whole.identity, self.group.streams, self.by_row)).encode())

    @property
    def described(self) -> str:
        """See `Reader.described`."""
        return self.whole.described

    def __iter__(self) -> RankIterator:
        if self.whole.epochs != 1:
            raise ValueError(
                f"reader: got one with epochs={self.whole.epochs}, expected epochs=1. Its streams end a pass together. "
                "Iterate over epoch(0), epoch(1), ..."
            )
        return self.epoch(0)

    def epoch(self, number: int) -> RankIterator:
        """The pass over the data with this number, from 0."""
        return RankIterator(self, {v: stream.epoch(number) for v, stream in self.streams.items()}, is_new=True)

    def start_at(self, position: Position) -> RankIterator:
        """An iterator from a `RankIterator.position` on, of a run with any number of ranks.

        Raises:   ValueError when it has another number of streams, or comes from other files.
        """
        try:
            num, positions = position["streams"], position["positions"]
        except (KeyError, TypeError):
            raise ValueError(f"position: got {position}, expected a `RankIterator.position`.") from None
        if num != self.group.streams or len(positions) != num:
            raise ValueError(
                f"position: got one of {num} streams, expected {self.group.streams}. Rows are dealt to as many "
                f"streams as when the run began. Join with streams={num}, or --virtual_shards {num}."
            )
        own = {v: stream.start_at(positions[v]) for v, stream in self.streams.items()}
        return RankIterator(self, own, is_new=False)

    def first(self) -> Batch:
        """The first batch, without samples where this rank has none, from which `capture` takes its shapes.

        Raises:   ValueError on every rank when none has a row.
        """
        iterator = self.epoch(0)
        iterator.warns = False
        try:
            return next(iterator)
        except StopIteration:
            raise ValueError(f"reader: got {iterator}, expected at least one batch. {iterator.advice}") from None
        finally:
            iterator.close()


class RankIterator(Iterator[Batch]):
    """Iterates over the rest of an epoch. `next` is a message between the ranks, once a whole batch.

    interrupted: whether this rank wants to stop; set by its caller before `next`.
    is_interrupted: whether any rank wanted to, when the last batch was agreed on: the same on all ranks.
    """

    def __init__(self, reader: RankReader, streams: dict[int, BatchIterator], *, is_new: bool) -> None:
        self._reader, self._streams = reader, streams
        self._rounds: list[Batch] = []  # of a whole batch, to be handed out
        self._ends_before: dict[int, Any] = {}  # of the streams, before that whole batch
        self._is_closed = False
        self._num_left = 0  # rows of this rank that no batch took
        self._is_empty = is_new
        self.interrupted = self.is_interrupted = False
        for stream in streams.values():
            stream.warns = False
        self.warns = True  # of a pass without a batch; False for a caller that raises an error instead

    @property
    def position(self) -> Position:
        """The end of the last batch, for all ranks together: every rank must read it, after the same batch. JSON can
        store it. Between the rounds of a whole batch, streams whose round has not come are where it began."""
        group = self._reader.group
        num_rounds = group.rounds - len(self._rounds)  # that were handed out
        ends = {v: self._ends_before[v] for k, v in enumerate(group.own_streams) if self._rounds and k >= num_rounds}
        own = {v: stream.position_of(ends.get(v, stream.end)) for v, stream in self._streams.items()}
        known = {v: position for of_rank in group.gather(own) for v, position in of_rank.items()}
        return {"streams": group.streams, "positions": [known[v] for v in range(group.streams)]}

    @property
    def described(self) -> str:
        """The place of this rank's first stream in words, for an error."""
        return next((stream.described for stream in self._streams.values()), "a rank without rows")

    @property
    def num_bad(self) -> int:
        """Rows that on_bad="skip" has dropped so far in this rank's streams: ranks add up to all of them."""
        return sum(stream.num_bad for stream in self._streams.values())

    @property
    def advice(self) -> str:
        """What to do when there was no batch."""
        return "Give more rows, a smaller batch_size, or drop_remainder=False."

    def __str__(self) -> str:
        whole, group = self._reader.whole, self._reader.group
        return (
            f"{self._num_left} rows for rank {group.rank} in {whole.plan.described} (batch_size={whole.batch_size}, "
            f"drop_remainder={whole.drop_remainder}, {group.streams} streams)"
        )

    def __next__(self) -> Batch:
        if not self._rounds and not self._is_closed:
            try:
                self._rounds = self._next_whole()
            except BaseException:
                self.close()
                raise
        if not self._rounds:
            self.close()
            self._warn()
            raise StopIteration
        self._is_empty = False
        return self._rounds.pop(0)

    def _warn(self) -> None:
        """Warns once of a pass without a batch, as a `BatchIterator` does."""
        if self._is_empty and self.warns:
            text = f"recfx: got no batch in a pass over the data, but {self}. {self.advice}"
            warnings.warn(text, stacklevel=3)
        self._is_empty = False

    def close(self) -> None:
        """Ends the iteration and its threads."""
        self._is_closed = True
        for stream in self._streams.values():
            stream.close()
        self._reader.kept.clear()

    def _next_whole(self) -> list[Batch]:
        """This rank's batches of the next whole batch; none at the end."""
        reader, group = self._reader, self._reader.group
        self._ends_before = {v: stream.end for v, stream in self._streams.items()}
        rows: dict[int, Any] = {v: next(stream, []) for v, stream in self._streams.items()}  # lists of segments
        full = [sum(s.end - s.begin for s in segments) == reader.per_stream for segments in rows.values()]
        if group.deterministic:
            shares = [rows.get(k * group.world_size + group.rank, []) for k in range(group.rounds)]
        else:
            shares = [[segment for segments in rows.values() for segment in segments]]
        packed = [_Packed.of(reader.packer, segments) for segments in shares]
        counts = np.max([p.counts for p in packed], axis=0)
        *most, has_rows, is_short, stops = group.most([*counts, any(rows.values()), not all(full), self.interrupted])
        self.is_interrupted = self.is_interrupted or bool(stops)
        if not has_rows or (is_short and reader.whole.drop_remainder):
            self._num_left = sum(s.end - s.begin for segments in shares for s in segments)
            return []
        batches = [p.at_capacities(reader.packer, np.array(most, np.int64)) for p in packed]
        if reader.whole.transform is not None:
            batches = self._transformed(batches)
        return batches

    def _transformed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches after the reader's transform, of a layout that fits those of all ranks."""
        reader = self._reader
        transform: Callable = reader.whole.transform  # type: ignore[assignment]
        pin, results = reader.whole.pin_memory, []
        for batch in batches:
            columns = transform(dict(batch))
            check_transformed(columns, reader.packer.batch_size)
            results.append(pack({NUM_SAMPLES: batch[NUM_SAMPLES], **columns}, pin_memory=pin))
        forms = [{f"{name}\0{part}": form for (name, part), form in b.layout.forms.items()} for b in results]
        names = sorted(forms[0])
        sizes = [max([form[n][1][0] if form[n][1] else 0 for form in forms]) for n in names]
        most = reader.group.most([max(a, b) for a, b in zip(sizes, reader.sizes or sizes, strict=True)])
        reader.sizes = most
        wanted = dict(zip(names, most, strict=True))
        layout = Layout.of(
            {
                (name, part): (dtype, (wanted[f"{name}\0{part}"], *shape[1:]) if shape else shape)
                for (name, part), (dtype, shape) in results[0].layout.forms.items()
            }
        )
        return [b if b.layout == layout else pack(dict(b), layout=layout, pin_memory=pin) for b in results]


class _Stream(Reader):
    """The rows of one stream: its batches are lists of segments, as many rows as a whole batch has of it."""

    def batch(self, segments: Sequence[Segment]) -> Any:
        return list(segments)


class _Packed:
    """Rows of a batch, and the room that their lists need."""

    def __init__(
        self, segments: list[Segment], counts: np.ndarray, buffer: torch.Tensor | None, layout: Layout
    ) -> None:
        self.segments, self.counts, self.buffer, self.layout = segments, counts, buffer, layout

    @staticmethod
    def of(packer: Reader, segments: list[Segment]) -> _Packed:
        plan, pin = packer.packing, packer.pin_memory and packer.transform is None
        if not segments:
            return _Packed(segments, np.zeros_like(plan.capacities), None, plan.layout)
        if packer.plan.decoder.in_records:  # counts come with packing
            buffer, counts = pack_records(plan, segments, pin_memory=pin)
            return _Packed(segments, counts, buffer, plan.layout)
        return _Packed(segments, count_items(plan, segments), None, plan.layout)

    def at_capacities(self, packer: Reader, counts: np.ndarray) -> Batch:
        """The batch, with the capacities that all ranks need."""
        plan, pin = packer.plan_for(counts), packer.pin_memory and packer.transform is None
        if not self.segments:
            return Batch(torch.zeros(plan.layout.num_bytes, dtype=torch.uint8, pin_memory=pin), plan.layout)
        if self.buffer is not None and plan.layout == self.layout:
            packer.check_pages()
            return Batch(self.buffer, self.layout)
        return packer.packed(self.segments, pin)


def _has_unit_for_each(reader: Reader, num: int) -> bool:
    """Whether each of so many streams gets a unit of the files."""
    found: set[int] = set()
    for number, file in enumerate(reader.plan.files):
        found |= {(number + unit) % num for unit in reader.plan.decoder.units(file)}
        if len(found) == num:
            return True
    return False
