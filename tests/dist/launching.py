"""Starts ranks as torchrun does, each with its own output, so that a test can look at what each of them said."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Launch", "Rank", "free_port", "launch", "launched"]

ROOT = Path(__file__).parents[2]
KEPT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rank:
    """What one rank did: its exit status, negative for a signal, and its output."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Launch:
    """Ranks that run. pids: of the processes, by rank."""

    processes: list[subprocess.Popen]
    outputs: list[tuple[Path, Path]]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def wait(self, timeout: float) -> list[Rank]:
        """The ranks, by number, once all have ended. Raises TimeoutExpired, after which none is left."""
        for process in self.processes:
            process.wait(timeout)
        return self.ended()

    def ended(self) -> list[Rank]:
        """What the ranks have said so far; all must have ended."""
        return [
            Rank(process.returncode, out.read_text(), err.read_text())
            for process, (out, err) in zip(self.processes, self.outputs, strict=True)
        ]


def free_port() -> int:
    """A port of this host that no one listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(
    script_or_module: str | os.PathLike[str],
    args: Sequence[str] = (),
    *,
    nproc: int = 2,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Rank]:
    """Runs a .py file, or a module, in so many ranks until all have ended. No rank is left running.

    Raises:   subprocess.TimeoutExpired where one has not ended after `timeout` seconds.
    """
    with launched(script_or_module, args, nproc=nproc, env=env) as running:
        return running.wait(timeout)


@contextmanager
def launched(
    script_or_module: str | os.PathLike[str],
    args: Sequence[str] = (),
    *,
    nproc: int = 2,
    env: Mapping[str, str] | None = None,
) -> Iterator[Launch]:
    """Ranks that run within this context, with the variables that torchrun sets."""
    what = [os.fspath(script_or_module)] if str(script_or_module).endswith(".py") else ["-m", str(script_or_module)]
    together = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
    together |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join([str(ROOT), *_path()])}
    base = {name: value for name, value in os.environ.items() if name not in KEPT}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"out-{rank}"), Path(folder, f"err-{rank}")) for rank in range(nproc)]
        processes: list[subprocess.Popen] = []
        try:
            for rank, (out, err) in enumerate(outputs):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
                with out.open("w") as stdout, err.open("w") as stderr:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, *what, *args],
                            stdout=stdout, stderr=stderr, env={**base, **own, **together, **(env or {})},
                        )
                    )  # fmt: skip
            yield Launch(processes, outputs)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                process.wait()


def _path() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
