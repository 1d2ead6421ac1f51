"""Ranks of a host compile in turn: real processes, one of which is killed while it holds the lock."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from recfx.capture import one_at_a_time as module

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
from recfx.capture.one_at_a_time import one_at_a_time
with one_at_a_time():
    print("begin", time.monotonic(), flush=True)
    time.sleep(float(sys.argv[1]))
    print("end", time.monotonic(), flush=True)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a process that holds the lock for some seconds."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    started = []

    def run(seconds):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(seconds)], cwd=ROOT, stdout=-1, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def times_of(process):
    out, _ = process.communicate(timeout=60)
    return [float(line.split()[1]) for line in out.splitlines()]


def test_the_second_begins_when_the_first_has_ended(start):
    both = sorted(times_of(process) for process in [start(0.5), start(0.5)])
    assert both[0][1] <= both[1][0]


def test_a_holder_that_is_killed_does_not_block(start):
    first = start(60)
    assert first.stdout.readline().startswith("begin")
    second = start(0)
    time.sleep(0.2)
    first.kill()
    assert len(times_of(second)) == 2


def test_without_a_writable_cache_it_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(module, "cache_dir", lambda: str(tmp_path / "file" / "cache"))
    with module.one_at_a_time():
        assert module._lock() is None
