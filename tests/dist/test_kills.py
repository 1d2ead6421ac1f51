"""A rank is killed at a random moment: the others end, and any number of ranks goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recfx import checkpoint
from recfx.examples.criteo_synthetic import generate
from tests.dist.launching import ROOT, launch, launched

MODULE = "recfx.examples.deepfm"
STEPS, SAVE_STEPS = 40, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    generate(folder, rows_per_file=2000, train_files=4, eval_files=1, seed=3)
    return folder


def arguments(files: Path, output: Path, *more: str) -> list[str]:
    options = {
        "data_paths": files / "train", "eval_paths": files / "eval", "output_dir": output, "backend": "eager",
        "batch_size": 200, "gradient_accumulation_steps": 1, "save_steps": SAVE_STEPS, "num_threads": 1,
        "max_rows": 2**18,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


SHARDS = "--virtual_shards=4", "--deterministic=true"


@pytest.fixture(scope="module")
def whole(files: Path) -> Path:
    """The last checkpoint of a run of two ranks that was never killed."""
    ranks = launch(MODULE, arguments(files, files / "whole", *SHARDS), timeout=120)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    return last(files / "whole")


def last(folder: Path) -> Path:
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.name == f"step-{STEPS:09d}"
    return found


def killed(files: Path, output: Path, seed: int) -> int:
    """Kills one of two ranks after a checkpoint is there. Returns its step, STEPS if the run ended before."""
    rng = random.Random(seed)
    victim, delay, after = rng.randrange(2), rng.uniform(0, 0.4), rng.randrange(1, STEPS // SAVE_STEPS)
    with launched(MODULE, arguments(files, output, *SHARDS)) as running:
        begun = time.monotonic()
        while not (output / f"step-{after * SAVE_STEPS:09d}" / "manifest.json").exists():
            assert time.monotonic() - begun < 60, "no checkpoint"
            if running.processes[victim].poll() is not None:
                break
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(running.pids[victim], signal.SIGKILL)
        now = time.monotonic()
        ranks = running.wait(30)
        assert time.monotonic() - now < 30
    if ranks[victim].returncode == -signal.SIGKILL:
        other = ranks[1 - victim]
        if other.returncode != 0:  # the victim may have been the last to exit
            assert other.returncode == 1, other
            lines = other.stderr.strip().splitlines()
            assert "error: " in lines[-1], other.stderr
            assert "Traceback" not in other.stderr
    found = checkpoint.latest(output)
    assert found is not None
    return int(found.name.removeprefix("step-"))


def assert_goes_on(files: Path, output: Path, whole: Path, nproc: int) -> None:
    copy = output.with_name(f"{output.name}-{nproc}")
    shutil.copytree(output, copy)
    ranks = launch(MODULE, arguments(files, copy, "--resume=true", "--deterministic=true"), nproc=nproc, timeout=120)
    assert [rank.returncode for rank in ranks] == [0] * nproc, ranks
    differences = checkpoint.diff(whole, last(copy))
    # Rows are renumbered on another number of ranks; `began` and the like are of the call.
    assert not [line for line in differences if ": row: " not in line and not line.startswith("loop: ")]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_killed_rank_costs_only_what_came_after_the_checkpoint(
    files: Path, whole: Path, tmp_path: Path, seed: int
) -> None:
    step = killed(files, tmp_path / "run", seed)
    print(f"killed after the checkpoint of step {step} of {STEPS}")
    for nproc in (2, *((1, 3) if seed else (3,))):
        assert_goes_on(files, tmp_path / "run", whole, nproc)


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again(files: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=1", "--standalone"]
    command += ["-m", MODULE, *arguments(files, tmp_path / "run", *SHARDS)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "run" / f"step-{2 * SAVE_STEPS:09d}" / "manifest.json").exists():
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.01)
        workers = subprocess.run(
            ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert not [line for line in checkpoint.diff(whole, last(tmp_path / "run")) if not line.startswith("loop: ")]


@pytest.mark.parametrize("more", [(2,), pytest.param((3, 4), marks=pytest.mark.slow)])
def test_one_checkpoint_is_evaluated_alike_on_any_number_of_ranks(files: Path, whole: Path, more: tuple) -> None:
    found = []
    for nproc in (1, *more):
        args = [
            "evaluate",
            str(whole.parent),
            str(files / "eval"),
            "--backend=eager",
            "--virtual_shards=4",
            "--deterministic=true",
        ]
        ranks = launch("recfx", args, nproc=nproc, timeout=60)
        assert [rank.returncode for rank in ranks] == [0] * nproc, ranks
        found.append(ranks[0].stdout)
    assert len(set(found)) == 1
    assert "2,000" in found[0]
