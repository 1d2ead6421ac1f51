"""Saves one run's checkpoints in one folder, in the foreground or background, in full or in part."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from recfx.checkpoint.background import Job
from recfx.checkpoint.contents import Contents, contents_of, write
from recfx.checkpoint.folders import MANIFEST, FolderLock, clear_unfinished, delete, finished, hide, name_of
from recfx.checks import check_int, check_type
from recfx.run_checks import check_step_and_state
from recfx.step import Step, TrainState

__all__ = ["Saver", "save"]


class Saver:
    """The one writer of a folder of checkpoints. Use it as a context manager, or call `close`.

    A checkpoint appears by one rename after its files are on disk. A kill at any moment leaves the earlier checkpoints
    whole and at most a hidden unfinished folder, which the next save deletes. Saving a number again replaces it.

    Args:     max_to_keep: checkpoints kept, >= 1.
              full_every: 1: every save holds every row. k: one of k saves does; the others hold the rows touched since
              the previous save and link its files. The first save of a process, and the first after an error, is
              full. `compact` makes any of them full.
    Cost:     a save writes W (1 + slots) floats and 20 B per row. In the background it stops the caller for a fork
              (10 ms per GB of table), then takes memory for pages that the caller changes, up to the table's size.
    Raises:   TypeError on a count that is not an int, ValueError on one below 1; NotADirectoryError when `folder` is a
              file; BlockingIOError when another process saves there.
    """

    def __init__(self, folder: str | Path, step: Step, *, max_to_keep: int = 5, full_every: int = 1) -> None:
        for name, value in (("max_to_keep", max_to_keep), ("full_every", full_every)):
            check_int(name, value, 1)
        order = "The order is (folder, step)."
        check_type("folder", folder, str | Path, order)
        check_type("step", step, Step, order)
        self._folder, self._step, self._max_to_keep, self._full_every = Path(folder), step, max_to_keep, full_every
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                errno.ENOTDIR, f"folder: got {folder}, a file or below one, expected a folder. Choose another path."
            ) from error
        self._lock = FolderLock(self._folder)
        try:
            clear_unfinished(self._folder)
        except BaseException:
            self._lock.release()
            raise
        self._job: Job | None = None
        self._num_saved = 0
        self._last: tuple[Path, tuple[int, ...]] | None = None  # the base of a partial save, and its tables' steps

    def save(self, state: TrainState, *, number: int, loop: dict) -> Path:
        """Writes <folder>/step-<number>, then deletes all but the newest folders of such names, and nothing else.

        Args:     number: optimiser steps taken.  loop: small dict that JSON can store; `load` returns it.
        Raises:   ValueError in a gradient accumulation window, or when `number` is not 0 to 10**9 - 1; TypeError when
                  JSON cannot hold `loop`; nothing is then written. OSError when the disk is full or not writable.
        """
        contents, base = self._prepare(state, number, loop)
        try:
            write(self._folder, contents, base=base, max_to_keep=self._max_to_keep)
        except BaseException:
            self._last = None  # the next save is full
            raise
        return self._saved(state, number)

    def save_in_background(self, state: TrainState, *, number: int, loop: dict) -> Path:
        """As `save`, but writes the state of this moment in the background. Waits for the previous save.

        Raises:   as `save`; an error of this save is raised by the next one, by `finish` or by `close`.
        """
        contents, base = self._prepare(state, number, loop)
        parent = os.getpid()

        def stop_when_orphaned() -> None:
            if os.getppid() != parent:
                raise InterruptedError("the process that was being saved has ended")

        def write_it() -> None:
            write(self._folder, contents, base=base, max_to_keep=self._max_to_keep, before_file=stop_when_orphaned)

        self._job = Job(write_it)
        return self._saved(state, number)

    @property
    def busy(self) -> bool:
        """Whether a background save is still being written."""
        return self._job is not None and not self._job.done

    def finish(self) -> None:
        """Waits for the background save. Raises the OSError that ended it."""
        job, self._job = self._job, None
        if job is not None:
            try:
                job.finish()
            except BaseException:
                self._last = None  # the next save is full
                raise

    def delete_all(self) -> None:
        """Deletes the checkpoints in the folder."""
        self.finish()
        for path in finished(self._folder):
            delete(hide(path))
        self._last = None

    def close(self) -> None:
        """`finish`, then releases the folder for another writer."""
        try:
            self.finish()
        finally:
            self._lock.release()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, state: TrainState, number: int, loop: dict[str, Any]) -> tuple[Contents, Path | None]:
        check_step_and_state(self._step, state, "Save the state that a step returned.")
        self.finish()
        clear_unfinished(self._folder)
        last = self._last if self._num_saved % self._full_every else None
        if last is not None and not (last[0] / MANIFEST).exists():
            last = None
        base, since = last or (None, None)
        return contents_of(self._step, state, number=number, loop=loop, since=since), base

    def _saved(self, state: TrainState, number: int) -> Path:
        self._num_saved += 1
        path = self._folder / name_of(number)
        self._last = path, tuple(int(t.step) for t in state.tables)
        return path


def save(folder: str | Path, step: Step, state: TrainState, *, number: int, loop: dict, max_to_keep: int = 5) -> Path:
    """One full checkpoint: `Saver(folder, step, max_to_keep=...).save(state, ...)`."""
    with Saver(folder, step, max_to_keep=max_to_keep) as saver:
        return saver.save(state, number=number, loop=loop)
