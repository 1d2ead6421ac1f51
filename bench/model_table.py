"""Every CTR model on files of clicks, and the same models of other libraries where they are installed.

    python -m bench.model_table FOLDER [--seeds 3] [--most_epochs 24] [--models lr,fm] [--libraries recfx,deepctr_torch]

FOLDER: four ORC files as those of `recfx.examples.deepfm`. Prints a row of a table for each model, trained on the first
three and tested on the last. Every model has 26 sparse features of width 8, 13 numeric ones as log(1 + x), Adam without
weight decay at 0.001, and the sizes of its configuration otherwise. The number of epochs is the one of the least log
loss on the third file after training on the first two; nothing else was chosen. All are given the same batches in the
same order; a seed is of initial values.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.model_table_peers import PEERS, Data, Made, remapped, train_peer
from recfx.capture import capture, capture_prediction
from recfx.data import reader
from recfx.embeddings import Embedding, truncated_normal
from recfx.examples.deepfm import CATEGORICAL, COLUMNS, NUMERIC, log1p_features
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.types import NUM_SAMPLES, Batch

__all__ = ["MODELS", "Outcome", "auc", "log_loss", "standard_error", "train_model", "train_other"]

DIM, RATE = 8, 1e-3
MODELS = {
    "lr": "LRConfig",
    "fm": "FMConfig",
    "fwfm": "FwFMConfig",
    "wide_deep": "WideDeepConfig",
    "deepfm": "DeepFMConfig",
    "dcnv2": "DCNv2Config",
    "dlrm": "DLRMConfig",
    "autoint": "AutoIntConfig",
    "masknet": "MaskNetConfig",
    "finalmlp": "FinalMLPConfig",
    "finalnet": "FinalNetConfig",
}
FIRST_ORDER = ("lr", "fm", "fwfm", "wide_deep", "deepfm")  # they read emb["bias"]; lr reads nothing else


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model gave after some epochs.

    compiling, training: seconds.  cpu: seconds of a processor.  Both are of all epochs so far, without reading.
    """

    auc: float
    log_loss: float
    training: float
    cpu: float
    compiling: float


def auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive's logit is higher; ties count half."""
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positives = int(labels.sum())
    above = ranks[labels == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(labels) - positives)))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats."""
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


def standard_error(value: float, positives: int, negatives: int) -> float:
    """Of an AUC, from the choice of the tested rows. Ref: Hanley & McNeil 1982, Radiology 143(1)."""
    both_positive, both_negative = value / (2 - value), 2 * value**2 / (1 + value)
    spread = (positives - 1) * (both_positive - value**2) + (negatives - 1) * (both_negative - value**2)
    return math.sqrt((value * (1 - value) + spread) / (positives * negatives))


def train_model(name: str, trained: list[Batch], tested: list[Batch], seed: int, epochs: int) -> list[Outcome]:
    """Trains one model of recfx, and tests it after each epoch."""
    module = importlib.import_module(f"recfx.models.{name}")
    sizes = {"num_sparse": len(CATEGORICAL), "num_numeric": len(NUMERIC), "dim": DIM}
    config = getattr(module, MODELS[name])
    known = {field.name for field in dataclasses.fields(config)}
    params = module.init(
        config(**{key: size for key, size in sizes.items() if key in known}), torch.Generator().manual_seed(seed)
    )
    groups = {"emb": DIM} if name not in FIRST_ORDER else {"bias": 1} if name == "lr" else {"emb": DIM, "bias": 1}
    init = truncated_normal(0.001)
    step = train_step(
        features=log1p_features,
        embeddings={
            group: [Embedding(column, dim=dim, init=init) for column in CATEGORICAL] for group, dim in groups.items()
        },
        forward=module.forward,
        sparse_optimizer=sparse_adamw(RATE, weight_decay=0.0),
        dense_optimizer=adamw(RATE, weight_decay=0.0),
        max_rows=2**22,
        seed=seed,
    )
    state = step.init(params)
    begun = time.perf_counter()
    run = capture(step, state, trained[0])
    compiling, training, cpu, found = time.perf_counter() - begun, 0.0, 0.0, []
    predict = capture_prediction(step, state, tested[0], backend="eager")
    for _ in range(epochs):
        begun, busy = time.perf_counter(), time.process_time()
        for batch in trained:
            state, _ = run(state, batch)
        training, cpu = training + time.perf_counter() - begun, cpu + time.process_time() - busy
        logits = np.concatenate([predict(state, b)[: int(b[NUM_SAMPLES]), 0].numpy().astype("f8") for b in tested])
        found.append(outcome(logits, labels_of(tested), training, cpu, compiling))
    return found


def train_other(
    make: Callable[[list[int], int], Made], data: tuple[list[int], Data, Data], seed: int, epochs: int
) -> list[Outcome]:
    """Trains one model of another library, and tests it after each epoch."""
    sizes, trained, tested = data
    labels = torch.cat([labels for *_, labels in tested]).numpy()
    return [
        outcome(logits, labels, *seconds, 0.0)
        for logits, *seconds in train_peer(make, seed, sizes, trained, tested, epochs, RATE)
    ]


def outcome(logits: np.ndarray, labels: np.ndarray, *seconds: float) -> Outcome:
    return Outcome(auc(logits, labels), log_loss(logits, labels), *seconds)


def labels_of(batches: list[Batch]) -> np.ndarray:
    """The labels of all samples, 0 or 1."""
    return np.concatenate([b["label"][: int(b[NUM_SAMPLES]), 0].numpy() for b in batches])


def row_of(name: str, choose: Callable, final: Callable, args: argparse.Namespace) -> str:
    """One line of the table. choose, final: (seed, epochs) -> outcomes by epoch, on the third file and on the last."""
    chosen = args.epochs or 1 + int(np.argmin([one.log_loss for one in choose(0, args.most_epochs)]))
    outcomes = [final(seed, chosen)[-1] for seed in range(args.seeds)]
    each = ", ".join(f"{one.auc:.4f}" for one in outcomes)
    value, loss, training, cpu, compiling = (
        np.mean([getattr(one, f.name) for one in outcomes]) for f in dataclasses.fields(Outcome)
    )
    compiled = f"{compiling:.0f}" if compiling else ""
    return f"| {name} | {chosen} | {each} | {value:.4f} | {loss:.4f} | {training:.2f} | {cpu:.2f} | {compiled} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for option, default in (("most_epochs", 24), ("seeds", 3), ("batch_size", 250)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--epochs", type=int, help="None: those of the least log loss on the third file")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--libraries", default=",".join(["recfx", *PEERS]), help="those whose models are trained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    of_file = [
        list(reader(str(f), COLUMNS, args.batch_size, drop_remainder=False)) for f in sorted(args.folder.glob("*.orc"))
    ]
    first, third, last = of_file[0] + of_file[1], of_file[2], of_file[3]
    labels = labels_of(last)
    positives, rows = int(labels.sum()), len(labels)
    error = standard_error(0.7, positives, rows - positives)
    print(f"{len(first + third)} batches of {args.batch_size}; {rows} rows tested, {positives} clicks;")
    print(f"standard error of an AUC of 0.7 on as many rows: {error:.3f}\n")
    print(
        "| model | epochs | AUC of each seed | AUC | log loss | training, s | CPU, s | compiling, s |\n"
        + "|---" * 8
        + "|"
    )
    for library, name in itertools.product(args.libraries.split(","), args.models.split(",")):
        if library == "recfx":
            choose = functools.partial(train_model, name, first, third)
            final = functools.partial(train_model, name, first + third, last)
        elif name in PEERS[library]:
            choose = functools.partial(train_other, PEERS[library][name], remapped(first, third))
            final = functools.partial(train_other, PEERS[library][name], remapped(first + third, last))
        else:
            continue
        label = name if library == "recfx" else f"{name}, {library}"
        print(row_of(label, choose, final, args), flush=True)


if __name__ == "__main__":
    main()
