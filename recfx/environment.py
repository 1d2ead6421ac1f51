"""What the programs read from their surroundings, and how their threads share a busy host.

Nothing here imports torch: `wait_briefly` must act before it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

__all__ = ["allowed_threads", "use_threads", "wait_briefly"]

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # set by a user who chooses the policy
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SPINS = 20_000


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets a thread that waits for another spin for about a millisecond and then sleep, if the user has set no policy.

    libgomp, torch's OpenMP on Linux, spins 300 000 times, up to 16 ms. That is longer than a turn on a busy core: a
    thread spins through its turn while the other one waits for a core, and a step of 2 ms takes 20 to 40. 20 000 spins
    are longer than what one thread computes alone within a step, so on an idle host no thread falls asleep in it.

    libgomp reads this when it is loaded. Once torch is imported, nothing is set.
    """
    if "torch" not in sys.modules and not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def use_threads(num_threads: int | None) -> None:
    """Makes torch use so many threads. None: torch's own number, or `allowed_threads` if that is less.

    Where the user has set OMP_NUM_THREADS or MKL_NUM_THREADS, torch's own number is theirs and stays. Processes that
    torchrun starts on a host share its cores. torchrun sets OMP_NUM_THREADS to 1 where it is not set: under torchrun 1
    counts as not set, and one thread a process is num_threads=1.
    """
    import torch

    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    elif num_local > 1 and "MKL_NUM_THREADS" not in os.environ and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, allowed_threads(os.cpu_count() or 1) // num_local))
    elif not any(name in os.environ for name in THREADS):
        own = torch.get_num_threads()
        if (allowed := allowed_threads(own)) < own:
            torch.set_num_threads(allowed)


def allowed_threads(most: int, root: Path = Path("/")) -> int:
    """Threads that can run all the time: at most `most`, the cores that this process may use, and its CPU quota.

    A quota of 2.5 cores allows 2. A third thread would use the other half and the quota with it, and then all threads
    stand still until the next period, 0.1 s.
    Args:     root: where /proc and /sys are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else most
    return max(1, min(most, cores, *(int(quota) for quota in _quotas(root))))


def _quotas(root: Path) -> Iterator[float]:
    """Cores allowed by each control group that this process is in, and by those around it."""
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, inner = line.split(":", 2)
        # Version 2 has one tree. Version 1 has one for each set of controllers, whose folder may name them in another
        # order than the line; "cpu" is then a link to it.
        trees = (controllers, "cpu") if "cpu" in controllers.split(",") else () if controllers else ("",)
        for tree in dict.fromkeys(trees):
            mount = Path(root, "sys/fs/cgroup", tree)
            group = Path(mount, inner.lstrip("/"))
            # In a container the path may be the host's, and the mount be the group itself: what is not there is passed.
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    yield from _quota_of(folder)


def _quota_of(folder: Path) -> Iterator[float]:
    """The quota in cores, if this group has one: version 2 of control groups has one file, version 1 has two."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = Path(folder, "cpu.max").read_text().split()
        yield int(quota) / int(period)  # quota "max" is none
    with suppress(OSError, ValueError, ZeroDivisionError):
        microseconds = int(Path(folder, "cpu.cfs_quota_us").read_text())
        if microseconds > 0:  # -1 is none
            yield microseconds / int(Path(folder, "cpu.cfs_period_us").read_text())
