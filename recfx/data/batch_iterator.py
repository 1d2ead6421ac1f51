"""An iterator over a reader's batches that can start at any position."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

from recfx.data.files import quoted
from recfx.data.order import Chunk, ChunkStart, chunks
from recfx.data.packing.pack_columns import Segment
from recfx.types import Batch

if TYPE_CHECKING:
    from recfx.data.reading import Reader

__all__ = ["BatchIterator", "Position"]

Position = dict[str, Any]


class BatchIterator(Iterator[Batch]):
    """Iterates over the rest of some epochs. The iterator and its threads end with the data, with an error, on
    `close()`, and when it is garbage collected. No batch follows.

    Example:  >>> it = iter(batches); next(it); saved = it.position   # doctest: +SKIP
              >>> it = batches.start_at(saved)                        # doctest: +SKIP
    """

    def __init__(self, reader: Reader, place: ChunkStart, taken: int, last_epoch: int | None) -> None:
        worker = get_worker_info()
        if worker is not None and reader.pin_memory:
            raise ValueError("pin_memory: got True, expected False in a DataLoader's worker. It cannot use the GPU.")
        self._reader = reader
        self._plan = reader.plan if worker is None else reader.plan.share(worker.id, worker.num_workers)
        self.warns = True  # of a pass without a batch; False for a caller that raises an error instead
        self._start(place, taken, last_epoch)

    def _start(self, place: ChunkStart, taken: int, last_epoch: int | None) -> None:
        self._last_epoch = last_epoch
        self._position = (place, taken)
        self._chunk: Chunk | None = None
        self._taken = taken  # rows of the chunk
        self._chunks = chunks(self._plan, place, last_epoch)
        self._num_bad = place.num_bad
        self._num_left = 0  # rows since the last batch
        self._is_over = self._is_closed = False
        self._epoch_is_empty = taken == 0 and place == ChunkStart(place.epoch, num_bad=place.num_bad)

    @property
    def position(self) -> Position:
        """The end of the last batch that was returned: a few numbers that JSON can store."""
        return self.position_of(self.end)

    @property
    def end(self) -> tuple[ChunkStart, int]:
        """What `position_of` makes a position of, also when the iterator has gone on. It reads no file."""
        return self._position

    def position_of(self, end: tuple[ChunkStart, int]) -> Position:
        """The `position` when `end` was read."""
        place, taken = end
        return {**place._asdict(), "taken": taken, "of": self._plan.fingerprint}

    @property
    def described(self) -> str:
        """`position` in words, for an error."""
        place, taken = self._position
        file = self._plan.files[self._plan.epoch_files(place.epoch)[place.file]]
        window = "the shuffled window that begins in " if self._plan.shuffle_rows else ""
        return f"{taken} rows after the start of {window}unit {place.unit} of {quoted(file.path)}"

    def __str__(self) -> str:
        """The data, and the number of rows that did not fill a batch, for an error when there was none."""
        reader, recipe = self._reader, self._plan.decoder.recipe
        bad = f", {self._num_bad} bad ones skipped" if self._num_bad else ""
        options = f"batch_size={reader.batch_size}, drop_remainder={reader.drop_remainder}"
        options += "" if recipe.filter is None else f", filter={recipe.filter}"
        options += "" if recipe.split is None else f", split={recipe.split}"
        return f"{self._num_left} rows in {self._plan.described} ({options}{bad})"

    @property
    def advice(self) -> str:
        """What to do when there was no batch."""
        if self._num_left:
            return "Give more rows, a smaller batch_size, or drop_remainder=False."
        recipe = self._plan.decoder.recipe
        parts = {"a bad row": self._num_bad, "the filter": recipe.filter is not None, "the split": recipe.split}
        causes = [name for name, is_one in parts.items() if is_one]
        return f"Look at {' and '.join(causes)}." if causes else "Give more rows."

    @property
    def num_bad(self) -> int:
        """Rows that on_bad="skip" has dropped so far, in all epochs, those before a resume included."""
        return self._num_bad

    def state_dict(self) -> Position:
        """`position`, under the name that torchdata's StatefulDataLoader uses."""
        return self.position

    def load_state_dict(self, state: Position) -> None:
        """Continues from a position, see `Reader.start_at`."""
        try:
            numbers = dict(state)
            of, taken = numbers.pop("of"), operator.index(numbers.pop("taken"))
            place = ChunkStart(*map(operator.index, ChunkStart(**numbers)))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"position: got {state}, expected a `BatchIterator.position`.") from None
        if of not in (self._plan.fingerprint, self._plan.fingerprint_of_sizes) or min(*place, taken) < 0:
            raise ValueError(
                f"position: got one of {of}, expected one of {self._plan.fingerprint}. Resuming needs the same "
                "data, seed, shuffling, filter, split, on_bad, rank, world_size and shard_by."
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
                self._num_bad = self._chunk.num_bad  # also those after the last batch
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
            warnings.warn(text, stacklevel=4)  # the line of the caller that needed a batch

    def _warn_of_absent(self) -> None:
        if (absent := self._plan.decoder.absent) and not self._reader.has_warned_of_absent:
            self._reader.has_warned_of_absent = True
            warnings.warn(
                f"recfx: got no columns {absent} in any of {self._plan.described}, expected each in at "
                "least one file. They were empty in every row. Correct their names, or leave them out.",
                stacklevel=4,
            )

    def close(self) -> None:
        """Ends the iteration and its threads."""
        self._is_closed = True
        self._chunks.close()

    def _cut(self) -> tuple[list[Segment], int]:
        """The next rows of this epoch, and how many a full batch would need more: 0 unless the epoch has ended."""
        segments, missing = [], self._reader.batch_size
        while missing and (chunk := self._chunk_with_rows()) is not None:
            end = min(self._taken + missing, chunk.rows.num_rows)
            segments.append(Segment(chunk.rows, self._taken, end))
            missing -= end - self._taken
            self._taken = end
        return segments, missing

    def _chunk_with_rows(self) -> Chunk | None:
        """The chunk with the next row of this epoch; None at its end."""
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
        """Checks that the cache's files of segments read to their end are still whole."""
        if (cache := self._plan.decoder.cache) is not None:
            for segment in segments:
                if segment.end == segment.block.num_rows:
                    cache.check_files(segment.block.memory)

    def _check_start(self, first: Chunk | None) -> None:
        """Checks that the first chunk is the position's: files may have changed and kept their sizes."""
        place, taken = self._position
        named = place._replace(num_bad=0) != ChunkStart(place.epoch) or taken
        if named and (first is None or first.place != place or first.rows.num_rows < taken):
            raise ValueError(f"position: got {self.position}, where there is no row. It comes from other files.")
