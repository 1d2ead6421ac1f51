"""The kernels' library: built once, ahead or when it is asked for, and a compiler's error reaches who asks."""

from __future__ import annotations

import shutil
import stat
import threading
import time

import pytest
from torch._inductor.custom_graph_pass import get_hash_for_files

from recfx.capture import passes
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


def test_a_change_of_any_source_of_the_kernels_changes_the_keys_of_both_caches(tmp_path, monkeypatch):
    """A source that no key holds would leave a stale library, or a stale graph, in use without a word."""
    package = tmp_path / "recfx"
    shutil.copytree(build.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setattr(passes, "KERNELS", package / "kernels")
    hash_files = get_hash_for_files.__wrapped__  # torch remembers the hash of a file's name

    def keys() -> tuple[str, bytes]:
        with monkeypatch.context() as patched:
            patched.setattr(passes, "get_hash_for_files", hash_files)
            return build._name_of("c++"), passes.StepPasses().uuid()

    monkeypatch.setattr(build, "_run", lambda command: "version")
    sources = [p for p in sorted(package.rglob("*")) if p.suffix in (".py", ".cpp", ".h")]
    of_library = [p for p in sources if p.suffix != ".py"]
    of_graphs = [p for p in sources if package / "kernels" in p.parents]
    assert {"find.h", "pack.h", "ops.cpp", "schemas.h"} <= {p.name for p in of_library}
    assert {"find.py", "find.cpp", "launch.py"} <= {p.name for p in of_graphs}
    library, graphs = keys()
    for path in {*of_library, *of_graphs}:
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        changed = keys()
        assert (changed[0] != library, changed[1] != graphs) == (path in of_library, path in of_graphs), path
        path.write_bytes(before)
    assert keys() == (library, graphs)
