"""Saving and loading 10 M rows of DeepFM width, against the disk's own speed and against other writers of tensors.

Sides alternate; a claim is the median of the ratios of neighbours. Writes wait for the disk (fsync), reads are from the
disk. On a virtual machine the first touch of memory is slow for every program, so a load into resident memory is
compared with a read into one buffer, and a load into untouched memory with a read into untouched memory.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bench.checkpoint_sides import (
    deepfm_state,
    filled,
    forget,
    load_again,
    read_into_new_memory,
    read_plainly,
    timed,
    write_plainly,
)
from bench.harness import Child, Claim, Claims
from bench.workload import make_batches
from recfx.capture import capture
from recfx.checkpoint import Saver, load, save

NUM_ROWS, ROUNDS = 10_000_000, 3
LOOP = {"epoch": 0, "position": None}


@pytest.fixture(scope="module")
def big():
    return filled(NUM_ROWS)


@pytest.fixture
def folder(tmp_path: Path):
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def saved(big, folder):
    return save(folder / "recfx", *big, number=1, loop=LOOP)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def plain_tensors(state) -> dict[str, torch.Tensor]:
    """The same tensors, contiguous, so that torch and safetensors write them without a copy."""
    (t,) = state.tables
    names = ("ids", "vocabularies", "born", "counts", "rows")
    return {name: getattr(t, name)[:NUM_ROWS].contiguous() for name in names}


def claim(claims: Claims, name: str, recfx_s: list[float], other_s: list[float], other: str, num_bytes: int, target):
    ratio = statistics.median(b / r for r, b in zip(recfx_s, other_s, strict=True))
    rates = [num_bytes / 1e9 / statistics.median(seconds) for seconds in (recfx_s, other_s)]
    claims.add(
        Claim(
            name=name, unit="GB/s", recfx=rates[0], baseline=rates[1], baseline_name=other, ratio=ratio, target=target
        )
    )


def in_turns(*sides, rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each side per round, after one round that is not counted."""
    return [[side() for side in sides] for _ in range(rounds + 1)][1:]


