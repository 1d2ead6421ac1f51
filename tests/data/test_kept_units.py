"""Units that streams share are decoded once, by one thread, and not kept for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from recfx.data.files import File
from recfx.data.kept_units import KeptUnits
from recfx.data.unit_rows import Decoded

FILE = File(fs.LocalFileSystem(), "a.orc", 1, 1)


class Decode:
    """Counts the units that are decoded, of ten rows each."""

    def __init__(self) -> None:
        self.units: list[int] = []

    def __call__(self, file: File, unit: int) -> Decoded:
        self.units.append(unit)
        return Decoded(pa.RecordBatch.from_pydict({"n": [unit] * 10}), 0)


@pytest.mark.parametrize(("num_rows", "kept"), [(0, [3, 4]), (10, [3, 4]), (11, [2, 3, 4]), (1000, [0, 1, 2, 3, 4])])
def test_the_newest_units_are_kept(num_rows: int, kept: list[int]) -> None:
    units, decode = KeptUnits(2, num_rows), Decode()
    for unit in range(5):
        units.read(FILE, unit, decode)
    units.read(FILE, 4, decode)
    assert decode.units == [0, 1, 2, 3, 4]
    assert [unit for _, unit in units._kept] == kept
    units.clear()
    units.read(FILE, 4, decode)
    assert decode.units[5:] == [4]


def test_threads_wait_for_the_one_that_decodes() -> None:
    units, decode, waiting = KeptUnits(2, 0), Decode(), threading.Event()

    def slowly(file: File, unit: int) -> Decoded:
        assert waiting.wait(10)
        return decode(file, unit)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(units.read, FILE, 7, slowly) for _ in range(4)]
        waiting.set()
        assert all(future.result(10) is asked[0].result() for future in asked)
    assert decode.units == [7]


def test_an_error_is_not_kept() -> None:
    units, decode = KeptUnits(2, 0), Decode()

    def fails(file: File, unit: int) -> Any:
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        units.read(FILE, 1, fails)
    assert units.read(FILE, 1, decode).batch.num_rows == 10
