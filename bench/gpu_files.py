"""From ORC files on a GPU's host: the reader only, the step only with batches on the device, and both together.

`python -m bench.gpu_files [--small]`; small: sizes for a first look, printed and not saved.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.gpu_timing import DEVICE, Results, results
from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.examples.criteo_synthetic import generate
from recfx.types import Batch

EPOCHS = 5
SLACK = 0.8  # of the slower part's rate: below that both parts limit each other


def limit(reader: float, step: float, both: float) -> str:
    """Which part limits the rate of both, from samples/s."""
    slower = "the reader" if reader <= step else "the step"
    if both >= SLACK * min(reader, step):
        return f"{slower} limits"
    return f"neither alone limits: they share the host, {slower} is the slower"


def seconds(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def from_files(to: Results, folder: Path, batch_size: int, *, threads: int, max_rows: int, device: str) -> None:
    """Wall time of epochs over the ORC files of a folder. The table knows every id: a first epoch is not timed."""
    knobs = {"--batch_size": batch_size, "--thread_num": threads, "--max_rows": max_rows, "--device": device}
    words = [word for knob, value in knobs.items() for word in (knob, str(value))]
    args = program.parse(["--data_paths", str(folder), "--gradient_accumulation_steps", "1", *words])
    reader = program.read(args, args.data_paths, drop_remainder=True)
    step, state = program.build_step(args)
    here = [Batch(b.buffer.to(device), b.layout) for b in reader]
    run = capture(step, state, here[0])
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def train(batches: Iterable[Batch]) -> None:
        for batch in batches:
            run(state, batch)

    train(reader)
    parts = {
        "reader alone": lambda: deque(reader, maxlen=0),
        "step alone, batches on the device": lambda: train(here),
        "both": lambda: train(reader),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(EPOCHS):
        for name, work in parts.items():
            times[name].append(seconds(work, wait) * 1e3 / len(here))
    say = f"from ORC files, batch {batch_size:,}, {threads} reader threads: "
    for name, ms in times.items():
        to.add(f"{say}{name} (wall time of an epoch, a batch)", ms, items=batch_size, unit="samples/s")
    rates = [batch_size * 1e3 / statistics.median(ms) for ms in times.values()]
    to.note(f"{say}reader {rates[0]:,.0f}, step {rates[1]:,.0f}, both {rates[2]:,.0f} samples/s: {limit(*rates)}.")


def main() -> None:
    to, small = results("files")
    threads = min(8, os.cpu_count() or 1)
    rows_per_file, batch_sizes = (1000, [100, 500]) if small else (50_000, [1000, 16_384])
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        generate(data, rows_per_file=rows_per_file, train_files=threads, eval_files=1, seed=0)
        for batch_size in batch_sizes:
            with to.attempt(f"from ORC files, batch {batch_size:,}"):
                from_files(to, data / "train", batch_size, threads=threads, max_rows=2**24, device=DEVICE)
    to.end()


if __name__ == "__main__":
    main()
