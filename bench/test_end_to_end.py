"""From ORC files: the reader alone, the step alone, both together, and a JAX loop with its own decoding.

recfx runs once with every epoch decoded, as in the JAX loop, and once in an epoch after the first with `cache`.

Files are the real sample in the folder RECFX_CRITEO_SAMPLE, or else generated ones of the same shape.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from bench.harness import BASELINES, Claim, Claims, call_in_child
from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.examples.criteo_synthetic import generate

BATCH_SIZE, ROUNDS, EPOCHS = 1000, 7, 3
JAX_TARGETS = {"jax_textbook": 1.4, "jax": 1.0}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = os.environ.get("RECFX_CRITEO_SAMPLE")
    if not folder:
        folder = str(tmp_path_factory.mktemp("data") / "generated")
        generate(folder, rows_per_file=10_000, train_files=4, eval_files=1, seed=0)
        folder += "/train"
    return sorted(str(p) for p in Path(folder).glob("*.orc"))


def samples_per_s(run, num_samples: int) -> float:
    begun = time.perf_counter()
    run()
    return num_samples / (time.perf_counter() - begun)


def test_end_to_end(benchmark, paths, tmp_path, claims: Claims):
    args = program.parse(["--data_paths", ",".join(paths), "--gradient_accumulation_steps", "1", "--thread_num", "2",
                          "--prefetch", "0", "--batch_size", str(BATCH_SIZE)])  # fmt: skip
    reader = program.read(args, args.data_paths, drop_remainder=True)
    args.cache_dir = tmp_path / "cache"
    cached = program.read(args, args.data_paths, drop_remainder=True)
    step, state = program.build_step(args)
    in_memory = list(reader)
    num_samples = EPOCHS * BATCH_SIZE * len(in_memory)
    run = capture(step, state, in_memory[0])

    def train(batches) -> None:
        for batch in batches:
            run(state, batch)

    train(in_memory * 3)
    work = {
        "reader": lambda: [None for _ in range(EPOCHS) for _ in reader],
        "step": lambda: train(in_memory * EPOCHS),
        "both": lambda: [train(reader) for _ in range(EPOCHS)],
        "cached": lambda: [train(cached) for _ in range(EPOCHS)],
    }
    rates: dict[str, list[float]] = {name: [] for name in work}

    def measure() -> None:
        for name, run_once in work.items():
            rates[name].append(samples_per_s(run_once, num_samples))

    benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=1)
    reader_s, step_s, both_s, _ = (statistics.median(rates[name]) for name in work)
    serial = 1 / (1 / reader_s + 1 / step_s)
    ratio = statistics.median(
        b * (1 / r + 1 / s) for r, s, b in zip(rates["reader"], rates["step"], rates["both"], strict=True)
    )
    claims.note(f"from ORC files, samples/s: reader alone {reader_s:,.0f}, step alone {step_s:,.0f}")
    claims.add(
        Claim(
            name="from ORC files, batch 1000",
            unit="samples/s",
            recfx=both_s,
            baseline=serial,
            baseline_name="reader, then step",
            ratio=ratio,
            target=0.85,
        )
    )
    if importlib.util.find_spec("jax") is None:
        return
    parameters = {"paths": paths, "batch_size": BATCH_SIZE, "epochs": EPOCHS}
    for variant, target in JAX_TARGETS.items():
        theirs: list[float] = []
        ours: dict[str, list[float]] = {"both": [], "cached": []}
        for _ in range(3):
            loop = call_in_child("bench.baselines_jax:child_train_from_files", variant=variant, **parameters)
            theirs.append(loop["samples_per_s"])
            for name, measured in ours.items():
                work[name]()
                measured.append(statistics.median(samples_per_s(work[name], num_samples) for _ in range(3)))
        for name, what in (("both", ""), ("cached", ", epochs after the first, cached")):
            claims.add(
                Claim(
                    name=f"from ORC files, batch 1000{what}",
                    unit="samples/s",
                    recfx=statistics.median(ours[name]),
                    baseline=statistics.median(theirs),
                    baseline_name=f"{BASELINES[variant]}, own decoding",
                    ratio=statistics.median(a / b for a, b in zip(ours[name], theirs, strict=True)),
                    target=target,
                )
            )


def test_first_step(benchmark, claims: Claims, tmp_path):
    """Seconds to the first trained batch in a new process, with empty and with filled caches."""
    os.environ["TMPDIR"], before = str(tmp_path), os.environ.get("TMPDIR")
    try:
        cold = benchmark.pedantic(call_in_child, args=("bench.test_end_to_end:first_step_s",), rounds=1)
        warm = call_in_child("bench.test_end_to_end:first_step_s")
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
    for name, seconds, limit in (("cold", cold, 30.0), ("warm", warm, 8.0)):
        claims.add(
            Claim(
                name=f"first step, {name}",
                unit="s",
                recfx=seconds,
                baseline=limit,
                baseline_name="limit",
                ratio=limit / seconds,
                target=1.0,
            )
        )


def first_step_s() -> float:
    """In a child process: building, compiling and running the first captured step."""
    from bench.workload import make_batches

    torch.set_num_threads(2)
    batch = make_batches(1, BATCH_SIZE).batches[0]
    begun = time.perf_counter()
    args = program.parse(["--data_paths", "", "--gradient_accumulation_steps", "1"])
    step, state = program.build_step(args)
    run = capture(step, state, batch)
    run(state, batch)
    return time.perf_counter() - begun
