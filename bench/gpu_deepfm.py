"""The DeepFM example's captured step on a GPU, beside plain torch, and over tables of growing size.

`python -m bench.gpu_deepfm RECORDS [--small]`; small: sizes for a first look and for a check of this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines_torch import LR, WEIGHT_DECAY, DeepFM, eager_sparse
from bench.gpu_timing import add, need_device, times_ms
from bench.workload import CATEGORICAL, DenseBatch, Workload, init_weights, make_batches
from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.step import Step, TrainState
from recfx.table import grow_, table
from recfx.types import Batch, Ragged

CHUNK = 2**20
TARGETS = {1000: "H200: 8 M/s", 65_536: "H200: 30 M/s"}


def example(table_rows: int, device: str) -> tuple[Step, TrainState]:
    """The step of `python -m recfx.examples.deepfm`."""
    rows = ["--max_rows", str(table_rows + CHUNK)]
    arguments = ["--data_paths", "", "--gradient_accumulation_steps", "1", "--numeric", "raw", "--device", device]
    return program.build_step(program.parse([*arguments, *rows]))


def fill(step: Step, state: TrainState, work: Workload) -> None:
    """Every id of the workload gets its row."""
    (plan,), (rows,) = step.plan.tables, state.tables
    inserter = table(plan, optimizer_slots=2, seed=42, max_rows=rows.ids.numel())
    device = rows.ids.device
    empty = Ragged(torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int32, device=device))
    grow_(rows, work.table_rows)
    for name in CATEGORICAL:
        for ids in work.universe[name].split(CHUNK):
            offsets = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
            features = dict.fromkeys(CATEGORICAL, empty) | {name: Ragged(ids.to(device), offsets)}
            inserter.insert_(rows, features)
            rows.num_unique.zero_()
            rows.step.add_(1)
    assert int(rows.num_rows) == work.table_rows


def captured(work: Workload, device: str) -> Callable[[Batch], Any]:
    step, state = example(work.table_rows, device)
    fill(step, state, work)
    run = capture(step, state, work.batches[0])
    return lambda batch: run(state, batch)


def on(device: str, batch: DenseBatch) -> DenseBatch:
    return DenseBatch(*(t.to(device) for t in batch))


def reduce_overhead(weights: dict[str, Tensor], device: str) -> Callable[[DenseBatch], Tensor]:
    """torch.compile(mode="reduce-overhead") over dense tables, with torch's fused AdamW over everything."""
    model = DeepFM(weights).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    @torch.compile(mode="reduce-overhead")
    def loss_of(row: Tensor, num: Tensor, label: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(row.t(), num), label)

    def step(batch: DenseBatch) -> Tensor:
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return step


def compare(records: Path, batch_size: int, *, num_batches: int, device: str) -> None:
    """recfx from a batch on the device, from pinned memory, and the plain-torch peers in the same run."""
    work = make_batches(num_batches, batch_size)
    say, rate = f"DeepFM, batch {batch_size:,}: ", {"items": batch_size, "unit": "samples/s"}
    run = captured(work, device)
    here = [Batch(b.buffer.to(device), b.layout) for b in work.batches]
    ms = times_ms(run, here)
    add(records, say + "recfx, batch on the device", ms, **rate, target=TARGETS.get(batch_size, ""))
    pinned = [Batch(b.buffer.pin_memory(), b.layout) for b in work.batches] if device == "cuda" else work.batches
    add(records, say + "recfx, batch in pinned memory", times_ms(run, pinned), **rate)
    weights = {name: w.to(device) for name, w in init_weights(work.table_rows).items()}
    dense = [on(device, batch) for batch in work.dense]
    sparse = eager_sparse(weights)
    add(records, say + "torch eager, sparse gradients, SparseAdam", times_ms(sparse.step, dense), **rate)
    peer = reduce_overhead(weights, device)
    add(records, say + "torch.compile reduce-overhead, dense AdamW", times_ms(peer, dense), **rate)


def sizes(records: Path, table_rows: list[int], *, batch_size: int, device: str) -> None:
    """The same number of distinct ids per batch, whatever the table's size."""
    for rows in table_rows:
        work = make_batches(8, batch_size, table_rows=rows)
        run = captured(work, device)
        here = [Batch(b.buffer.to(device), b.layout) for b in work.batches]
        ms = times_ms(run, here)
        target = "within 1.5x of the smallest"
        add(
            records,
            f"DeepFM, batch {batch_size:,}, {rows:,} rows",
            ms,
            items=batch_size,
            unit="samples/s",
            target=target,
        )
        del run, here, work
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    need_device("bench.gpu_deepfm")
    records, small = Path(sys.argv[1]), "--small" in sys.argv
    for batch_size in (64, 256) if small else TARGETS:
        compare(records, batch_size, num_batches=4 if small else 16, device="cuda")
    sizes(
        records,
        [10_000, 20_000] if small else [2**20, 10 * 2**20, 100 * 2**20],
        batch_size=256 if small else 65_536,
        device="cuda",
    )


if __name__ == "__main__":
    main()
