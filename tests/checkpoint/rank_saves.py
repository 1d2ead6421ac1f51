"""A program of two real ranks that save while one of their processes is killed: `-m tests.checkpoint.rank_saves`.

It forks the ranks of each kill from one process, so that torch is imported once. What the ranks said, and whether they
were killed, is printed as JSON; what is on disk is for the test to look at.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recfx import checkpoint
from recfx.checkpoint import contents, ranks, saving
from recfx.dist import join
from recfx.step import Step, TrainState
from tests.conftest import deepfm_params, deepfm_step
from tests.dist.launching import free_port

WORLD_SIZE = 2

# Rank, whether in the background, where it is killed: in which function, at which call of it, and which processes of
# the rank: the one that runs there, its parent, or both.
KILLS: dict[str, tuple[int, bool, str, int, str]] = {
    "a file of rank 1": (1, False, "write_tensors", 2, "self"),
    "a file of rank 0": (0, False, "write_tensors", 1, "self"),
    "before the manifest of rank 1": (1, False, "write_manifest", 0, "self"),
    "after the manifest of rank 1": (1, False, "sync_folder", 0, "self"),
    "before the manifest of all": (0, False, "write_manifest", 1, "self"),
    "before the rename": (0, False, "replace_folder", 0, "self"),
    "after the rename": (0, False, "delete_older", 0, "self"),
    "a file of the child of rank 1": (1, True, "write_tensors", 1, "self"),
    "a file of the child of rank 0": (0, True, "write_tensors", 1, "self"),
    "the child of rank 0 while it waits": (0, True, "wait_for_ranks", 0, "self"),
    "the child of rank 0 after the rename": (0, True, "delete_older", 0, "self"),
    "rank 1 while its child writes": (1, True, "write_tensors", 1, "parent"),
    "rank 0 while its child writes": (0, True, "write_tensors", 1, "parent"),
    "rank 0 while its child waits": (0, True, "wait_for_ranks", 0, "parent"),
    "rank 1 and its child": (1, True, "write_tensors", 1, "both"),
    "rank 0 and its child": (0, True, "before_commit", 0, "both"),
}


def state_of(step: Step, path: Path) -> TrainState:
    """Of one process' checkpoint, this rank's share."""
    return checkpoint.load(path, step, step.init(deepfm_params()))[0]


def change(state: TrainState) -> None:
    """Every row is touched."""
    state.step.add_(1)
    for table in state.tables:
        table.step.add_(1)
        num_rows = int(table.num_rows)
        table.rows[:num_rows] += 0.5
        table.seen[:num_rows] = table.step << 32


def kill_at(name: str, call: int, processes: str) -> None:
    """Replaces the function of that name by one that is killed at a call."""
    module: Any = contents if name == "write_tensors" else ranks
    name = "commit" if name == "before_commit" else name
    real, calls = getattr(module, name), []

    def die(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == call + 1:
            if processes != "self":
                time.sleep(0.3)  # until all ranks have begun
            if processes != "self":
                os.kill(os.getppid(), signal.SIGKILL)
            if processes != "parent":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.3)  # the parent is gone when this goes on
        return real(*args, **kwargs)

    setattr(module, name, die)


def save(folder: Path, base: Path, rank: int, kill: tuple[int, bool, str, int, str]) -> None:
    """A rank saves twice. It is killed in the second save, or the other one is."""
    number, background, *where = kill
    join()
    step = deepfm_step()
    state = state_of(step, base)
    contents.SHARD_BYTES = 2000
    saving.STALLED_S = 1.0
    with checkpoint.Saver(folder, step) as saver:
        saver.save(state, number=8, loop={})
        change(state)
        if rank == number:
            kill_at(*where)
        if not background:
            saver.save(state, number=9, loop={})
            return
        saver.save_in_background(state, number=9, loop={})
        saver.finish()


def in_rank(rank: int, port: int, said: Path, work: Callable[[], None]) -> int:
    """Runs `work` as a rank, in a fork. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        work()
        status = 0
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        os._exit(status)


def killed(folder: Path, base: Path, name: str) -> dict[str, Any]:
    """Two ranks of which one is killed: their exit statuses, what they said, and how long it took."""
    run = folder / name.replace(" ", "-")
    run.mkdir()
    port, begun = free_port(), time.monotonic()
    texts = [folder / f"{run.name}-{rank}.txt" for rank in range(WORLD_SIZE)]
    pids = [
        in_rank(rank, port, texts[rank], lambda rank=rank: save(run, base, rank, KILLS[name]))
        for rank in range(WORLD_SIZE)
    ]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = [text.read_text() if text.exists() else "" for text in texts]
    return {"name": name, "statuses": statuses, "said": said, "seconds": time.monotonic() - begun}


def main(folder: Path, base: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        print(json.dumps(killed(folder, base, name)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
