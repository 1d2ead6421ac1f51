"""Saves one run's checkpoints in one folder, in the foreground or background, in full or in part."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from recfx.checkpoint.background import Job
from recfx.checkpoint.contents import Contents, contents_of, write
from recfx.checkpoint.folders import (
    BEST,
    MANIFEST,
    FolderLock,
    clear_unfinished,
    delete,
    finished,
    hide,
    name_of,
    rank_name,
)
from recfx.checkpoint.ranks import (
    RanksFolder,
    commit,
    make_rank_folder,
    mark_failed,
    num_bytes_in,
    scratch_name,
    together,
    write_in_child,
    write_rank,
)
from recfx.checks import check_int, check_type
from recfx.dist import Group, RankError
from recfx.run_checks import check_step_and_state
from recfx.step import Step, TrainState

__all__ = ["Saver", "save"]

ALONE = Group(rank=0, world_size=1, streams=1, deterministic=False)
STALLED_S = 10.0  # without a new byte of any rank, until a save that cannot be finished together is given up


class Prepared(NamedTuple):
    """A save before anything is written."""

    contents: Contents
    base: Path | None
    at: RanksFolder | None  # None: one process


class Saver:
    """The one writer of a folder of checkpoints. Use it as a context manager, or call `close`.

    A checkpoint appears by one rename after its files are on disk. A kill at any moment leaves the earlier checkpoints
    whole and at most a hidden unfinished folder, which the next save deletes. Saving a number again replaces it.

    Where ranks train together (`step.group`), every rank makes a Saver and calls the same methods in the same order:
    they exchange. Each writes its rows into one folder, which all must see; the checkpoint appears when all are done.
    What fails on one rank raises on all, and names the rank; nothing is then saved. `busy` alone is of this rank. A
    rank that leaves the context by an exception exchanges nothing: what was being saved is still finished if the other
    ranks write their part.

    Args:     max_to_keep: checkpoints kept, >= 1, besides the one that a file best.json in the folder names.
              full_every: 1: every save holds every row. k: one of k saves does; the others hold the rows touched since
              the previous save and link its files. The first save of a process, and the first after an error, is
              full. `compact` makes any of them full.
    Cost:     a save writes W (1 + slots) floats and 20 B per row. In the background it stops the caller for a fork
              (10 ms per GB of table), then takes memory for pages that the caller changes, up to the table's size.
              Ranks exchange about ten small messages a save; each rank's part holds the dense parameters too.
    Raises:   TypeError on a count that is not an int, ValueError on one below 1; NotADirectoryError when `folder` is a
              file; BlockingIOError when another process saves there; RankError when a rank has ended.
    """

    def __init__(self, folder: str | Path, step: Step, *, max_to_keep: int = 5, full_every: int = 1) -> None:
        for name, value in (("max_to_keep", max_to_keep), ("full_every", full_every)):
            check_int(name, value, 1)
        order = "The order is (folder, step)."
        check_type("folder", folder, str | Path, order)
        check_type("step", step, Step, order)
        self._folder, self._step, self._max_to_keep, self._full_every = Path(folder), step, max_to_keep, full_every
        self._group = step.group or ALONE
        self._lock: FolderLock | None = None  # rank 0's
        try:
            with together(self._group):
                if self._group.is_first:
                    self._lock = _locked(self._folder)
                    clear_unfinished(self._folder)
        except BaseException:
            self._release()
            raise
        self._job: Job | None = None
        self._at: RanksFolder | None = None  # of the background save
        self._num_saved = 0
        self._last: tuple[Path, tuple[int, ...]] | None = None  # the base of a partial save, and its tables' steps

    def save(self, state: TrainState, *, number: int, loop: dict) -> Path:
        """Writes <folder>/step-<number>, then deletes all but the newest folders of such names, and nothing else.

        Args:     number: optimiser steps taken, the same on all ranks.
                  loop: small dict that JSON can store; `load` returns it. Of several ranks, rank 0's is stored.
        Raises:   ValueError in a gradient accumulation window, or when `number` is not 0 to 10**9 - 1; TypeError when
                  JSON cannot hold `loop`; nothing is then written. OSError when the disk is full or not writable.
        """
        prepared = self._prepare(state, number, loop)
        try:
            if prepared.at is None:
                write(self._folder, prepared.contents, base=prepared.base, max_to_keep=self._max_to_keep)
            else:
                self._write_together(prepared.contents, prepared.base, prepared.at)
        except BaseException:
            self._last = None  # the next save is full
            raise
        return self._saved(state, number)

    def save_in_background(self, state: TrainState, *, number: int, loop: dict) -> Path:
        """As `save`, but writes the state of this moment in the background. Waits for the previous save.

        Raises:   as `save`; an error of this save is raised by the next one, by `finish` or by `close`.
        """
        contents, base, at = self._prepare(state, number, loop)
        parent = os.getpid()

        def stop_when_orphaned() -> None:
            if os.getppid() != parent:
                raise InterruptedError("the process that was being saved has ended")

        def write_it() -> None:
            write(self._folder, contents, base=base, max_to_keep=self._max_to_keep, before_file=stop_when_orphaned)

        if at is None:
            self._job = Job(write_it)
        else:
            self._start_together(Job, write_in_child(at, contents, base, stop_when_orphaned), at)
        return self._saved(state, number)

    @property
    def busy(self) -> bool:
        """Whether a background save is still being written, as this rank sees it: rank 0's ends when all have."""
        return self._job is not None and not self._job.done

    def finish(self) -> None:
        """Waits for the background save. Raises the OSError that ended it, on any rank."""
        job, self._job = self._job, None
        if job is not None:
            try:
                if self._at is None:
                    job.finish()
                else:
                    self._finish_together(job, self._at)
            except BaseException:
                self._last = None  # the next save is full
                raise

    def delete_all(self) -> None:
        """Deletes the checkpoints in the folder."""
        self.finish()
        with together(self._group):
            for path in finished(self._folder) if self._group.is_first else ():
                delete(hide(path))
            if self._group.is_first:
                (self._folder / BEST).unlink(missing_ok=True)
        self._last = None

    def close(self) -> None:
        """`finish`, then releases the folder for another writer."""
        try:
            self.finish()
        finally:
            self._release()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or self._group.world_size == 1:
            return self.close()
        job, self._job = self._job, None
        try:
            if job is not None and self._at is not None:
                self._finish_alone(job, self._at)
        except Exception as lost:
            error.add_note(f"The checkpoint that was being saved is not there either: {lost}")
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _prepare(self, state: TrainState, number: int, loop: dict[str, Any]) -> Prepared:
        group = self._group
        with together(group):
            check_step_and_state(self._step, state, "Save the state that a step returned.")
        self.finish()
        group.check_same("number", number)
        last = self._last if self._num_saved % self._full_every else None
        token = scratch_name(name_of(number)) if group.world_size > 1 and type(number) is int else ""
        own = (last is not None and (self._own(last[0]) / MANIFEST).exists(), loop, token)
        usable, (_, loop, token) = group.gather(own), group.from_first(own)
        base, since = (last or (None, None)) if all(there for there, _, _ in usable) else (None, None)
        at = self._place(self._folder / token) if group.world_size > 1 else None
        try:
            with together(group):
                if group.is_first:
                    clear_unfinished(self._folder)
                contents = contents_of(self._step, state, number=number, loop=loop, since=since)
                if at is not None and group.is_first:
                    at.scratch.mkdir()
            if at is not None:
                with together(group):
                    make_rank_folder(at)
        except Exception:
            self._delete(at)
            raise
        return Prepared(contents, base, at)

    def _own(self, path: Path) -> Path:
        """This rank's part of a checkpoint."""
        return path if self._group.world_size == 1 else path / rank_name(self._group.rank)

    def _place(self, scratch: Path) -> RanksFolder:
        group = self._group
        return RanksFolder(
            self._folder, scratch, group.rank, group.world_size, group.streams, max_to_keep=self._max_to_keep
        )

    def _delete(self, at: RanksFolder | None) -> None:
        """Rank 0 deletes what a failed save has written. What another rank may still write, the next save deletes."""
        if at is not None and at.rank == 0:
            shutil.rmtree(at.scratch, ignore_errors=True)

    def _write_together(self, contents: Contents, base: Path | None, at: RanksFolder) -> None:
        try:
            with together(self._group):
                digest = write_rank(at, contents, base, lambda: None)
            digests = self._group.gather(digest)
            with together(self._group):
                if at.rank == 0:
                    commit(at, contents, digests)
        except Exception:
            self._delete(at)
            raise

    def _start_together(self, start: Any, work: Any, at: RanksFolder) -> None:
        try:
            with together(self._group):
                try:
                    self._job, self._at = start(work), at
                except OSError:
                    mark_failed(at)
                    raise
        except Exception:
            job, self._job = self._job, None
            if job is not None:
                job.kill()
                with suppress(Exception):
                    job.finish()
            self._delete(at)
            raise

    def _finish_together(self, job: Job, at: RanksFolder) -> None:
        """Rank 0's child ends after all others, which it waits for, so rank 0 first hears whether they have ended."""
        try:
            with together(self._group):
                if at.rank:
                    self._finish_alone(job, at)
            with together(self._group):
                if at.rank == 0:
                    job.finish()
        except RankError:
            if at.rank == 0:
                with suppress(Exception):
                    self._finish_alone(job, at)
            raise
        except Exception:
            if at.rank == 0:
                job.kill()
                with suppress(Exception):
                    job.finish()
                self._delete(at)
            raise

    def _finish_alone(self, job: Job, at: RanksFolder) -> None:
        """Waits for this rank's child; rank 0's is given up where no rank writes any more."""
        size, since = -1, time.monotonic()
        while at.rank == 0 and not job.done:
            size, before = num_bytes_in(at.scratch), size
            since = since if size == before else time.monotonic()
            if time.monotonic() - since > STALLED_S:
                job.kill()
            time.sleep(0.05)
        try:
            job.finish()
        except Exception:
            mark_failed(at)
            raise

    def _saved(self, state: TrainState, number: int) -> Path:
        self._num_saved += 1
        path = self._folder / name_of(number)
        self._last = path, tuple(int(t.step) for t in state.tables)
        return path


def _locked(folder: Path) -> FolderLock:
    """Makes a folder and locks it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            errno.ENOTDIR, f"folder: got {folder}, a file or below one, expected a folder. Choose another path."
        ) from error
    return FolderLock(folder)


def save(folder: str | Path, step: Step, state: TrainState, *, number: int, loop: dict, max_to_keep: int = 5) -> Path:
    """One full checkpoint: `Saver(folder, step, max_to_keep=...).save(state, ...)`."""
    with Saver(folder, step, max_to_keep=max_to_keep) as saver:
        return saver.save(state, number=number, loop=loop)
