"""Runs scripts as programs, each in a fork of one warm process: `python -m tests.forks` is that process.

A script that trains a captured step imports torch and the compiler, which takes 3 to 5 s, before it does anything. The
warm process has done so and has compiled one function. It has imported nothing of recfx and has started no thread, so a
fork is a process as the script would have it: its own working folder, arguments, output, modules of recfx and end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]
WARNINGS = ("-W", "error:::recfx", "-W", "error:::__main__")
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
READY = "ready"


class Done(NamedTuple):
    returncode: int  # -signal of a script that was killed
    stdout: str
    stderr: str


class Forks:
    """The warm process, and requests to it. It ends when it is closed, and with the process that started it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="recfx-forks-")
        self._errors = Path(self._folder.name) / "warming"
        environment = os.environ | THREADS | {"PYTHONPATH": str(ROOT)}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *WARNINGS, "-m", "tests.forks"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        assert self._answer() == READY
        assert self._errors.read_text() == ""

    def run(self, script: Path, *arguments: str, cwd: Path, timeout: float) -> Done:
        """The script as `__main__`. Raises subprocess.TimeoutExpired after `timeout` seconds; all its processes end."""
        outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        request = {
            "arguments": [str(script), *arguments],
            "cwd": str(cwd),
            "outputs": list(map(str, outputs)),
            "timeout": timeout,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = self._answer()
        stdout, stderr = (path.read_text() for path in outputs)
        if status is None:
            raise subprocess.TimeoutExpired(str(script), timeout, stdout, stderr)
        return Done(os.waitstatus_to_exitcode(status), stdout, stderr)

    def close(self) -> None:
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # its exit waits for the compiler's threads
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _answer(self) -> int | str | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the warm process ended: {self._errors.read_text()}"
        return json.loads(line)


def main() -> None:
    warm()
    answer = os.fdopen(os.dup(1), "w")  # what a script prints goes elsewhere
    _say(answer, READY)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answer.close()
            become(request["arguments"], request["cwd"], request["outputs"])
        _say(answer, _status_of(child, request["timeout"]))


def warm() -> None:
    """What every script does first. A thread would be missing in a fork, and what it holds would stay locked."""
    import torch
    from tqdm import tqdm

    interval = tqdm.monitor_interval
    tqdm.monitor_interval = 0  # the compiler's progress bars would start a thread
    torch.compile(lambda x: (x.exp() + 1).sum(), dynamic=False)(torch.ones(8))
    torch.compiler.reset()
    tqdm.monitor_interval = interval
    gc.collect()
    gc.freeze()  # a fork that ends does not search what it has from here
    threads = [Path(f"/proc/self/task/{n}/comm").read_text().strip() for n in os.listdir("/proc/self/task")]
    assert len(threads) == 1, f"the warm process has threads: {threads}"
    assert not any(name.split(".")[0] == "recfx" for name in sys.modules)


def become(arguments: Sequence[str], cwd: str, outputs: Sequence[str]) -> NoReturn:
    """This process runs the script from here on, and ends as Python does."""
    os.setsid()  # so that its own processes end with it
    os.chdir(cwd)
    for file, path in enumerate((os.devnull, *outputs)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, file)
        os.close(opened)
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).parent)  # as Python has it for a script
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


def _say(answer: IO[str], value: int | str | None) -> None:
    answer.write(json.dumps(value) + "\n")
    answer.flush()


def _status_of(child: int, timeout: float) -> int | None:
    """The status with which it ends; None where it has not within `timeout` seconds and was killed."""
    ended = os.pidfd_open(child)
    in_time = bool(select.select([ended], [], [], timeout)[0])
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    status = os.waitpid(child, 0)[1]
    return status if in_time else None


if __name__ == "__main__":
    main()
