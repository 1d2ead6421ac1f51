"""Single flipped bytes and truncations of every format: an error that names the file, or rows, but never a hang, a
partial batch or rows that nobody wrote. Decoding runs in child processes, because pyarrow itself can die of it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from recfx.data.checksums import write_manifest
from recfx.data.files import match_files
from tests.data.damage import outcome
from tests.data.rows import write

NUM_ROWS, BATCH_SIZE, LIMIT_S = 60, 8, 20.0
KINDS = ("flip", "cut")


class Child:
    """Decodes damaged files in a separate process, which is restarted when it dies."""

    def __init__(self) -> None:
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.data.damage"]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, path: Path, checksums: Path | None) -> dict | None:
        """What came of reading the file; None when the process died. Raises TimeoutError when it hangs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(path), checksums and str(checksums)]) + "\n")
        self.process.stdin.flush()
        hung = threading.Timer(LIMIT_S, self.process.kill)
        hung.start()
        line = self.process.stdout.readline()
        if not hung.is_alive():
            raise TimeoutError(f"{path}: no answer within {LIMIT_S} s")
        hung.cancel()
        if line:
            return json.loads(line)
        self.close()
        self.process = self.start()
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def table() -> pa.Table:
    rng = random.Random(5)
    rows = range(NUM_ROWS)
    return pa.table(
        {
            "label": [[float(i % 2)] for i in rows],
            "x": [[rng.random() for _ in range(i % 3)] for i in rows],
            "c": [[rng.getrandbits(40) for _ in range(i % 4)] for i in rows],
            "word": [[f"w{rng.getrandbits(20)}" for _ in range(i % 2)] for i in rows],
        }
    )


def flat_table() -> pa.Table:
    lists = table()
    return pa.table({name: [row[0] if row else None for row in lists[name].to_pylist()] for name in lists.column_names})


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    if kind == "cut":
        return content[:place]
    flipped = bytearray(content)
    flipped[place] ^= rng.randrange(1, 256)
    return bytes(flipped)


def judge(answer: dict | None, path: Path, whole: list[str]) -> str:
    """One word for the outcome of reading a file; an assertion fails when it is not allowed."""
    if answer is None:
        return "died"
    rows, error = answer["rows"], answer["error"]
    assert len(rows) <= NUM_ROWS, "rows were invented"
    if error is not None:
        assert str(path) in error
        assert len(rows) % BATCH_SIZE == 0, "a partial batch before the error"
        return "error"
    return "same rows" if rows == whole else "other values" if len(rows) == len(whole) else "fewer rows"


def run(tmp_path: Path, child: Child, extension: str, num: int, *, manifest: bool) -> Counter:
    path = Path(write(tmp_path / f"a.{extension}", flat_table() if extension == "csv" else table(), 16))
    whole, content, rng = outcome(str(path), None)["rows"], path.read_bytes(), random.Random(extension)
    assert len(whole) == NUM_ROWS
    checksums = None
    if manifest:
        checksums = tmp_path / "_checksums.json"
        write_manifest(checksums, match_files(path))
    counts = Counter()
    for i in range(num):
        kind = KINDS[i % 5 == 0]
        broken = damaged(content, kind, rng)
        path.write_bytes(broken)
        counts[kind, judge(child.ask(path, checksums), path, whole)] += 1
    print(extension, "with a manifest:" if manifest else "alone:", dict(counts))
    return counts


# Without a checksum a format cannot show a flipped value: what it may come to, by format.
ALONE = {
    "orc": {"error", "same rows", "other values", "died"},
    "parquet": {"error", "same rows"},
    "arrow": {"error", "same rows", "other values"},
    "csv": {"error", "same rows", "other values", "fewer rows"},
}


@pytest.mark.parametrize("num", [25, pytest.param(125, marks=pytest.mark.slow)])
@pytest.mark.parametrize("extension", ALONE)
def test_what_a_format_can_show_is_an_error(tmp_path, child, extension, num):
    counts = run(tmp_path, child, extension, num, manifest=False)
    assert {word for _, word in counts} <= ALONE[extension]
    assert counts["flip", "died"] + counts["cut", "died"] <= num // 10
    if extension != "csv":
        assert {word for kind, word in counts if kind == "cut"} == {"error"}


@pytest.mark.parametrize("num", [25, pytest.param(125, marks=pytest.mark.slow)])
@pytest.mark.parametrize("extension", ALONE)
def test_with_a_manifest_every_case_is_an_error(tmp_path, child, extension, num):
    counts = run(tmp_path, child, extension, num, manifest=True)
    assert {word for _, word in counts} == {"error"}
