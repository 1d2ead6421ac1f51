"""Processes that keep cores busy during a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["busy_processes"]

# It ends with the process that started it, which also handles ctrl-C.
SPIN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("busy", flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000): pass
"""


@contextmanager
def busy_processes(number: int, *, settle_s: float = 0.2) -> Iterator[list[subprocess.Popen]]:
    """Runs `number` processes of normal priority that compute until the `with` block ends.

    Args:     settle_s: seconds for the system to spread them over the cores before the block begins.
    Example:
              >>> with busy_processes(1) as (process,):
              ...     assert process.poll() is None
              >>> process.poll() is None
              False
    """
    processes: list[subprocess.Popen] = []
    try:
        for _ in range(number):
            command = [sys.executable, "-S", "-c", SPIN, str(os.getpid())]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(settle_s)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
