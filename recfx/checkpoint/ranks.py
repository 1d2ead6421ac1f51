"""A checkpoint of several ranks: each writes an ordinary checkpoint into its folder, and rank 0 commits them together.

    step-000000100/rank-00000/ ... rank-0000N/   as one process writes them; a rank's manifest is its last file
    step-000000100/manifest.json                 digests of the ranks' manifests, number of streams, seed, loop

All of it is written in one hidden folder. What a forked child runs here does not use torch, nor exchange anything: rank
0's child looks for the other ranks' manifests. A rank that fails renames its folder.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recfx.checkpoint.contents import (
    Contents,
    delete_older,
    publish,
    replace_folder,
    told,
    write_files,
)
from recfx.checkpoint.folders import (
    MANIFEST,
    PREFIX,
    RANKS_FORMAT,
    UNFINISHED,
    digest_of,
    name_of,
    rank_name,
    read_manifest,
    read_ranks,
    sync_folder,
    write_manifest,
)

if TYPE_CHECKING:
    from recfx.dist import Group

__all__ = [
    "RanksFolder",
    "commit",
    "make_rank_folder",
    "mark_failed",
    "num_bytes_in",
    "scratch_name",
    "together",
    "write_in_child",
    "write_rank",
]

WRITING, FAILED = ".writing", "failed-"
LOOK_EVERY_S = 0.01


class RanksFolder(NamedTuple):
    """Where a checkpoint of several ranks is being written, and by whom."""

    folder: Path  # of all checkpoints
    scratch: Path  # of this one, until it is renamed
    rank: int
    world_size: int
    streams: int
    max_to_keep: int

    @property
    def own(self) -> Path:
        """This rank's folder."""
        return self.scratch / rank_name(self.rank)


def scratch_name(target: Path | str) -> str:
    """A name that no other save of that checkpoint gives: a rank of a killed run may still write where it did."""
    return f"{Path(target).name.replace(PREFIX, UNFINISHED)}-{secrets.token_hex(4)}"


def make_rank_folder(at: RanksFolder) -> None:
    """Makes this rank's folder in the one that rank 0 has made. Raises: OSError when it is not there."""
    try:
        at.own.mkdir()
    except FileNotFoundError as error:
        raise OSError(
            errno.ENOENT,
            f"{at.folder}: got no folder {at.scratch.name} there, expected the one that rank 0 has made. All ranks "
            "write into one folder. Put it on a file system that their hosts share.",
        ) from error


def write_rank(at: RanksFolder, contents: Contents, base: Path | None, before_file: Callable[[], None]) -> str:
    """Writes this rank's folder, its manifest last and at once. Returns the manifest's digest.

    Args:     base: as of `recfx.checkpoint.contents.write`, a checkpoint of as many ranks.
    Raises:   as that; OSError names the unfinished folder. The rank is then marked as failed.
    """
    try:
        of_rank = None if base is None else base / rank_name(at.rank)
        manifest = write_files(at.own, contents, of_rank, before_file)
        write_manifest(at.own / WRITING, manifest)
        os.replace(at.own / WRITING, at.own / MANIFEST)
        sync_folder(at.own)
    except Exception as error:
        mark_failed(at)
        if not isinstance(error, OSError):
            raise
        raise told(error, at.scratch) from error
    return digest_of(manifest)


def mark_failed(at: RanksFolder) -> None:
    """Lets rank 0 know that this rank's part will not come. A rename needs no room on the disk."""
    with suppress(OSError):
        os.replace(at.own, at.scratch / f"{FAILED}{rank_name(at.rank)}")


def wait_for_ranks(at: RanksFolder, look: Callable[[], None]) -> list[str]:
    """The digests of all ranks' manifests, once each is on disk.

    Args:     look: called again and again; may raise OSError to give up.
    Raises:   OSError naming a rank that has failed.
    """
    waiting, digests = set(range(at.world_size)), {}
    while waiting:
        look()
        names = set(os.listdir(at.scratch))
        for rank in sorted(waiting):
            if rank_name(rank) not in names:
                raise OSError(errno.EIO, f"{at.scratch}: rank {rank} could not write its part.")
            if (at.scratch / rank_name(rank) / MANIFEST).exists():
                digests[rank] = digest_of(read_manifest(at.scratch / rank_name(rank)))
        waiting -= digests.keys()
        if waiting:
            time.sleep(LOOK_EVERY_S)
    return [digests[rank] for rank in range(at.world_size)]


def commit(at: RanksFolder, contents: Contents, digests: list[str]) -> Path:
    """Rank 0's last part of a save: writes the manifest of all ranks, gives the folder its name, deletes older ones.

    Raises:   OSError naming the unfinished folder.
    """
    target = at.folder / name_of(contents.number)
    assert len(digests) == at.world_size
    manifest = {
        "format": RANKS_FORMAT,
        "world_size": at.world_size,
        "streams": at.streams,
        "ranks": digests,
        **{name: contents.manifest[name] for name in ("seed", "loop")},
    }
    try:
        write_manifest(at.scratch / MANIFEST, manifest)
        sync_folder(at.scratch)
        _publish(at, target, manifest)
        sync_folder(at.folder)
        delete_older(at.folder, target, at.max_to_keep)
    except OSError as error:
        raise told(error, at.scratch) from error
    return target


def write_in_child(
    at: RanksFolder, contents: Contents, base: Path | None, before_file: Callable[[], None]
) -> Callable[[], None]:
    """What a forked child of each rank runs. Rank 0's waits for the others, then commits."""

    def write_it() -> None:
        write_rank(at, contents, base, before_file)
        if at.rank == 0:
            commit(at, contents, wait_for_ranks(at, before_file))

    return write_it


def _publish(at: RanksFolder, target: Path, manifest: dict) -> None:
    """As of one process: a folder of equal files is replaced file by file."""
    try:
        same = not target.is_symlink() and read_ranks(target) == manifest
    except ValueError:
        same = False
    if not same:
        replace_folder(at.scratch, target)
        return
    for rank in range(at.world_size):
        folder = at.scratch / rank_name(rank)
        publish(folder, target / folder.name, read_manifest(folder))
    os.replace(at.scratch / MANIFEST, target / MANIFEST)
    sync_folder(target)
    shutil.rmtree(at.scratch)


def num_bytes_in(scratch: Path) -> int:
    """What has been written so far, to see whether it grows."""
    with suppress(OSError):
        return sum(path.lstat().st_size for path in scratch.glob("*/*"))
    return 0


class _Failure(NamedTuple):
    """An error, as ranks tell each other."""

    kind: type[Exception]
    number: int | None  # errno
    text: str


@contextmanager
def together(group: Group) -> Iterator[None]:
    """A block that all ranks run. Where it raises on one, it raises on all: there with the first such rank's number.

    Every rank must come here. A block must not exchange anything.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # all ranks must know of it
        error = raised
    failures = group.gather(None if error is None else _failure(error))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise _named(rank, failure)


def _failure(error: Exception) -> _Failure:
    for kind in (OSError, TypeError, ValueError):
        if isinstance(error, kind):
            number = error.errno if isinstance(error, OSError) else None
            return _Failure(kind, number, (error.strerror if isinstance(error, OSError) else None) or str(error))
    return _Failure(RuntimeError, None, str(error) or type(error).__name__)


def _named(rank: int, failure: _Failure) -> Exception:
    text = f"rank {rank}: {failure.text}"
    arguments: tuple[Any, ...] = (text,) if failure.number is None else (failure.number, text)
    return failure.kind(*arguments)
