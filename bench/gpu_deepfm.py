"""The DeepFM example's captured step on a GPU, beside plain torch and JAX in the same run.

Every peer starts from the same weights and is timed only when its first losses, and the rows after its first step, are
recfx's. `python -m bench.gpu_deepfm [--small]`; small: sizes for a first look, printed and not kept.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines_torch import LR, WEIGHT_DECAY, Baseline, DeepFM, eager_sparse, eager_unique
from bench.gpu_timing import DEVICE, Results, results, times_ms
from bench.harness import Child, call_in_child
from bench.recfx_side import write_weights_
from bench.workload import CATEGORICAL, DIM, DenseBatch, Workload, column_rows, init_weights, make_batches, raw_ids
from recfx.capture import capture, capture_steps
from recfx.examples import deepfm as program
from recfx.optim import SparseOptimizer, sparse_adamw
from recfx.step import Step, TrainState
from recfx.table import Limits, grow_, table
from recfx.types import Batch, Ragged

CHUNK = 2**20
TARGETS = {1000: "H200: 8 M/s", 65_536: "H200: 30 M/s"}
# An H200 has an L2 cache of 50 MB. Batches and rows together are larger.
NUM_BATCHES, TABLE_ROWS = {1000: 160, 65_536: 8}, 2_000_000
STEPS_PER_REPLAY = {1000: (4, 16)}
BLOCKS, BLOCK_STEPS = 5, 50
LOSS_RTOL = 1e-4


class First(NamedTuple):
    """What a side did to the first two batches, from weights that all have in common."""

    losses: list[float]
    rows: Tensor  # f32 [R, DIM], the embeddings that the first batch reads, after its step


def first_steps(step: Callable[[Any], Tensor], embedding: Callable[[], Tensor], batches: list[Any]) -> First:
    """Args:     embedding: the present rows that the first batch reads."""
    losses = [float(step(batches[0]))]
    rows = embedding().clone()
    return First([*losses, float(step(batches[1]))], rows)


def check_losses(what: str, ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference; an error where it is above LOSS_RTOL. A side that learns nothing is far off."""
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    if not all(x <= LOSS_RTOL for x in apart):
        raise ValueError(f"{what}: got losses {theirs}, expected recfx's {ours} within {LOSS_RTOL}.")
    return max(apart)


def fill(step: Step, state: TrainState, table_rows: int, optimizer: SparseOptimizer) -> None:
    """Every id of a workload of so many rows gets its row."""
    (plan,), (rows,) = step.plan.tables, state.tables
    slots = {"optimizer_slots": len(optimizer.slots), "row_slots": len(optimizer.row_slots)}
    inserter = table(
        plan, **slots, seed=42, limits=Limits(max_rows=rows.ids.numel(), max_unique=rows.unique_rows.numel())
    )
    device, first = rows.ids.device, 0
    empty = Ragged(torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.int32, device=device))
    grow_(rows, table_rows)
    for name, count in zip(CATEGORICAL, column_rows(table_rows).tolist(), strict=True):
        for ids in torch.arange(first, first + count, device=device).split(CHUNK):
            offsets = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
            features = dict.fromkeys(CATEGORICAL, empty) | {name: Ragged(raw_ids(ids), offsets)}
            inserter.insert_(rows, inserter.read(features))
            rows.num_unique.zero_()
            rows.step.add_(1)
        first += count
    rows.step.zero_()  # which corrects AdamW's moments for their beginning at 0
    rows.seen[:table_rows] = -1
    assert int(rows.num_rows) == table_rows


def build(work: Workload, device: str) -> tuple[Step, TrainState]:
    """The step of `python -m recfx.examples.deepfm`, and a table of the workload's ids with the peers' weights."""
    rows = ["--max_rows", str(work.table_rows + CHUNK)]
    arguments = ["--data_paths", "", "--gradient_accumulation_steps", "1", "--numeric", "raw", "--device", device]
    args = program.parse([*arguments, *rows])
    optimizer = sparse_adamw(args.sparse_lr, weight_decay=0.01)
    step, state = program.build_step(args, sparse_optimizer=optimizer)
    fill(step, state, work.table_rows, optimizer)
    write_weights_(state, init_weights(work.table_rows))
    return step, state


def moved_bytes(batch: Batch, num_lookups: int, num_distinct: int) -> int:
    """What a step cannot but move: its batch once to where it is read, rows and gradients of 9 floats.

    Per look-up 8 bytes of id, 32 of the index, a row read, a gradient written and read; per distinct row its weights
    and both moments, read and written.
    """
    row = 4 * (DIM + 1)
    return 3 * batch.buffer.numel() + num_lookups * (8 + 32 + 3 * row) + num_distinct * 6 * row


def on(device: str, batch: DenseBatch) -> DenseBatch:
    return DenseBatch(*(t.to(device) for t in batch))


def reduce_overhead(weights: dict[str, Tensor]) -> Baseline:
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
        optimizer.zero_grad()  # to None: a gradient is memory of a graph, which the next replay writes over
        return loss.detach()

    return Baseline(step, model.weights)


PEERS: dict[str, Callable[[dict[str, Tensor]], Baseline]] = {
    "torch eager, sparse gradients, SparseAdam": eager_sparse,
    "the same after torch.unique": eager_unique,
    "torch.compile reduce-overhead, dense AdamW": reduce_overhead,
}


