"""Damaged and odd files of every format: an error that names the file, or rows. Nothing hangs and nothing dies, but for
a damaged ORC file without a manifest, of which pyarrow itself can die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from recfx.data.checksums import write_manifest
from recfx.data.files import match_files
from tests.faults.fuzz_files import FORMATS, content_of, whole

FIRST = int(os.environ.get("RECFX_FUZZ_SEED", "0"))  # another one tries other files
TOO_LONG = ("died of SIGALRM", "died of SIGPROF")
EVERY = 10  # of so many files one is described and converted too


class Child:
    """Reads files in a process with limits, which is started again when it dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, *arguments: object) -> str:
        """The word for a file, or the signal that ended the process."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.fuzz_files"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        _, said = self.process.communicate()
        status, self.process = self.process.returncode, None
        return (
            f"died of {signal.Signals(-status).name}" if status < 0 else f"WRONG: exit status {status}: {said[-500:]}"
        )

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


def fuzz(folder: Path, child: Child, kind: str, num: int, *, manifest: bool) -> Counter:
    """What came of so many files."""
    counts: Counter = Counter()
    path, checksums = folder / f"a.{FORMATS[kind]}", None
    if manifest:
        path.write_bytes(whole(kind.split(",")[0], 0))
        checksums = folder / "_checksums.json"
        write_manifest(checksums, match_files(path))
    for seed in range(FIRST, FIRST + num):
        content = content_of(kind, seed)
        is_undamaged = manifest and content == whole(kind.split(",")[0], 0)  # zeros over zeros
        path.write_bytes(content + b"\0" * is_undamaged)
        all_ways = seed % EVERY == 0 and not manifest
        word = child.ask(str(path), kind, seed, checksums and str(checksums), all_ways)
        counts[word if word.startswith("died") else word.split(":")[0]] += 1
        assert not word.startswith("WRONG"), f"seed {seed} of {kind}: {word}"
        assert word not in TOO_LONG, f"seed {seed} of {kind}: no answer in time"
        assert kind == "orc" or not word.startswith("died"), f"seed {seed} of {kind}: {word}"
    print(f"{kind}{', with a manifest' if manifest else ''}: {dict(counts)}")
    return counts


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("num", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_file_is_rows_or_an_error_that_names_it(tmp_path, child, kind, num):
    counts = fuzz(tmp_path, child, kind, num, manifest=False)
    assert counts["error"] >= num // 5
    assert counts["rows"] >= num // 50


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("num", [10, pytest.param(2000, marks=pytest.mark.slow)])
def test_with_a_manifest_every_damage_is_an_error(tmp_path, child, kind, num):
    assert fuzz(tmp_path, child, kind, num, manifest=True) == {"error": num}
