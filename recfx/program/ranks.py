"""How a program joins the ranks that torchrun has started: their streams, and what a restarted worker does."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed

from recfx import checkpoint as checkpoints
from recfx.dist import Group, current, join, leave
from recfx.program.record import write_text

__all__ = [
    "deal_to",
    "end_at_once",
    "end_ranks",
    "is_first_process",
    "is_restarted",
    "join_ranks",
    "mark_launch",
    "rank_prefix",
]

LAUNCH = ".launch"  # in output_dir: which launch of torchrun has trained there last


def join_ranks(
    output_dir: str | os.PathLike[str],
    *,
    streams: int | None = None,
    deterministic: bool = False,
    device: str = "cpu",
    resume: bool = False,
) -> Group:
    """The group of the ranks that train or evaluate in `output_dir`. One that was joined before is taken if it fits.

    Args:     streams: None: those of the newest checkpoint where the run goes on, or as many as there are ranks.
              deterministic, device: see `recfx.dist.join`.  resume: whether the run goes on from a checkpoint.
    Raises:   ValueError when the run goes on with another number of streams than its checkpoint, or not as
              deterministic as it; what `recfx.dist.join` raises.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    saved = _loop_of(output_dir) if resume else {}
    before = saved.get("streams", 1)
    if saved.get("ended") and saved.get("position") is None:  # the next run begins at the start of its data
        streams = before if streams is None and before > 1 else streams
    elif saved:
        if streams not in (None, before):
            raise ValueError(
                f"streams: got {streams}, expected {before} as in the checkpoint in {output_dir}. Its place "
                "in the data is one of so many streams. Leave --virtual_shards (streams) out, or begin again in a new "
                "output_dir."
            )
        streams = before
        if saved.get("deterministic", False) != deterministic:
            raise ValueError(
                f"deterministic: got {deterministic}, expected {not deterministic} as in the checkpoint in "
                f"{output_dir}. Its rows were trained so. Give --deterministic={str(not deterministic).lower()}, or "
                "begin again in another output_dir."
            )
    group = current()
    if (
        group is not None
        and (group.world_size, group.deterministic) == (world_size, deterministic)
        and streams in (None, group.streams)
    ):
        return group
    return join(streams=streams, deterministic=deterministic, device=device, use=world_size > 1 or deterministic)


def deal_to(group: Group, reader: Any) -> Any:
    """This rank's part of a program's reader; the reader itself in one process that deals to no streams."""
    if group.world_size == 1 and group.streams == 1 and not group.deterministic:
        return reader
    from recfx.dist.streams import deal

    return deal(reader, group)


def is_restarted(output_dir: str | os.PathLike[str]) -> bool:
    """Whether torchrun has started this worker again after a failure, and the launch had trained in `output_dir`.

    Such a worker goes on from the newest checkpoint. One whose launch had not come to its first step starts by its
    arguments: checkpoints that are there are of another run.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    try:
        return Path(output_dir, LAUNCH).read_text(encoding="utf-8") == _launch()
    except OSError:
        return False


def mark_launch(output_dir: str | os.PathLike[str]) -> None:
    """Records, before the first step, that this launch of torchrun trains in `output_dir`. Nothing without torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        write_text(Path(output_dir, LAUNCH), _launch())


def end_ranks() -> None:
    """Ends the process groups of torch in order, once every rank has come here; a program that went well calls it.

    A process that ends while its groups still have threads may be aborted by torch, after all of its work.
    """
    group = current()
    if group is not None and group.world_size > 1:
        group.wait()
        leave()
        distributed.destroy_process_group()


def end_at_once(status: int, line: str) -> NoReturn:
    """Ends this rank with a line on standard error.

    Nothing of Python or torch is taken down: torch may abort a process whose groups still have threads.
    """
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    os._exit(status)


def rank_prefix() -> str:
    """What an error of this rank begins with: "rank 1: "; "" in one process."""
    return f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def is_first_process() -> bool:
    """Whether this process prints for all: rank 0, or one alone."""
    return int(os.environ.get("RANK", "0")) == 0


def _launch() -> str:
    """Names a launch of torchrun: its id, or, where the user gave none, its process on rank 0's host."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    try:
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        began = ""
    return f"{socket.gethostname()} {os.getppid()} {began}"


def _loop_of(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The `loop` of the newest checkpoint; empty where there is none, or it is damaged: loading raises then."""
    found = checkpoints.latest(Path(output_dir))
    for path in () if found is None else (found / "manifest.json", found / "rank-00000" / "manifest.json"):
        try:
            loop = json.loads(path.read_bytes()).get("loop")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(loop, dict):
            return loop
    return {}
