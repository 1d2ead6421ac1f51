"""Files mapped into memory. A file that is cut short while it is read raises an error that names it, not SIGBUS."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from pathlib import Path

import pyarrow as pa

from recfx.kernels.build import library
from recfx.kernels.op import c_function

__all__ = ["MappedFile", "replaced"]

_watch = c_function("recfx_watch")
_replaced = c_function("recfx_replaced")
_unwatch = c_function("recfx_unwatch")
_one_thread = threading.Lock()


class MappedFile:
    """A file as read-only memory. Pages that are missing, because the file was cut short or its disk fails, are read as
    zeros, and `check` raises from then on.

    The first mapped file installs a SIGBUS handler, which passes signals about other memory on to the previous handler.
    Without a C++ compiler no handler is installed: the file is read whole, and `is_mapped` is False.

    Cost:     `check` is one stat of the file. No file descriptor stays open.
    Raises:   OSError when the file cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as opened:
            self._memory = opened.read_buffer()
        found = os.stat(path)
        self._identity, self._num_bytes = (found.st_dev, found.st_ino), self._memory.size
        self._number = self._watched()
        self.is_mapped = self._number >= 0
        if self.is_mapped:
            weakref.finalize(self, _unwatch, self._number).atexit = False
        else:
            self._memory = pa.py_buffer(path.read_bytes())

    def buffer(self) -> pa.Buffer:
        """The bytes of the file. Objects built on them keep the file mapped and watched."""
        return pa.foreign_buffer(self._memory.address, self._memory.size, base=self)

    def check(self) -> None:
        """Raises ValueError naming the file when bytes of it are missing, whether they were read yet or not.

        A file that was deleted or replaced stays whole as long as it is mapped.
        """
        if not self.is_mapped:
            return
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        got = self._num_bytes
        if found is not None and (found.st_dev, found.st_ino) == self._identity:
            got = found.st_size
        if got < self._num_bytes or self._num_replaced():
            what = f"{got} bytes" if got != self._num_bytes else "bytes that cannot be read"
            raise ValueError(
                f"cache file '{self.path}': got {what}, expected the {self._num_bytes} that it had when it was opened. "
                "Another process cut it short, or the disk fails. Delete the file and start again."
            )

    def _watched(self) -> int:
        """The number of its watched mapping; -1 when it is not watched."""
        if library() is None or not self._num_bytes:
            return -1
        number = ctypes.c_int64()
        with _one_thread:
            _watch(self._memory.address, self._num_bytes, ctypes.addressof(number))  # type: ignore[arg-type]
        return number.value

    def _num_replaced(self) -> int:
        number = ctypes.c_int64()
        _replaced(self._number, ctypes.addressof(number))  # type: ignore[arg-type]
        return number.value


@functools.cache
def replaced() -> ctypes.c_int64:
    """How often pages were read as zeros so far, in all files of the process. The value changes in place.

    After it rises, `check` of one of the files raises. Reading it is free, when a stat of each file is too slow.
    """
    loaded = library()
    return ctypes.c_int64(0) if loaded is None else ctypes.c_int64.in_dll(loaded, "recfx_num_replaced")
