"""One rank of a measurement of many workers, see test_dist.py. Prints a line of JSON on rank 0.

    python -m bench.dist_worker recfx FOLDER BATCH_SIZE [deterministic]     DeepFM, 26 columns of ids, compiled
    python -m bench.dist_worker ddp FOLDER BATCH_SIZE ROWS                  torch's DDP with a replicated table

Both train the same generated rows. DDP has a smaller first layer, 221 inputs for 312, and knows every id beforehand, as
a number below ROWS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from recfx.capture import capture
from recfx.dist import join
from recfx.dist.streams import deal
from recfx.examples import deepfm
from recfx.types import NUM_SAMPLES

STEPS, ROUNDS, WIDTH = 12, 4, 9


def main(kind: str, folder: str, batch_size: str, option: str = "") -> None:
    deterministic = option == "deterministic"
    group = join(streams=2 if deterministic else None, deterministic=deterministic)
    options = {"batch_size": int(batch_size), "gradient_accumulation_steps": 1, "max_rows": 2**22}
    args = argparse.Namespace(**{**deepfm.ARGUMENTS, **options})
    step = deepfm.make_step(args)
    rows: Any = deepfm.read(args, folder, drop_remainder=True)
    if group.world_size > 1 or deterministic:
        rows = deal(rows, group)
    batches = list(itertools.islice(rows.epoch(0), STEPS * group.rounds))
    facts: dict[str, Any] = {}
    if kind == "recfx":
        state = deepfm.first_state(step, args)
        run = capture(step, state, batches[0])

        def train() -> None:
            nonlocal state
            for batch in batches:
                state, _ = run(state, batch)

        train()
        if step.exchange is not None and group.world_size > 1:
            (capacity,), bytes_of_id = step.exchange.capacities, 12 + 4 * (WIDTH + 1) + 4 * WIDTH
            facts["MB sent by a rank"] = capacity * group.world_size * group.rounds * bytes_of_id / 1e6
            facts["least MB"] = distinct_of(step, batches) * bytes_of_id / 1e6 * group.rounds
    else:
        train = ddp(batches, int(option))
        train()
    cpu, wall = [], []
    for _ in range(ROUNDS):
        group.wait()
        before = time.process_time(), time.perf_counter()
        train()
        group.wait()
        cpu.append((time.process_time() - before[0]) / STEPS * 1e3)
        wall.append((time.perf_counter() - before[1]) / STEPS * 1e3)
    of_all = np.sum(group.gather(cpu), axis=0)
    if group.is_first:
        facts |= {"cpu_ms": float(np.median(of_all)), "wall_ms": float(np.median(wall))}
        print(json.dumps(facts))
    if group.world_size > 1:
        group.wait()
        distributed.destroy_process_group()


def distinct_of(step: Any, batches: list) -> float:
    """Distinct ids of a batch of this rank, on average."""
    found = []
    for batch in batches:
        feats, num = step.read(batch), int(batch[NUM_SAMPLES])
        found.append(sum(len(feats[c].values[: feats[c].offsets[num]].unique()) for c in deepfm.CATEGORICAL))
    return float(np.mean(found))


class Replicated(nn.Module):
    """DeepFM's sizes with one table of sparse gradients, as a user of DDP would write it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, WIDTH, mode="sum", sparse=True)
        sizes = [26 * 8 + 13, *deepfm.HIDDEN, 1]
        layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.dnn = nn.Sequential(*layers[:-1])

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids, offsets).view(len(numbers), 26, WIDTH)
        emb, bias = rows[:, :, :8], rows[:, :, 8]
        pairs = (emb.sum(1).square() - emb.square().sum(1)).sum(1, keepdim=True) / 2
        return self.dnn(torch.cat([emb.flatten(1), numbers], 1)) + bias.sum(1, keepdim=True) + pairs


def ddp(batches: list, num_rows: int) -> Callable[[], None]:
    model = nn.parallel.DistributedDataParallel(Replicated(num_rows))
    inner = model.module
    sparse = torch.optim.SparseAdam([inner.table.weight], lr=1e-3)
    dense = torch.optim.AdamW(inner.dnn.parameters(), lr=1e-3)
    inputs = []
    for batch in batches:
        feats = deepfm.log1p_features(batch)
        ids, offsets = by_sample([feats[c] for c in deepfm.CATEGORICAL], len(feats["label"]))
        inputs.append((ids % num_rows, offsets, feats["numeric"], feats["label"]))
    loss_of = nn.BCEWithLogitsLoss()

    def train() -> None:
        for ids, offsets, numbers, label in inputs:
            sparse.zero_grad()
            dense.zero_grad()
            loss_of(model(ids, offsets, numbers), label).backward()
            sparse.step()
            dense.step()

    return train


def by_sample(columns: list, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of several columns, those of a sample one after the other, and where each column of each sample begins."""
    counts = torch.stack([c.offsets[1 : num + 1] - c.offsets[:num] for c in columns], 1).long()  # [samples, columns]
    cells = torch.arange(counts.numel()).view_as(counts)
    cell = torch.cat([cells[:, k].repeat_interleave(counts[:, k]) for k in range(len(columns))])
    ids = torch.cat([c.values[: int(c.offsets[num])] for c in columns])
    return ids[cell.argsort(stable=True)], counts.flatten().cumsum(0) - counts.flatten()


if __name__ == "__main__":
    main(*sys.argv[1:])
