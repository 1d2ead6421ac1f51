"""What a service does with a checkpoint: click rates of requests of any size, and item vectors for a nearest-neighbour
index.

python examples/serving.py
"""

import tempfile
from pathlib import Path

import torch
from pyarrow import parquet

from recfx import checkpoint, layers, rows
from recfx.capture import capture_prediction
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.types import Ragged, pack

MAX_CANDIDATES, MAX_HISTORY = 64, 20


def build_step():
    """The same in the process that trains and in the one that serves."""
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


def candidates(items, history):
    """One user's request: the history stands beside every candidate."""
    num = len(items)
    offsets = torch.arange(num + 1, dtype=torch.int32)
    return {"item": Ragged(items, offsets), "history": Ragged(history.repeat(num), offsets * len(history))}


def train(folder):
    step, random = build_step(), torch.Generator().manual_seed(1)
    state = step.init(init_params())
    for _ in range(200):
        history = torch.randint(0, 50, (5,), generator=random)
        items = torch.randint(0, 50, (MAX_CANDIDATES,), generator=random)
        label = (items % 2 == history[0] % 2).float()[:, None]  # a user likes even items, or odd ones
        history = history // 2 * 2 + history[0] % 2
        state, _ = step.update_(state, pack({"label": label, **candidates(items, history)}))
    checkpoint.save(folder, step, state, number=int(state.step), loop={})


with tempfile.TemporaryDirectory() as folder:
    train(folder)

    step = build_step()
    state, _ = checkpoint.load(checkpoint.latest(folder), step, step.init(init_params()))
    largest = pack(candidates(torch.zeros(MAX_CANDIDATES).long(), torch.zeros(MAX_HISTORY).long()))
    predict = capture_prediction(step, state, largest, new_layout="raise")  # no request waits for the compiler
    for num in (2, 7, 64):
        request = candidates(items=torch.arange(num), history=torch.tensor([4, 8, 6]))
        logit = predict(state, pack(request, layout=largest.layout))[:num]  # behind them is padding
        best = int(logit.argmax())
        print(f"{num} candidates: item {best} has the highest click rate, {float(logit[best].sigmoid()):.3f}")

    rows.export_parquet(step, state, "items", Path(folder) / "items.parquet")
    vectors = parquet.read_table(Path(folder) / "items.parquet", columns=["id", "weight"])
    print(f"{len(vectors)} vectors of {vectors['weight'].type.list_size} numbers")
