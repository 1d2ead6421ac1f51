"""Whether a run can write to its output folder, and whether its checkpoints follow those that are there."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from recfx import checkpoint
from recfx.checkpoint.folders import FolderLock
from recfx.train.progress import TrainConfig

__all__ = ["check_output"]

ROOM_BYTES = 2**20  # written to the output folder, and deleted, to see whether it has any room


def check_output(config: TrainConfig, step: int = 0, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raises what `train` raises of output_dir; a program calls it before it compiles, which takes longer.

    Makes the folder where there is none, and writes a temporary file of 1 MiB into it.

    Args:     step: that the run begins at.  resume, overwrite: as of `train`.
    Raises:   NotADirectoryError when output_dir is a file or below one; OSError when it cannot be written or has no
              room; BlockingIOError when another process saves there; ValueError when it holds checkpoints and neither
              resume nor overwrite is given, or both are.
    """
    if resume and overwrite:
        raise ValueError("overwrite: got True with resume=True, expected one of them. A run goes on or begins again.")
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM_BYTES))
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            errno.ENOTDIR, f"output_dir: got '{folder}', a file or below one, expected a folder. Choose another path."
        ) from error
    except OSError as error:
        raise type(error)(
            error.errno,
            f"output_dir: got '{folder}', where nothing can be written ({error.strerror or error}), expected a folder "
            "for checkpoints. Nothing was trained. Choose another path, or make room there.",
        ) from error
    FolderLock(folder).release()
    found = None if resume or overwrite else checkpoint.latest(folder)
    if found is not None:
        _check_follows(found, step, config.output_dir)


def _check_follows(found: Path, step: int, folder: str) -> None:
    """Checkpoints are ordered by their steps: a run whose numbers begin below those in its folder would be lost."""
    newest = int(found.name.rpartition("-")[2])
    if step == 0 or step < newest:
        raise ValueError(
            f"output_dir: got '{folder}', which holds {found.name}, for a run that begins at step {step}, expected a "
            "folder without checkpoints that are as new. Give resume=True (--resume) to go on from there, "
            "overwrite=True (--overwrite) to delete them, or another output_dir."
        )
