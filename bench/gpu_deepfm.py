"""The DeepFM example's captured step on a GPU, beside plain torch and JAX in the same run.

`python -m bench.gpu_deepfm [--small]`; small: sizes for a first look, printed and not kept.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines_torch import LR, WEIGHT_DECAY, DeepFM, eager_sparse, eager_unique
from bench.gpu_timing import Results, results, times_ms
from bench.harness import Child, call_in_child
from bench.workload import CATEGORICAL, DIM, DenseBatch, Workload, column_rows, init_weights, make_batches, raw_ids
from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.optim import SparseOptimizer, sparse_adamw
from recfx.step import Step, TrainState
from recfx.table import grow_, table
from recfx.types import Batch, Ragged

CHUNK = 2**20
TARGETS = {1000: "H200: 8 M/s", 65_536: "H200: 30 M/s"}
# An H200 has an L2 cache of 50 MB. Batches and rows together are larger.
NUM_BATCHES, TABLE_ROWS = {1000: 160, 65_536: 8}, 2_000_000
BLOCKS, BLOCK_STEPS = 5, 50


def fill(step: Step, state: TrainState, table_rows: int, optimizer: SparseOptimizer) -> None:
    """Every id of a workload of so many rows gets its row."""
    (plan,), (rows,) = step.plan.tables, state.tables
    slots = {"optimizer_slots": len(optimizer.slots), "row_slots": len(optimizer.row_slots)}
    inserter = table(plan, **slots, seed=42, max_rows=rows.ids.numel(), max_unique=rows.unique_rows.numel())
    device, first = rows.ids.device, 0
    empty = Ragged(torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int32, device=device))
    grow_(rows, table_rows)
    for name, count in zip(CATEGORICAL, column_rows(table_rows).tolist(), strict=True):
        for ids in torch.arange(first, first + count, device=device).split(CHUNK):
            offsets = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
            features = dict.fromkeys(CATEGORICAL, empty) | {name: Ragged(raw_ids(ids), offsets)}
            inserter.insert_(rows, features)
            rows.num_unique.zero_()
            rows.step.add_(1)
        first += count
    assert int(rows.num_rows) == table_rows


def captured(work: Workload, device: str) -> Callable[[Batch], Any]:
    """The step of `python -m recfx.examples.deepfm`, over a table that holds the workload's ids."""
    rows = ["--max_rows", str(work.table_rows + CHUNK)]
    arguments = ["--data_paths", "", "--gradient_accumulation_steps", "1", "--numeric", "raw", "--device", device]
    args = program.parse([*arguments, *rows])
    optimizer = sparse_adamw(args.sparse_lr, weight_decay=0.01)
    step, state = program.build_step(args, sparse_optimizer=optimizer)
    fill(step, state, work.table_rows, optimizer)
    run = capture(step, state, work.batches[0])
    return lambda batch: run(state, batch)


def moved_bytes(batch: Batch, num_lookups: int, num_distinct: int) -> int:
    """What a step cannot but move: its batch once to where it is read, rows and gradients of 9 floats.

    Per look-up 8 bytes of id, 32 of the index, a row read, a gradient written and read; per distinct row its weights
    and both moments, read and written.
    """
    row = 4 * (DIM + 1)
    return 3 * batch.buffer.numel() + num_lookups * (8 + 32 + 3 * row) + num_distinct * 6 * row


def on(device: str, batch: DenseBatch) -> DenseBatch:
    return DenseBatch(*(t.to(device) for t in batch))


def reduce_overhead(weights: dict[str, Tensor]) -> Callable[[DenseBatch], Tensor]:
    """torch.compile(mode="reduce-overhead") over dense tables, with torch's fused AdamW over everything."""
    model = DeepFM(weights)
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


PEERS: dict[str, Callable[[dict[str, Tensor]], Callable[[DenseBatch], Tensor]]] = {
    "torch eager, sparse gradients, SparseAdam": lambda weights: eager_sparse(weights).step,
    "the same after torch.unique": lambda weights: eager_unique(weights).step,
    "torch.compile reduce-overhead, dense AdamW": reduce_overhead,
}


def compare(to: Results, batch_size: int, *, num_batches: int, table_rows: int, device: str) -> None:
    """recfx from a batch on the device, from pinned memory, and the plain-torch peers in the same run."""
    work = make_batches(num_batches, batch_size, table_rows=table_rows)
    say, rate = f"DeepFM, batch {batch_size:,}: ", {"items": batch_size, "unit": "samples/s"}
    with to.attempt(say + "recfx"):
        run = captured(work, device)
        here = [Batch(b.buffer.to(device), b.layout) for b in work.batches]
        num_lookups = int((work.dense[0].row < work.table_rows).sum())
        num_bytes = moved_bytes(work.batches[0], num_lookups, work.num_distinct[0])
        target = TARGETS.get(batch_size, "")
        to.add(say + "recfx, batch on the device", times_ms(run, here), num_bytes=num_bytes, target=target, **rate)
        pinned = [Batch(b.buffer.pin_memory(), b.layout) for b in work.batches] if device == "cuda" else work.batches
        to.add(say + "recfx, batch in pinned memory", times_ms(run, pinned), **rate)
    dense = [on(device, batch) for batch in work.dense]
    for name, build in PEERS.items():
        with to.attempt(say + name):
            step = build({name: w.to(device) for name, w in init_weights(work.table_rows).items()})
            to.add(say + name, times_ms(step, dense), **rate)


def jax_cannot(backend: str) -> str:
    """Why JAX is not compared on `backend`; empty where it is."""
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    found = call_in_child("bench.baselines_jax:child_backend")
    return "" if found == backend else f"jax finds no {backend} and computes on {found}"


def beside_jax(to: Results, sizes: dict[int, int], *, table_rows: int, backend: str = "gpu") -> None:
    """JAX jit, dense tables in donated buffers, AdamW on touched rows; sizes: batch size to number of batches.

    In a process of its own, which sees batches on its device. JAX has no device events: wall time of blocks of steps.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or it takes three quarters of the memory
    if reason := jax_cannot(backend):
        to.note(f"JAX: skipped, {reason}.")
        return
    for batch_size, num_batches in sizes.items():
        name = f"DeepFM, batch {batch_size:,}: JAX jit, dense tables (wall time of {BLOCK_STEPS} steps)"
        work = {"num_batches": num_batches, "batch_size": batch_size, "table_rows": table_rows, "seed": 0}
        with to.attempt(name), Child("bench.baselines_jax:child_loop", variant="jax", **work) as child:
            child.run(num_batches)  # compiles
            ms = [child.run(BLOCK_STEPS) / BLOCK_STEPS * 1e3 for _ in range(BLOCKS)]
            to.add(name, ms, items=batch_size, unit="samples/s")


def main() -> None:
    to, small = results("deepfm")
    sizes, table_rows = ({64: 4, 256: 4}, 200_000) if small else (NUM_BATCHES, TABLE_ROWS)
    for batch_size, num_batches in sizes.items():
        compare(to, batch_size, num_batches=num_batches, table_rows=table_rows, device="cuda")
    torch.cuda.empty_cache()
    beside_jax(to, sizes, table_rows=table_rows)
    to.end()


if __name__ == "__main__":
    main()
