"""Files mapped into memory: whole ones are read as they are, of one that is cut short zeros, and `check` tells."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from recfx.data.packing.mapped_files import MappedFile, replaced
from recfx.kernels.build import library
from tests.faults.children import in_child

PAGE = os.sysconf("SC_PAGE_SIZE")
pytestmark = pytest.mark.skipif(library() is None, reason="without a compiler nothing is mapped")


def ones(path: Path, num_bytes: int) -> Path:
    path.write_bytes(b"\1" * num_bytes)
    return path


def view(mapped: MappedFile) -> np.ndarray:
    return np.frombuffer(mapped.buffer(), np.uint8)


@pytest.mark.parametrize("left", [0, 1, PAGE, 3 * PAGE + 10])
def test_what_is_gone_is_zeros_and_told(tmp_path, left):
    def work() -> None:
        mapped, other = MappedFile(ones(tmp_path / "a", 5 * PAGE + 7)), MappedFile(ones(tmp_path / "b", PAGE))
        assert view(mapped).sum() == 5 * PAGE + 7
        before = replaced().value
        os.truncate(tmp_path / "a", left)
        assert view(mapped).sum() == left
        assert replaced().value == before + 1
        ones(tmp_path / "a", 5 * PAGE + 7)  # too late: what was read is zeros
        with pytest.raises(
            ValueError, match=rf"cache file '{tmp_path}/a': got bytes that cannot be read, expected the"
        ):
            mapped.check()
        other.check()

    in_child(work)


def test_from_several_threads_at_once(tmp_path):
    def work() -> None:
        files = [MappedFile(ones(tmp_path / f"{i}", 64 * PAGE)) for i in range(8)]
        os.truncate(tmp_path / "3", 0)
        os.truncate(tmp_path / "5", PAGE)
        sums: list[list[int]] = [[] for _ in range(4)]
        threads = [threading.Thread(target=lambda s=s: s.extend(int(view(f).sum()) for f in files)) for s in sums]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = [64 * PAGE] * 8
        expected[3], expected[5] = 0, PAGE
        assert sums == [expected] * 4

    in_child(work)


def test_it_lives_as_long_as_what_is_made_of_it_and_keeps_no_descriptor(tmp_path):
    num_open = len(os.listdir("/proc/self/fd"))
    mapped = MappedFile(ones(tmp_path / "a", PAGE))
    number, array = mapped._number, view(mapped)
    del mapped
    gc.collect()
    assert MappedFile(ones(tmp_path / "b", PAGE))._number != number
    assert array.sum() == PAGE
    assert len(os.listdir("/proc/self/fd")) == num_open
    del array
    gc.collect()
    assert MappedFile(tmp_path / "b")._number == number


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "nowhere")
