"""Two processes of a thread each beside one process with two threads, and beside torch's DDP: real processes over Gloo.

All sides take turns, so that other work on the machine falls on each of them.

python -m pytest bench/test_dist.py --benchmark-only -s
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from recfx.examples.criteo_synthetic import generate
from tests.dist.launching import launch

TURNS = 3
ONE, TWO = {"nproc": 1, "threads": 2}, {"nproc": 2, "threads": 1}
SIDES: dict[str, tuple[list[str], dict[str, int]]] = {
    "one process, two threads": (["recfx"], ONE),
    "two processes": (["recfx"], TWO),
    "one process, deterministic": (["recfx", "deterministic"], ONE),
    "two processes, deterministic": (["recfx", "deterministic"], TWO),
    "DDP, 1 M rows": (["ddp", "1000000"], TWO),
    "DDP, 10 M rows": (["ddp", "10000000"], TWO),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    generate(folder, rows_per_file=40_000, train_files=10, eval_files=1, seed=1)
    return str(folder / "train")


def measured(side: str, files: str, batch_size: int) -> dict[str, Any]:
    (kind, *option), how = SIDES[side]
    return said("bench.dist_worker", [kind, files, str(batch_size), *option], **how)


def said(module: str, args: list[str], *, nproc: int, threads: int) -> dict[str, Any]:
    """The JSON that rank 0 prints. The threads of this process, which conftest sets, are not the ranks'."""
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    ranks = launch(module, args, nproc=nproc, timeout=900, env=env)
    assert all(rank.returncode == 0 for rank in ranks), ranks[0].stderr
    return json.loads(ranks[0].stdout.splitlines()[-1])


@pytest.mark.parametrize("batch_size", [4096, 16_384])
def test_many_workers(benchmark: Any, files: str, batch_size: int) -> None:
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}

    def all_sides() -> None:
        for _ in range(TURNS):
            for side in SIDES:
                turns[side].append(measured(side, files, batch_size))

    benchmark.pedantic(all_sides, rounds=1)
    results = {
        side: {name: statistics.median(turn[name] for turn in of) for name in of[0]} for side, of in turns.items()
    }
    benchmark.extra_info.update(results)
    base = results["one process, two threads"]
    for side, found in results.items():
        more = ", ".join(f"{name} {value:.2f}" for name, value in found.items() if "MB" in name)
        cpu = " ".join(f"{turn['cpu_ms']:.1f}" for turn in turns[side])
        print(
            f"{batch_size:>6} {side:<30} CPU {found['cpu_ms']:8.1f} ms ({found['cpu_ms'] / base['cpu_ms']:.2f}), "
            f"wall {found['wall_ms']:8.1f} ms ({found['wall_ms'] / base['wall_ms']:.2f}) {more} turns: {cpu}"
        )


@pytest.mark.parametrize("batch_size", [4096, 16_384])
def test_parts_of_a_step(benchmark: Any, files: str, batch_size: int) -> None:
    """Op by op: a rank of two, beside one process of one thread with as many samples as that rank has."""
    sides = {"one process": (1, batch_size // 2), "rank 0 of two": (2, batch_size)}
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}

    def all_sides() -> None:
        for _ in range(TURNS):
            for side, (nproc, num) in sides.items():
                turns[side].append(said("bench.dist_parts", [files, str(num)], nproc=nproc, threads=1))

    benchmark.pedantic(all_sides, rounds=1)
    results = {
        side: {part: statistics.median(turn[part] for turn in of) for part in of[0]} for side, of in turns.items()
    }
    benchmark.extra_info.update(results)
    one, two = results.values()
    for part, ms in two.items():
        print(f"{batch_size:>6} {part:<48} {ms:8.2f} ms, one process {one.get(part, 0.0):8.2f} ms")
