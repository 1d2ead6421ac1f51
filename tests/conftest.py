"""Fixtures shared by all tests: two threads, and the small DeepFM step that the expensive tests compile once."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

# Read when torch is imported. A thread that waits for another one sleeps: by default it spins, and as many threads as
# the tests' processes have together take most of their time so. And no pool of processes is started that would compile
# Triton kernels for a GPU.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from recfx import embeddings, step
from recfx.models import deepfm
from recfx.optim import adamw, sparse_adamw
from recfx.types import Batch
from tests.forks import Forks
from tests.reference import EXTREMES, pack_samples, random_samples

FEATURES, NUM_NUMERIC, DIM, BATCH_SIZE, CAPACITY = ("a", "b", "c"), 2, 4, 8, 24
SMALL_IDS = (*EXTREMES, *range(2, 30))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept-graphs", action="store_true", help="write graphs/ as the graphs are now")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs scripts as programs, each in a fork of one process that has imported torch and its compiler."""
    with contextlib.closing(Forks()) as started:
        yield started


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


def deepfm_groups(**kwargs: object) -> dict[str, list[embeddings.Embedding]]:
    init = embeddings.truncated_normal(0.3)
    return {
        "emb": [embeddings.Embedding(f, dim=DIM, init=init, **kwargs) for f in FEATURES],
        "bias": [embeddings.Embedding(f, dim=1, init=init, **kwargs) for f in FEATURES],
    }


def deepfm_step(**kwargs: object) -> step.Step:
    """A DeepFM step over `FEATURES` and "numeric"; `kwargs` replace arguments of train_step."""
    arguments = {
        "features": dict,
        "embeddings": deepfm_groups(),
        "forward": lambda params, emb, feats: deepfm.forward(params, emb, feats["numeric"]),
        "sparse_optimizer": sparse_adamw(1e-2),
        "dense_optimizer": adamw(1e-2),
        "max_rows": 512,
        "seed": 3,
    }
    return step.train_step(**arguments | kwargs)


def deepfm_params(num_sparse: int = len(FEATURES)) -> dict[str, torch.Tensor]:
    """Dense parameters large enough that every term of the formula matters."""
    config = deepfm.DeepFMConfig(num_numeric=NUM_NUMERIC, num_sparse=num_sparse, dim=DIM, hidden=(8, 4))
    params = deepfm.init(config, torch.Generator().manual_seed(0))
    return params | {name: params[name] * 300 for name in ("numeric_emb", "numeric_bias")}


def deepfm_batches(num: int, *, seed: int = 0, short_last: bool = False, ids: tuple = SMALL_IDS) -> list[Batch]:
    rng = random.Random(seed)
    sizes = [BATCH_SIZE] * num
    if short_last:
        sizes[-1] = BATCH_SIZE // 2 - 1
    return [
        pack_samples(
            random_samples(rng, size, features=FEATURES, num_numeric=NUM_NUMERIC, ids=ids),
            BATCH_SIZE,
            capacity=CAPACITY,
        )
        for size in sizes
    ]
