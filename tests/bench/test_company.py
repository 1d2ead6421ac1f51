"""The load that a benchmark makes ends with it, however that ends; opponents wait as their users would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import harness
from bench.company import busy_processes

# A benchmark that makes load, prints its process id, and runs until it is stopped.
BENCHMARK = """
import time
from bench.company import busy_processes
with busy_processes(1, settle_s=0) as (process,):
    print(process.pid, flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    """Whether it can still compute: one that has ended and was not waited for cannot."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_processes_compute_and_end_with_the_block():
    with busy_processes(2, settle_s=0) as processes:
        time.sleep(0.1)
        assert [p.poll() for p in processes] == [None, None]
    assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2


def test_processes_end_with_an_error():
    with pytest.raises(ZeroDivisionError), busy_processes(1, settle_s=0) as processes:
        raise ZeroDivisionError
    assert processes[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_a_benchmark_that_is_stopped(how):
    command = [sys.executable, "-c", BENCHMARK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as benchmark:
        busy = int(benchmark.stdout.readline())
        assert is_running(busy)
        benchmark.send_signal(how)
        assert benchmark.wait(20) != 0
    until = time.monotonic() + 20
    while is_running(busy) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_running(busy)


def test_opponents_wait_as_their_users_would(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setattr(harness, "FOUND", frozenset())
    with harness.found_environment():
        assert "GOMP_SPINCOUNT" not in os.environ
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setattr(harness, "FOUND", frozenset({"GOMP_SPINCOUNT"}))
    with harness.found_environment():
        assert os.environ["GOMP_SPINCOUNT"] == "10000"
