"""DeepFM's captured step over tables of 1 M to 500 M rows on a GPU, the same number of distinct ids in every batch.

`python -m bench.gpu_sizes [--small]`; small: sizes for a first look, printed and not saved.

AdamW keeps two moments per weight: with 500 M rows, 91 GB, more than an H100 has. All sizes are run with one optimiser,
the first of OPTIMIZERS with which the largest fits, so that they can be compared; a size that does not fit is skipped.
"""

from __future__ import annotations

import gc

import torch
from torch.utils._pytree import tree_leaves

from bench.gpu_deepfm import CHUNK, fill
from bench.gpu_timing import DEVICE, Results, results, times_ms
from bench.workload import CATEGORICAL, DIM, HIDDEN, NUM_COLUMNS, NUM_NUMERICS, draw_batches, recfx_batch
from recfx.capture import capture
from recfx.embeddings import Embedding, truncated_normal
from recfx.examples.deepfm import raw_features
from recfx.models import deepfm
from recfx.optim import SparseOptimizer, adamw, sparse_adamw, sparse_rowwise_adagrad
from recfx.step import Step, TrainState, train_step
from recfx.types import Batch

SIZES = [1_000_000, 10_000_000, 100_000_000, 500_000_000]
OPTIMIZERS = {
    "AdamW": sparse_adamw(1e-3, weight_decay=0.01),
    "row-wise Adagrad": sparse_rowwise_adagrad(1e-3),
}
WORKSPACE_BYTES = 2**31  # a step's temporaries at batch 65 536, batches, kernels: an allowance
MOST_RATIO = 1.5


def build(table_rows: int, optimizer: SparseOptimizer, *, batch_size: int, device: str) -> tuple[Step, TrainState]:
    """DeepFM with room for more than `table_rows` rows; gradients have room for one batch, or for a chunk of `fill`."""

    def embeddings(dim: int) -> list[Embedding]:
        return [Embedding(name, dim=dim, init=truncated_normal(0.001), device=device) for name in CATEGORICAL]

    step = train_step(
        features=raw_features,
        embeddings={"emb": embeddings(DIM), "bias": embeddings(1)},
        forward=deepfm.forward,
        sparse_optimizer=optimizer,
        dense_optimizer=adamw(1e-3),
        max_rows=table_rows + CHUNK,
        max_unique=max(CHUNK, NUM_COLUMNS * batch_size),
    )
    config = deepfm.DeepFMConfig(num_numeric=NUM_NUMERICS, num_sparse=NUM_COLUMNS, dim=DIM, hidden=HIDDEN)
    params = deepfm.init(config, torch.Generator().manual_seed(0))
    return step, step.init({name: p.to(device) for name, p in params.items()})


def predicted_bytes(table_rows: int, optimizer: SparseOptimizer, *, batch_size: int) -> int:
    """Bytes of the state, built on the CPU, where its memory is only reserved, plus the allowance."""
    _, state = build(table_rows, optimizer, batch_size=batch_size, device="cpu")
    return WORKSPACE_BYTES + sum(t.untyped_storage().nbytes() for t in tree_leaves(state))


def step_ms(table_rows: int, optimizer: SparseOptimizer, *, batch_size: int, device: str) -> list[float]:
    step, state = build(table_rows, optimizer, batch_size=batch_size, device=device)
    fill(step, state, table_rows, optimizer)
    batches = [recfx_batch(d, table_rows) for d in draw_batches(8, batch_size, table_rows=table_rows)]
    run = capture(step, state, batches[0])
    here = [Batch(b.buffer.to(device), b.layout) for b in batches]
    return times_ms(lambda batch: run(state, batch), here)


def sizes(to: Results, table_rows: list[int], *, batch_size: int, device: str, free_bytes: int) -> None:
    """The step's time at each size that fits, and the largest over the smallest of them."""
    needed = {
        name: {rows: predicted_bytes(rows, optimizer, batch_size=batch_size) for rows in table_rows}
        for name, optimizer in OPTIMIZERS.items()
    }
    fitting = [name for name, of_rows in needed.items() if of_rows[table_rows[-1]] <= free_bytes]
    chosen = fitting[0] if fitting else list(OPTIMIZERS)[-1]
    of_largest = ", ".join(f"{of_rows[table_rows[-1]]:,} with {name}" for name, of_rows in needed.items())
    to.note(f"{table_rows[-1]:,} rows: predicted bytes {of_largest}; {free_bytes:,} free. All sizes with {chosen}.")
    medians = {}
    for rows in table_rows:
        name, num_bytes = f"DeepFM, {chosen}, batch {batch_size:,}, {rows:,} rows", needed[chosen][rows]
        if num_bytes > free_bytes:
            to.note(f"{name}: skipped, predicted {num_bytes:,} bytes, {free_bytes:,} free.")
            continue
        to.note(f"{name}: predicted {num_bytes:,} bytes.")
        with to.attempt(name):
            ms = step_ms(rows, OPTIMIZERS[chosen], batch_size=batch_size, device=device)
            target = f"within {MOST_RATIO}x of the smallest"
            medians[rows] = to.add(name, ms, items=batch_size, unit="samples/s", target=target)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if len(medians) > 1:
        ratio = medians[max(medians)] / medians[min(medians)]
        verdict = "met" if max(medians.values()) <= MOST_RATIO * min(medians.values()) else "MISSED"
        to.note(
            f"{max(medians):,} rows take {ratio:.2f}x the time of {min(medians):,}; target {MOST_RATIO}: {verdict}."
        )


def main() -> None:
    to, small = results("sizes")
    free_bytes = torch.cuda.mem_get_info()[0]
    rows, batch_size = ([10_000, 20_000], 256) if small else (SIZES, 65_536)
    sizes(to, rows, batch_size=batch_size, device=DEVICE, free_bytes=free_bytes)
    to.end()


if __name__ == "__main__":
    main()
