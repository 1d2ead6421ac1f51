"""`python -m tests.machine.counts` writes bench/results/machine_counts.json and .md: what the kernels of a step do.

Three steps of DeepFM on batches of 1000 samples with 26 lookups each, ids drawn by a power law; the first step creates
rows, the third is of a table that is warm. Executed as sm_90 code on the machine, in one order; nothing is timed.
"""

from __future__ import annotations

import torch
import triton

from bench.triton_sm90 import page, write
from recfx import embeddings, step
from recfx.models import deepfm
from recfx.optim import adamw, sparse_adamw
from recfx.types import NUM_SAMPLES, Batch, Ragged, pack
from tests.machine.machine import Counts, running
from tests.machine.plugin import kernels_on_cpu

SAMPLES, LOOKUPS, NUM_NUMERIC, DIM, STEPS = 1000, 26, 13, 8, 3


def batch_of(generator: torch.Generator) -> Batch:
    offsets = torch.arange(SAMPLES + 1, dtype=torch.int32)
    label = (torch.rand(SAMPLES, 1, generator=generator) < 0.3).float()
    numeric = torch.rand(SAMPLES, NUM_NUMERIC, generator=generator)
    columns = {"label": label, "numeric": numeric, NUM_SAMPLES: torch.tensor(SAMPLES, dtype=torch.int32)}
    for n in range(LOOKUPS):
        ids = torch.rand(SAMPLES, generator=generator, dtype=torch.float64).pow(-1.0).long()  # P(id > x) = 1 / x
        columns[f"C{n}"] = Ragged(ids, offsets)
    return pack(columns)


def counted() -> list[tuple[int, dict[str, Counts]]]:
    """Of the first and of the last step."""
    names, init = [f"C{n}" for n in range(LOOKUPS)], embeddings.truncated_normal(0.3)
    groups = {
        name: [embeddings.Embedding(f, dim=d, init=init) for f in names] for name, d in (("emb", DIM), ("bias", 1))
    }
    training = step.train_step(
        features=dict, embeddings=groups,
        forward=deepfm.forward,
        sparse_optimizer=sparse_adamw(1e-3), dense_optimizer=adamw(1e-3), max_rows=2**16, seed=0,
    )  # fmt: skip
    config = deepfm.DeepFMConfig(num_numeric=NUM_NUMERIC, num_sparse=LOOKUPS, dim=DIM)
    generator, steps = torch.Generator().manual_seed(0), []
    with kernels_on_cpu():
        state = training.init(deepfm.init(config, generator))
        for _ in range(STEPS):
            with running(seed=0) as report:
                state, _ = training.update_(state, batch_of(generator))
            steps.append(report.kernels)
    return [(1, steps[0]), (STEPS, steps[-1])]


def records() -> list[dict[str, float]]:
    """One per kernel and step."""
    items = SAMPLES * LOOKUPS
    return [
        {
            "kernel": kernel, "step": number, "launches": c.launches, "threads": c.threads,
            "instructions_per_thread": round(c.executed / c.threads, 1),
            "instructions_per_lookup": round(c.executed / items, 1), "global_accesses": c.global_accesses,
            "shared_accesses": c.accesses - c.global_accesses,
            "accesses_16_bytes": c.accesses_16_bytes, "atomics": c.atomics, "hottest_address": c.hottest,
            "lost_swaps": c.lost_swaps,
        }
        for number, kernels in counted()
        for kernel, c in sorted(kernels.items())
    ]  # fmt: skip


def markdown(found: list[dict[str, float]]) -> str:
    text = (
        f"triton {triton.__version__}, written by `python -m tests.machine.counts` on a machine without a GPU: DeepFM, "
        f"{SAMPLES} samples of {LOOKUPS} lookups, rows of widths {DIM} + 1 with AdamW, ids by a power law; step 1 "
        f"creates rows, step {STEPS} finds most. One order of accesses: loops that wait or lose a swap count otherwise "
        "in another. An instruction is one of a thread; an access of a vector is one; the hottest address is the most "
        "atomics on one in a launch; a lost swap found what it did not expect."
    )
    return page("# What the kernels of a step do: executed as sm_90 code on a virtual machine, untimed", text, found)


def main() -> None:
    found = records()
    write("machine_counts", found, markdown(found))


if __name__ == "__main__":
    main()
