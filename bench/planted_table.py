"""Models of sequences and of several tasks on generated data with a planted rule, next to the best value possible.

    python -m bench.planted_table [FOLDER]

Runs the example programs, compiled, with their defaults, and two towers on the pairs of `item_sequences`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import parquet as pq

from recfx import rows
from recfx.capture import capture
from recfx.data import fixedlen, from_arrays
from recfx.embeddings import Embedding, normal
from recfx.examples import din, multitask, seq2seq
from recfx.examples.behaviour_data import NUM_NEXT, item_sequences
from recfx.losses import in_batch_softmax
from recfx.models import two_tower
from recfx.optim import adamw, sparse_adamw
from recfx.step import Task, train_step

PAIRS = (
    ("click/auc", "best_click_auc"),
    ("buy/auc", "best_buy_auc"),
    ("auc", "best_auc"),
    ("hit_rate", "best_hit_rate"),
)


def of_example(module: Any, folder: Path, name: str, *more: str) -> list[tuple[str, str, float, float, float]]:
    """(model, value, reached, best possible, seconds) of a program."""
    args = [f"--generated_dir={folder}/{module.NAME}", f"--output_dir={folder}/{name}", "--log_steps=100000", *more]
    begun = time.perf_counter()
    summary = module.run(module.parse(args))
    seconds = time.perf_counter() - begun
    return [(name, value, summary[value], summary[best], seconds) for value, best in PAIRS if value in summary]


def of_two_towers(folder: Path, *, epochs: int = 3) -> tuple[str, str, float, float, float]:
    """Two towers of an item and the one after the next: how often the right one of all items is first."""
    begun = time.perf_counter()
    info = item_sequences(folder / "pairs", rows=40_000, seed=42)
    train, held_out = (
        np.array(pq.read_table(folder / "pairs" / part)["items"].to_pylist()) for part in ("train", "eval")
    )
    columns = [fixedlen("query", [0.0]), fixedlen("item", [0.0])]
    pairs = {"query": train[:, :-2].ravel().astype("f4"), "item": train[:, 2:].ravel().astype("f4")}
    config = two_tower.TwoTowerConfig(num_query=1, num_item=1, dim=32, hidden=(64,), width=32)
    step = train_step(
        features=lambda batch: {name: batch[name].long() for name in ("query", "item")},
        embeddings={name: [Embedding(name, dim=32, init=normal(0.1))] for name in ("query", "item")},
        forward=two_tower.forward,
        tasks=Task(batch_loss=in_batch_softmax(item="item", temperature=0.1)),
        sparse_optimizer=sparse_adamw(1e-2),
        dense_optimizer=adamw(3e-3),
    )
    batches = from_arrays(pairs, columns, 512, shuffle=True, epochs=epochs)
    state = step.init(two_tower.init(config, torch.Generator().manual_seed(42)))
    run = capture(step, state, batches.first())
    for batch in batches:
        state, _ = run(state, batch)
    ids = torch.arange(NUM_NEXT)
    of_all = {name: rows.read(step, state, f"{name}/{name}", ids).weight[:, None] for name in ("query", "item")}
    towers = two_tower.forward(state.params, of_all, {})
    best = (towers["query"] @ towers["item"].T).argmax(1).numpy()
    reached = float((best[held_out[:, -3]] == held_out[:, -1]).mean())
    return "two towers", "hit_rate", reached, info["best_hit_rate"], time.perf_counter() - begun


def main(folder: Path) -> None:
    """Prints the table."""
    found = [of_two_towers(folder)]
    found += of_example(seq2seq, folder, "SASRec", "--train_epoch=2")
    found += of_example(din, folder, "DIN")
    for model in ("esmm", "mmoe", "ple"):
        found += of_example(multitask, folder, model, f"--model={model}")
    print("\n| model | value | reached | best possible | seconds |\n|---|---|---|---|---|")
    for model, value, reached, best, seconds in found:
        print(f"| {model} | {value} | {reached:.4f} | {best:.4f} | {seconds:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
