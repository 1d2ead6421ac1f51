"""MovieLens 100K: who likes which film, from its file and from arrays in memory.

python examples/movielens.py ml-100k/u.data     (without a file: generated ratings in the same form)
"""

import sys
import tempfile

import numpy as np
import torch

from recfx.data import Csv, Split, fixedlen, from_arrays, reader, varlen
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.train import evaluate

NAMES = ("user", "item", "rating", "time")
COLUMNS = [fixedlen("rating", [0.0]), varlen("user", torch.int64), varlen("item", torch.int64)]
TRAIN, TEST = (Split(part=part, fraction=0.1, key="time") for part in ("train", "validation"))


def fit(batches, held_out):
    """Trains a matrix factorisation with biases; returns the AUC on held-out ratings."""
    step = train_step(
        features=lambda batch: {**batch, "label": (batch["rating"] > 3).float()},
        embeddings={
            "factors": [Embedding("user", dim=16), Embedding("item", dim=16)],
            "biases": [Embedding("user", dim=1), Embedding("item", dim=1)],
        },
        forward=lambda params, emb, feats: emb["factors"].prod(1).sum(1, True) + emb["biases"].sum(1) + params["bias"],
        sparse_optimizer=sparse_adamw(lr=3e-2),
        dense_optimizer=adamw(lr=3e-2),
    )
    state = step.init({"bias": torch.zeros(1)})
    for batch in batches:  # recfx.capture.capture(step, ...) makes it faster
        state, _ = step.update_(state, batch)
    return evaluate(step.evaluate_, state, held_out)["auc"]


def from_file(path, epochs=3):
    how = {"columns": COLUMNS, "batch_size": 500, "format": Csv(delimiter="\t", column_names=NAMES)}
    return fit(reader(path, split=TRAIN, shuffle_rows=100_000, epochs=epochs, **how), reader(path, split=TEST, **how))


def from_memory(path, epochs=3):
    ratings = dict(zip(NAMES, np.loadtxt(path, dtype=np.int64).T, strict=True))  # or pandas.read_csv(...)
    batches = from_arrays(ratings, COLUMNS, 500, split=TRAIN, shuffle=True, epochs=epochs)
    return fit(batches, from_arrays(ratings, COLUMNS, 500, split=TEST))


def write_ratings(path, number=10_000):
    """Generated ratings: each user has a taste, each film a kind; ratings are their product and noise."""
    random = np.random.default_rng(0)
    tastes, kinds = random.normal(size=(300, 3)), random.normal(size=(200, 3))
    users, items = random.integers(0, 300, number), random.integers(0, 200, number)
    scores = (tastes[users] * kinds[items]).sum(1) + random.normal(size=number) / 2
    ratings = np.digitize(scores, [-2, -0.7, 0.3, 1.5]) + 1
    np.savetxt(path, np.stack([users + 1, items + 1, ratings, 874724710 + np.arange(number)], 1), "%d", "\t")


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile("w", suffix=".data") as file:
        path = sys.argv[1] if len(sys.argv) > 1 else file.name
        if path == file.name:
            write_ratings(path)
        print(f"AUC from the file {from_file(path):.3f}, from memory {from_memory(path):.3f}")
