"""What a service does with a checkpoint: click rates of requests of any size, and item vectors for a nearest-neighbour
index.

python examples/serving.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from pyarrow import parquet

from recfx import checkpoint, layers, rows
from recfx.capture import capture_prediction
from recfx.data import fixedlen, pack_rows, varlen
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step

MAX_CANDIDATES, MAX_HISTORY = 64, 20
COLUMNS = [
    fixedlen("label", [0.0], missing="empty"),  # a request does not have one
    varlen("item", torch.int64),
    varlen("history", torch.int64, truncate=MAX_HISTORY, side="left"),
]


def build_step():
    """The process that trains and the process that serves build the same step."""
    return train_step(
        features=lambda batch: {name: batch[name] for name in ("label", "item", "history")},
        embeddings={
            "item": [Embedding("item", dim=8, shared_name="items")],
            "user": [Embedding("history", dim=8, shared_name="items", combiner="mean")],
        },
        forward=lambda params, emb, feats: layers.mlp(
            params, "mlp", torch.cat([emb["item"], emb["user"]], 1).flatten(1), num_hidden=1
        ),
        sparse_optimizer=sparse_adamw(lr=1e-2),
        dense_optimizer=adamw(lr=1e-2),
    )


def init_params():
    params, random = {}, torch.Generator().manual_seed(0)
    for i, (num_in, num_out) in enumerate([(16, 16), (16, 1)]):
        params[f"mlp.{i}.weight"], params[f"mlp.{i}.bias"] = layers.init_linear(num_in, num_out, random)
    return params


def train(folder):
    """Trains on generated rows. With rows in files, use a reader in place of `pack_rows`."""
    step, random = build_step(), np.random.default_rng(1)
    state = step.init(init_params())
    for _ in range(200):
        liked = int(random.integers(2))  # a user likes even items, or odd ones
        history = (random.integers(0, 25, 5) * 2 + liked).tolist()
        items = random.integers(0, 50, MAX_CANDIDATES).tolist()
        rows = [{"label": int(i % 2 == liked), "item": i, "history": history} for i in items]
        state, _ = step.update_(state, pack_rows(COLUMNS, rows))
    checkpoint.save(folder, step, state, number=int(state.step), loop={})


with tempfile.TemporaryDirectory() as folder:
    train(folder)

    step = build_step()
    state, _ = checkpoint.load(checkpoint.latest(folder), step, step.init(init_params()))
    largest = pack_rows(COLUMNS, [{"item": 0, "history": [0] * MAX_HISTORY}] * MAX_CANDIDATES)
    predict = capture_prediction(step, state, largest, new_layout="raise")  # no request waits for the compiler
    for num in (2, 7, 64):
        request = [{"item": i, "history": [4, 8, 6]} for i in range(num)]  # parsed JSON, for example
        logit = predict(state, pack_rows(COLUMNS, request, layout=largest.layout))[:num]  # the rest is padding
        best = int(logit.argmax())
        print(f"{num} candidates: item {best} has the highest click rate, {float(logit[best].sigmoid()):.3f}")

    rows.export_parquet(step, state, "items", Path(folder) / "items.parquet")
    vectors = parquet.read_table(Path(folder) / "items.parquet", columns=["id", "weight"])
    print(f"{len(vectors)} vectors of {vectors['weight'].type.list_size} numbers")
