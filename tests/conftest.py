"""Fixtures shared by all tests: two threads, and the small DeepFM step that the expensive tests compile once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

# Read when torch is imported. A thread that waits for another one sleeps: by default it spins, and as many threads as
# the tests' processes have together take most of their time so. And no pool of processes is started that would compile
# Triton kernels for a GPU. What the processor has is read from its flags; by default the compiler is tried ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch

from recfx import embeddings, step
from recfx.kernels.build import library
from recfx.models import deepfm
from recfx.optim import adamw, sparse_adamw
from recfx.types import Batch
from tests.forks import Forks
from tests.machine.library import library as machine_library
from tests.reference import EXTREMES, pack_samples, random_samples

LONGEST = (  # files whose tests take above ten seconds of a core
    "tests/kernels/gpu/test_list_kernels.py",
    "tests/capture/test_capture.py",
    "tests/examples/test_deepfm.py",
    "tests/test_readme.py",
    "tests/kernels/gpu/test_counts.py",
    "tests/capture/test_precision.py",
    "tests/bench/test_baselines.py",
    "tests/examples/test_deepctr.py",
    "tests/kernels/gpu/test_table_kernels.py",
    "tests/features/test_capture.py",
    "tests/capture/test_capture_steps.py",
    "tests/kernels/gpu/test_without_gpu.py",
    "tests/capture/test_cuda_code.py",
    "tests/data/test_odd_inputs.py",
    "tests/checkpoint/test_checkpoint_reproducible.py",
    "tests/recis/test_recis.py",
    "tests/machine/test_machine.py",
    "tests/capture/test_graphs.py",
)
FEATURES, NUM_NUMERIC, DIM, BATCH_SIZE, CAPACITY = ("a", "b", "c"), 2, 4, 8, 24
SMALL_IDS = (*EXTREMES, *range(2, 30))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept-graphs", action="store_true", help="write graphs/ as the graphs are now")


def pytest_sessionstart(session: pytest.Session) -> None:
    """What several processes of a run need is compiled once, on all cores, before they start."""
    option = session.config.option
    if not getattr(option, "numprocesses", None) or option.collectonly or not shutil.which("g++"):
        return
    with ThreadPoolExecutor(2) as pool:
        for built in [pool.submit(library), pool.submit(machine_library)]:
            built.result()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process is left with one at the end; others in their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONGEST)))


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
        "forward": deepfm.forward,
        "sparse_optimizer": sparse_adamw(1e-2),
        "dense_optimizer": adamw(1e-2),
        "max_rows": 512,
        "seed": 3,
    }
    return step.train_step(**arguments | kwargs)


def linear_step(**kwargs: object) -> step.Step:
    """Weights of one feature's ids, summed, and a bias: for what is the same of any step. It compiles in half the time
    of a DeepFM step."""
    arguments = {
        "embeddings": {"bias": [embeddings.Embedding("a", dim=1, init=embeddings.truncated_normal(0.3))]},
        "forward": lambda params, emb, feats: emb["bias"].sum(1) + params["bias"],
    }
    return deepfm_step(**arguments | kwargs)


def linear_params() -> dict[str, torch.Tensor]:
    return {"bias": torch.tensor([0.1])}


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