def read_rows(work: Workload, device: str) -> Tensor:
    """The rows that the first batch reads."""
    row = work.dense[0].row.unique().to(device)
    return row[row < work.table_rows]


def time_recfx(to: Results, say: str, work: Workload, device: str, steps_per_replay: tuple[int, ...]) -> First | None:
    """From a batch on the device, from pinned memory, and several steps at once; returns its first steps, if it ran."""
    batch_size, first = len(work.dense[0].num), None
    rate = {"items": batch_size, "unit": "samples/s"}
    with to.attempt(say + "recfx"):
        step, state = build(work, device)
        run, read = capture(step, state, work.batches[0]), read_rows(work, device)
        here = [Batch(b.buffer.to(device), b.layout) for b in work.batches]
        first = first_steps(lambda batch: run(state, batch)[1].loss, lambda: state.tables[0].rows[read, 0, :DIM], here)
        num_bytes = moved_bytes(work.batches[0], int((work.dense[0].row < work.table_rows).sum()), work.num_distinct[0])
        ms = times_ms(lambda batch: run(state, batch), here)
        target = TARGETS.get(batch_size, "")
        to.add(say + "recfx, batch on the device", ms, num_bytes=num_bytes, target=target, **rate)
        pinned = [Batch(b.buffer.pin_memory(), b.layout) for b in work.batches] if device == "cuda" else work.batches
        to.add(say + "recfx, batch in pinned memory", times_ms(lambda batch: run(state, batch), pinned), **rate)
        for num in steps_per_replay:
            several = capture_steps(step, state, work.batches[0], steps_per_replay=num)
            groups = [here[k : k + num] for k in range(0, len(here) - num + 1, num)]
            ms = times_ms(lambda some, several=several: several(state, some), groups)
            name = f"{say}recfx, {num} steps per replay, batches on the device"
            to.add(name, ms, items=num * batch_size, unit="samples/s", target=target)
    return first


def time_peers(to: Results, say: str, work: Workload, device: str, ours: First | None) -> None:
    dense, read = [on(device, batch) for batch in work.dense], read_rows(work, device)
    first = {name: w.to(device) for name, w in init_weights(work.table_rows).items()}
    for name, peer in PEERS.items():
        with to.attempt(say + name):
            step, weights = peer(first)
            theirs = first_steps(step, lambda weights=weights: weights()["embedding"][read], dense)
            if ours is None:
                to.note(f"{say}{name}: not checked, as recfx failed.")
            else:
                apart = check_losses(say + name, ours.losses, theirs.losses)
                to.note(f"{say}{name}: checked before timing, losses {apart:.1e} apart.")
                to.same_rows(say + name, ours.rows, theirs.rows, first["embedding"][read])
            to.add(say + name, times_ms(step, dense), items=len(dense[0].num), unit="samples/s")


def compare(
    to: Results,
    batch_size: int,
    *,
    num_batches: int,
    table_rows: int,
    device: str,
    steps_per_replay: tuple[int, ...] = (),
) -> list[float]:
    """recfx and the plain-torch peers in the same run; returns recfx's first losses, none where it failed."""
    work, say = make_batches(num_batches, batch_size, table_rows=table_rows), f"DeepFM, batch {batch_size:,}: "
    ours = time_recfx(to, say, work, device, steps_per_replay)
    time_peers(to, say, work, device, ours)
    return ours.losses if ours else []


def jax_cannot(backend: str) -> str:
    """Why JAX is not compared on `backend`; empty where it is."""
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    found = call_in_child("bench.baselines_jax:child_backend")
    return "" if found == backend else f"jax finds no {backend} and computes on {found}"


def jax_loop(losses: list[float], **work: int) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    """JAX's side in a process of its own, after its first losses are found to be recfx's `losses`, if there are any."""
    from bench.baselines_jax import child_loop

    step, sync = child_loop("jax", **work)
    if losses:
        check_losses("JAX", losses, [float(step(k)) for k in range(len(losses))])
    return step, sync


def beside_jax(
    to: Results, sizes: dict[int, int], losses: dict[int, list[float]], *, table_rows: int, backend: str = "gpu"
) -> None:
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
        with (
            to.attempt(name),
            Child("bench.gpu_deepfm:jax_loop", losses=losses.get(batch_size, []), **work) as child,
        ):
            to.note(f"{name}: {'losses checked before timing' if losses.get(batch_size) else 'not checked'}.")
            child.run(num_batches)  # compiles
            ms = [child.run(BLOCK_STEPS) / BLOCK_STEPS * 1e3 for _ in range(BLOCKS)]
            to.add(name, ms, items=batch_size, unit="samples/s")


def main() -> None:
    to, small = results("deepfm")
    sizes, table_rows = ({64: 8, 256: 4}, 200_000) if small else (NUM_BATCHES, TABLE_ROWS)
    several, losses = {64: (2, 4)} if small else STEPS_PER_REPLAY, {}
    for size, num in sizes.items():
        steps = several.get(size, ())
        losses[size] = compare(to, size, num_batches=num, table_rows=table_rows, device=DEVICE, steps_per_replay=steps)
    torch.cuda.empty_cache()
    beside_jax(to, sizes, losses, table_rows=table_rows, backend="gpu" if DEVICE == "cuda" else DEVICE)
    to.end()


if __name__ == "__main__":
    main()
