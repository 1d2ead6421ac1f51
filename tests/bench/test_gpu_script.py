"""bench/gpu.sh without a GPU: its output, its handling of failing parts, and all parts on a stand-in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_tests, gpu_timing

ROOT = Path(gpu_timing.__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
STAND_IN = Path(__file__).parent / "stand_in"
THEMES = ["ceilings", "profile", "dynamicemb", "deepfm", "table", "sizes", "files"]
OF_TESTS = ["tests_gpu", "tests_races", "tests_captured"]
OTHER_PYTHON = os.environ.get("RECFX_PYTHON312")
OTHER = pytest.param(
    OTHER_PYTHON,
    marks=pytest.mark.skipif(not OTHER_PYTHON, reason="RECFX_PYTHON312 names no python of another environment"),
    id="RECFX_PYTHON312",
)


def run_script(*words: str, python: str = sys.executable, script: Path = SCRIPT, timeout: int = 120, **variables: str):
    environment = os.environ | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"} | variables
    command = ["bash", str(script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def parts() -> list[list[str]]:
    return [text.split() for text in SCRIPT.read_text().splitlines() if text.startswith("part ")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_script_without_a_device_says_so_in_one_line():
    done = run_script()
    assert done.returncode == 1
    assert done.stderr.startswith("bench/gpu.sh: needs a CUDA device")
    assert len(done.stderr.splitlines()) == 1


def test_the_script_is_bash_and_ends_in_less_than_590_seconds():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=20)
    limits = sum(int(seconds) for _, _, seconds, *_ in parts())
    assert f"Limits add up to {limits} s" in SCRIPT.read_text()
    assert limits + 6 + 15 < 590  # the last one's grace, and the page of outcomes
    modules = {words[3] for words in parts()}
    assert modules == {f"bench.gpu_{theme}" for theme in [*THEMES, "toolchain", "tests"]}
    paths = [word for words in parts() for word in words if word.startswith("tests/")]
    assert len(paths) == 3
    assert all((ROOT / path).exists() for path in paths)


FAKE_PYTHON = r"""#!/bin/bash
case "$*" in
    -c*) exit 0 ;;
    *tests/kernels/gpu*) echo begun; sleep 30 ;;
    *bench.gpu_deepfm*) printf 'first\nit\tbroke\n'; exit 3 ;;
    *bench.gpu_timing\ --outcomes*) cat "$4" >"$KEPT" ;;
    *) echo well ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """The script next to a `python3` that only pretends; every limit is 1 s."""
    (tmp_path / "bench").mkdir()
    copy, python = tmp_path / "bench" / "gpu.sh", tmp_path / "python3"
    copy.write_text(re.sub(r"^(part \w+) \d+", r"\1 1", SCRIPT.read_text(), flags=re.MULTILINE))
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return copy


def outcomes(fake: Path, *words: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    kept = fake.parents[1] / "kept"
    done = run_script(*words, python=str(fake.parents[1] / "python3"), script=fake, KEPT=str(kept))
    return done, [text.split("\t") for text in kept.read_text().splitlines()]


def test_the_script_goes_on_after_a_part_that_hangs_or_fails(fake):
    done, rows = outcomes(fake)
    assert done.returncode == 1
    ended = {row[0]: (*row[3:],) for row in rows}
    assert list(ended) == [words[1] for words in parts()]
    assert ended.pop("kernels") in {("124", "begun"), ("137", "begun")}
    assert ended.pop("deepfm") == ("3", "it broke")
    assert set(ended.values()) == {("0", "well")}
    limits = [int(row[1]) for row in rows]
    assert limits[0] == 1
    assert limits[-1] > 2  # time that earlier ones left


def test_only_the_parts_that_are_named_run(fake):
    done, rows = outcomes(fake, "table", "--small", "ceilings")
    assert done.returncode == 0
    assert [row[0] for row in rows] == ["ceilings", "table"]
    done, _ = outcomes(fake, "table", "tables")
    assert done.returncode == 2
    assert "bench/gpu.sh: got part tables, expected one of: toolchain ceilings kernels " in done.stderr


TWO_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(5))
def test_numbers(n):
    assert n != 3, f"got {n}"

def test_not_of_a_gpu():
    raise AssertionError
"""


@pytest.mark.parametrize("run", [gpu_tests.by_xdist, gpu_tests.by_shards])
def test_tests_are_divided_between_processes(run, tmp_path, monkeypatch):
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    code, said = run(["test_two.py"], 2)
    assert code == 1
    counts = gpu_tests.counted(said)
    assert (counts["passed"], counts["failed"]) == (4, 1)
    ((test, error),) = gpu_tests.failures(said)
    assert test == "test_two.py::test_numbers[3]"
    assert error.startswith("AssertionError: got 3")


@pytest.mark.slow
@pytest.mark.parametrize("python", [pytest.param(sys.executable, id="this"), OTHER])
def test_all_of_the_script_on_a_stand_in(python, tmp_path):
    """Every main, at small sizes, on a CPU in place of the device; each writes its pages."""
    done = run_script(
        "--small", "--results", str(tmp_path), python=python, timeout=3000, PYTHONPATH=str(STAND_IN), PATIENCE="20"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout
    pages = {path.name.partition("_standin")[0]: path for path in tmp_path.glob("*.json")}
    assert sorted(pages) == sorted([*THEMES, *OF_TESTS, "parts"])
    ended = json.loads(pages.pop("parts").read_text())
    assert [(part["part"], part["exit_code"]) for part in ended] == [(words[1], "0") for words in parts()]
    for theme in THEMES:
        held = json.loads(pages[theme].read_text())
        assert held["records"], theme
        assert not [note for note in held["notes"] if "failed" in note]
    for theme in ("profile", "dynamicemb"):
        tables = json.loads(pages[theme].read_text())["tables"]
        assert len(tables) == 2
        assert all(table["rows"] for table in tables)