def test_save(benchmark, big, folder, claims: Claims):
    step, state = big
    num_bytes = size_of(save(folder / "recfx", step, state, number=1, loop=LOOP))
    tensors, other = plain_tensors(state), folder / "other"

    def synced(write) -> float:
        def work() -> None:
            write()
            descriptor = os.open(other, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        seconds = timed(work)
        other.unlink()
        return seconds

    sides = {
        "recfx": lambda: timed(lambda: save(folder / "recfx", step, state, number=1, loop=LOOP)),
        "plain sequential write": lambda: synced(lambda: write_plainly(other, num_bytes)),
        "torch.save": lambda: synced(lambda: torch.save(tensors, other)),
        "safetensors": lambda: synced(lambda: safetensors.torch.save_file(tensors, other)),
    }
    rounds = benchmark.pedantic(in_turns, args=tuple(sides.values()), rounds=1)
    ours, *theirs = zip(*rounds, strict=True)
    for name, seconds in zip(list(sides)[1:], theirs, strict=True):
        target = 0.7 if name.startswith("plain") else None
        claim(claims, "save 10 M rows", ours, seconds, name, num_bytes, target)


def test_load(benchmark, big, saved, folder, claims: Claims):
    tensors, num_bytes = plain_tensors(big[1]), size_of(saved)
    torch.save(tensors, folder / "torch")
    safetensors.torch.save_file(tensors, folder / "safetensors")
    del tensors
    os.sync()

    def cold(paths, read) -> float:
        forget(paths)
        return timed(read)

    def untouched() -> float:
        fresh = deepfm_state()
        return cold(list(saved.iterdir()), lambda: load(saved, *fresh))

    resident = deepfm_state()
    sides = {
        "recfx": lambda: cold(list(saved.iterdir()), lambda: load_again(saved, *resident)),
        "recfx, untouched": untouched,
        "plain sequential read": lambda: cold(list(saved.iterdir()), lambda: read_plainly(saved.iterdir())),
        "plain read, untouched": lambda: cold(list(saved.iterdir()), lambda: read_into_new_memory(saved.iterdir())),
        "torch.load": lambda: cold([folder / "torch"], lambda: torch.load(folder / "torch")),
        "safetensors": lambda: cold(
            [folder / "safetensors"],
            lambda: {k: t.clone() for k, t in safetensors.torch.load_file(folder / "safetensors").items()},
        ),
    }
    rounds = benchmark.pedantic(in_turns, args=tuple(sides.values()), rounds=1)
    seconds = dict(zip(sides, zip(*rounds, strict=True), strict=True))
    for ours, other, target in (
        ("recfx", "plain sequential read", 0.7),
        ("recfx, untouched", "plain read, untouched", 0.7),
        ("recfx, untouched", "plain sequential read", None),
        ("recfx, untouched", "torch.load", None),
        ("recfx, untouched", "safetensors", None),
    ):
        name = ours.replace("recfx", "load 10 M rows")
        claim(claims, name, seconds[ours], seconds[other], other, num_bytes, target)


def test_load_onto_two_ranks(benchmark, saved, claims: Claims):
    """Two processes that load half each at the same time, against one process that loads all."""
    arguments = {"target": "bench.checkpoint_sides:loader", "path": str(saved)}
    with (
        Child(**arguments, rank=0, world_size=1) as one,
        Child(**arguments, rank=0, world_size=2) as left,
        Child(**arguments, rank=1, world_size=2) as right,
        ThreadPoolExecutor(2) as pool,
    ):

        def cold(*children: Child) -> float:
            forget(saved.iterdir())
            return timed(lambda: list(pool.map(lambda child: child.run(1), children)))

        sides = (lambda: cold(one)), (lambda: cold(left, right))
        rounds = benchmark.pedantic(in_turns, args=sides, rounds=1)
    whole, halves = zip(*rounds, strict=True)
    name = "load 10 M rows onto 2 ranks"
    claim(claims, name, halves, whole, "recfx, 1 rank", size_of(saved), 1 / 1.3)


@pytest.mark.parametrize("full_every", [1, 10**6], ids=["full", "touched rows"])
def test_background_save(benchmark, folder, full_every, claims: Claims):
    """Training time lost to a background save, against the time of a foreground save of all rows.

    Batches of 1000 touch 200 000 rows of the 10 M, so `touched rows` writes those. A round trains during a save, and as
    long without one before and after it: slow phases of the machine last longer than a round.
    """
    step, state = filled(NUM_ROWS)
    work = make_batches(16, 1000, table_rows=200_000)
    run = capture(step, state, work.batches[0])

    def train(num: int) -> None:
        nonlocal state
        for k in range(num):
            state, _ = run(state, work.batches[k % 16])

    train(200)
    lost, waited = [], []
    with Saver(folder / "waited", step, max_to_keep=1) as other, Saver(folder, step, full_every=full_every) as saver:

        def beside(number: int) -> int:
            saver.save_in_background(state, number=number, loop=LOOP)
            done = 0
            while saver.busy or done < 100:
                train(10)
                done += 10
            saver.finish()
            return done

        def one_round(number: int) -> None:
            waited.append(timed(lambda: other.save(state, number=number, loop=LOOP)))
            before = timed(lambda: train(200)) / 200
            begun = time.perf_counter()
            done = beside(number)
            seconds = time.perf_counter() - begun
            after = timed(lambda: train(200)) / 200
            lost.append(seconds - done * (before + after) / 2)

        beside(0)
        benchmark.pedantic(lambda: [one_round(k) for k in range(1, 8)], rounds=1)
    share = statistics.median(x / y for x, y in zip(lost, waited, strict=True))
    what = "all rows" if full_every == 1 else "touched rows"
    claims.add(
        Claim(
            name=f"background save of {what} beside training",
            unit="s lost",
            recfx=statistics.median(lost),
            baseline=statistics.median(waited),
            baseline_name="save of all rows that is waited for",
            ratio=1 / share,
            target=1 / 0.15,
        )
    )
