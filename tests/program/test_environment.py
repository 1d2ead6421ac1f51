"""What the programs read from their surroundings: how threads wait, and how many there may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recfx import environment
from recfx.environment import allowed_threads, use_threads, wait_briefly

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Runs as `python -m MODULE` does until torch is imported: that is when libgomp reads the environment.
AT_TORCH = """
import importlib.abc, os, runpy, sys
class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
runpy.run_module(sys.argv[1], run_name="__main__")
"""


def at_torch(module: str, **said: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in POLICIES}
    command = [sys.executable, "-c", AT_TORCH, module]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=clean | said).stdout


@pytest.mark.parametrize("program", ["recfx.examples.deepfm", "recfx.examples.deepctr"])
def test_the_policy_is_set_before_a_program_imports_torch(program):
    assert at_torch(program).split() == ["None", str(environment.SPINS)]


def test_what_the_user_says_of_waiting_stays():
    assert at_torch("recfx.examples.deepfm", OMP_WAIT_POLICY="active").split() == ["active", "None"]
    assert at_torch("recfx.examples.deepfm", GOMP_SPINCOUNT="7").split() == ["None", "7"]


def test_the_library_sets_nothing():
    assert at_torch("recfx.train").split() == ["None", "None"]
    assert at_torch("recfx.capture").split() == ["None", "None"]


def test_nothing_is_set_once_torch_is_there():
    assert "torch" in sys.modules
    variables: dict[str, str] = {}
    wait_briefly(variables)
    assert variables == {}


def tree(root: Path, lines: str, files: dict[str, str]) -> Path:
    for name, text in ({"proc/self/cgroup": lines} | {f"sys/fs/cgroup/{n}": t for n, t in files.items()}).items():
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(root, name).write_text(text)
    return root


V1 = "5:memory:/job\n4:cpuset:/\n3:cpuacct,cpu:/job\n0::/\n"
CASES = {
    "no quota": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 8),
    "its group": ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n"}, 3),
    "the least of those around it": (
        "0::/a/b\n",
        {"a/b/cpu.max": "600000 100000\n", "a/cpu.max": "200000 100000\n", "cpu.max": "max 100000\n"},
        2,
    ),
    "part of a core is not counted": ("0::/\n", {"cpu.max": "290000 100000\n"}, 2),
    "less than a core": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "the host's path in a container": ("0::/docker/4f1b\n", {"cpu.max": "400000 100000\n"}, 4),
    "a path out of the tree": ("0::/../other\n", {"cpu.max": "500000 100000\n"}, 5),
    "another group's": ("0::/a\n", {"other/cpu.max": "100000 100000\n"}, 8),
    "version 1": (V1, {"cpu/job/cpu.cfs_quota_us": "250000\n", "cpu/job/cpu.cfs_period_us": "50000\n"}, 5),
    "version 1, by both names": (
        "3:cpu,cpuacct:/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "version 1 without a quota": (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    "version 1, other controllers": (
        "4:cpuset:/\n",
        {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "damaged": ("0::/\n", {"cpu.max": "\n", "cpu.cfs_quota_us": "many\n"}, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas_limit_the_threads(case, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    lines, files, expected = CASES[case]
    root = tree(tmp_path, lines, files)
    assert allowed_threads(8, root) == expected
    assert allowed_threads(1, root) == 1


def test_without_control_groups_the_cores_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert allowed_threads(8, tmp_path) == 3


@pytest.fixture
def threads(monkeypatch):
    """The numbers that torch.set_num_threads receives; torch has 4 threads at first."""
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(environment, "allowed_threads", lambda most: min(most, 3))
    for name in environment.THREADS:
        monkeypatch.delenv(name, raising=False)
    return told


def test_a_program_uses_what_is_allowed(threads):
    use_threads(None)
    assert threads == [3]


def test_where_all_are_allowed_torch_is_told_nothing(threads, monkeypatch):
    monkeypatch.setattr(environment, "allowed_threads", lambda most: most)
    use_threads(None)
    assert threads == []


def test_a_number_that_the_user_gives_holds(threads, monkeypatch):
    use_threads(6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    use_threads(None)
    use_threads(2)
    assert threads == [6, 2]


@pytest.mark.parametrize(("word", "expected"), [(None, [2]), ("1", [2]), ("3", [])])
def test_processes_of_a_host_share_its_cores(threads, monkeypatch, word, expected):
    """torchrun sets OMP_NUM_THREADS to 1 where the user has not."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(environment, "allowed_threads", lambda most: 4)
    if word is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", word)
    use_threads(None)
    assert threads == expected
