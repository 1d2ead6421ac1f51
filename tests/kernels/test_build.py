"""The kernels' library: built once, ahead or when it is asked for, and a compiler's error reaches who asks."""

from __future__ import annotations

import stat
import threading
import time

import pytest

from recfx.kernels import build


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """An empty folder for libraries, and the compilations that were begun: (their target, processes)."""
    begun: list[tuple] = []
    build.library.cache_clear()

    def compile_slowly(compiler, sources, path, num_processes):
        begun.append((path, num_processes))
        time.sleep(0.2)
        path.write_bytes(b"built")

    monkeypatch.setattr(build, "_compile", compile_slowly)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    return begun


def wait_for_builder():
    for thread in threading.enumerate():
        if thread.name == "recfx-build":
            thread.join()


def test_what_is_built_ahead_is_not_built_again(asked):
    build.build_ahead()
    deadline = time.monotonic() + 60
    while not asked and time.monotonic() < deadline:
        time.sleep(0.01)
    path = build._built(2)
    assert path.read_bytes() == b"built"
    assert asked == [(path, max(1, build.NUM_CORES - 1))]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    wait_for_builder()
    build.build_ahead()
    wait_for_builder()
    assert len(asked) == 1


def test_an_error_is_for_who_asks_for_the_library(asked, monkeypatch):
    def fail(compiler, sources, path, num_processes):
        asked.append((path, num_processes))
        raise RuntimeError("c++ -O3: exit status 1.")

    monkeypatch.setattr(build, "_compile", fail)
    build.build_ahead()
    wait_for_builder()  # pytest turns what a thread raises into a failure
    with pytest.raises(RuntimeError, match="exit status 1"):
        build._built(2)
    assert len(asked) == 2


def test_without_a_compiler_nothing_is_built(asked, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.build_ahead()
    wait_for_builder()
    assert build._built(2) is None
    assert not asked
