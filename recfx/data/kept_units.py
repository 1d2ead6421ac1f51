"""Decoded units that stay in memory for a while, so that streams which share the rows of a unit decode it once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from recfx.data.files import File
from recfx.data.unit_rows import Decoded

__all__ = ["KeptUnits"]


class KeptUnits:
    """The units that were read last, from any thread.

    Args:     num_units: so many are kept.  num_rows: older ones are kept too while the newer ones, as far as they are
              decoded, have fewer rows.
    """

    def __init__(self, num_units: int, num_rows: int) -> None:
        self._num_units, self._num_rows = num_units, num_rows
        self._lock = threading.Lock()
        self._kept: dict[tuple[File, int], Future[Decoded]] = {}  # the oldest first

    def __getstate__(self) -> tuple[int, int]:  # another process decodes its own
        return self._num_units, self._num_rows

    def __setstate__(self, state: tuple[int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def clear(self) -> None:
        """Forgets all units."""
        with self._lock:
            self._kept = {}

    def read(self, file: File, unit: int, decode: Callable[[File, int], Decoded]) -> Decoded:
        """The unit, decoded here unless it is kept, or another thread decodes it now.

        Raises:   what `decode` raises, in each thread that waits for it. A later read decodes again.
        """
        with self._lock:
            found = self._kept.get((file, unit))
            mine: Future[Decoded] = Future()
            if found is None:
                self._kept[file, unit] = mine
                self._drop()
        if found is not None:
            return found.result()
        try:
            mine.set_result(decode(file, unit))
        except BaseException as error:
            with self._lock:
                self._kept.pop((file, unit), None)
            mine.set_exception(error)
        return mine.result()

    def _drop(self) -> None:
        """Drops the oldest units that are too many."""
        rows = [f.result().batch.num_rows if f.done() else 0 for f in self._kept.values()]
        newer = sum(rows)
        for key, num in zip(list(self._kept), rows, strict=True):
            newer -= num
            if len(self._kept) <= self._num_units or newer < self._num_rows:
                return
            del self._kept[key]
