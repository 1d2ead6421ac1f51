"""A small program as a user writes it, with a module next to it, and files to train it on."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HELPERS = '''
"""The feature function."""


def features(batch):
    return dict(batch)
'''

PROGRAM = '''
"""Logistic regression on two ids."""

import torch
from helpers import features

from recfx.data import OneOf, fixedlen, reader, varlen
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.program import Program
from recfx.step import train_step

ARGUMENTS = {"lr": 0.05, "batch_size": 8, "dims": (1,), "name": None}
COLUMNS = [fixedlen("label", [0.0], valid=OneOf(0, 1)), varlen("user", torch.int64), varlen("item", torch.int64)]


def build(args):
    step = train_step(
        features=features,
        embeddings={"bias": [Embedding(name, dim=args.dims[0]) for name in ("user", "item")]},
        forward=lambda params, emb, feats: emb["bias"].sum((1, 2))[:, None] + params["bias"],
        sparse_optimizer=sparse_adamw(args.lr),
        dense_optimizer=adamw(args.lr),
    )

    def read(paths, use):
        training = {"shuffle_rows": 100, "drop_remainder": True} if use == "train" else {}
        return reader(paths, COLUMNS, args.batch_size, **training)

    return Program(step=step, init=lambda: step.init({"bias": torch.zeros(1)}), columns=COLUMNS, reader=read)
'''


def write_program(folder: Path, *, name: str = "program.py", helpers: str = HELPERS, program: str = PROGRAM) -> Path:
    """<folder>/program.py and <folder>/helpers.py; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "helpers.py").write_text(helpers)
    (folder / name).write_text(program)
    return folder / name


def write_data(folder: Path, *, rows: int = 100, seed: int = 3) -> Path:
    """A Parquet file of clicks that an even sum of two ids makes."""
    rng = random.Random(seed)
    users, items = ([rng.randrange(20) for _ in range(rows)] for _ in range(2))
    labels = [float((user + item) % 2 == 0) for user, item in zip(users, items, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"clicks-{seed}.parquet"
    pq.write_table(pa.table({"label": labels, "user": users, "item": items}), path)
    return path
