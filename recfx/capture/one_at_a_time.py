"""Ranks of a host compile one after another: the first compiles, the others find its graph in Inductor's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

__all__ = ["one_at_a_time"]

FILE = "recfx.lock"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Holds a lock of this host while a graph is compiled; at once in one process.

    The system releases it when the process that compiles ends, however it ends, so nobody waits for one that failed.
    A host without such locks, or without a writable cache, compiles in every process.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        yield
        return
    descriptor = _lock()
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock() -> int | None:
    """The descriptor of the locked file; None where there is none."""
    try:
        import fcntl

        folder = Path(cache_dir())
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
