"""LR with FTRL and FM beside Vowpal Wabbit and modern-fm, over the same rows: one pass, AUC, log loss and rows/s.

    python -m bench.linear_table FOLDER     # the real sample; needs vowpalwabbit==9.11.9 and modern-fm==1.1.2

All rows are in memory before the time is taken: recfx has packed batches, Vowpal Wabbit its cache file, modern-fm a
sparse matrix. Compiling and reading are outside. Runs of all sides take turns, and each begins with a new model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.harness import use_threads
from recfx import features as ops
from recfx.capture import capture, capture_prediction
from recfx.data import from_arrays
from recfx.embeddings import Embedding, constant
from recfx.embeddings import truncated_normal as normal
from recfx.examples.deepfm import CATEGORICAL, COLUMNS, NUMERIC
from recfx.models import fm, lr
from recfx.optim import adagrad, sparse_adagrad, sparse_ftrl
from recfx.step import train_step

DIM, BITS = 8, 22


class Rows(NamedTuple):
    """Labels [N], numbers log(1 + max(x, 0)) [N, 13], 0 where missing, and ids [N, 26], -1 where missing."""

    label: np.ndarray
    numeric: np.ndarray
    ids: np.ndarray


class Run(NamedTuple):
    seconds: float
    probability: np.ndarray  # of the tested rows


Side = Callable[[], Run]


def rows_of(table: Any) -> Rows:
    label = table["label"].combine_chunks().flatten().to_numpy().astype(np.float32)
    first = {name: _first(table[name].combine_chunks()) for name in (*NUMERIC, *CATEGORICAL)}
    numeric = np.stack([np.log1p(np.nan_to_num(first[name]).clip(min=0)) for name in NUMERIC], 1).astype(np.float32)
    return Rows(label, numeric, np.stack([first[name] for name in CATEGORICAL], 1))


def _first(lists: Any) -> np.ndarray:
    """The first item of each list; -1 or NaN where it is empty."""
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    has = np.diff(offsets) > 0
    missing = -1 if values.dtype.kind == "i" else np.nan
    found = np.full(len(has), missing, values.dtype)
    found[has] = values[offsets[:-1][has]]
    return found


def recfx_side(model: Any, tables: tuple[Any, Any], batch_size: int, rate: float) -> Side:
    """LR with FTRL, or FM with Adagrad."""
    is_lr = model is lr

    def features(batch: dict) -> dict[str, Any]:
        numeric = torch.cat([ops.select_dense(batch[name]) for name in NUMERIC], dim=1)
        ids = {name: ops.select_ragged(batch[name]) for name in CATEGORICAL}
        return {"label": batch["label"], "numeric": ops.log1p(numeric), **ids}

    def embeddings(dim: int, init: Any) -> list[Embedding]:
        return [Embedding(name, dim=dim, combiner="sum", init=init) for name in CATEGORICAL]

    groups = {"bias": embeddings(1, constant(0.0))}
    step = train_step(
        features=features,
        embeddings=groups if is_lr else {**groups, "emb": embeddings(DIM, normal(0.01))},
        forward=model.forward,
        sparse_optimizer=sparse_ftrl(rate, beta=1 / batch_size) if is_lr else sparse_adagrad(rate),
        dense_optimizer=adagrad(rate),
    )
    trained, tested = (list(from_arrays(table, COLUMNS, batch_size)) for table in tables)
    config = lr.LRConfig(num_numeric=13) if is_lr else fm.FMConfig(num_numeric=13, dim=DIM)

    def new() -> Any:
        return step.init(model.init(config, torch.Generator().manual_seed(0)))

    update_, predict = capture(step, new(), trained[0]), capture_prediction(step, new(), tested[0])
    num = len(tables[1])

    def run() -> Run:
        state = new()
        begun = time.perf_counter()
        for batch in trained:
            state, _ = update_(state, batch)
        seconds = time.perf_counter() - begun
        logits = torch.cat([predict(state, batch).clone() for batch in tested])[:num, 0]
        return Run(seconds, torch.sigmoid(logits).double().numpy())

    return run


def vw_side(train: Rows, test: Rows, folder: Path, options: str) -> Side:
    """Vowpal Wabbit over its cache; what it takes to begin without rows is taken off."""
    from vowpalwabbit import Workspace

    for name, rows in (("train", train), ("test", test)):
        with open(folder / f"{name}.vw", "w") as file:
            for label, numeric, ids in zip(*rows, strict=True):
                cells = " ".join(f"{c}={i}" for c, i in zip(CATEGORICAL, ids, strict=True) if i != -1)
                numbers = " ".join(f"{n}:{x:.7g}" for n, x in zip(NUMERIC, numeric, strict=True) if x)
                file.write(f"{1 if label else -1} |c {cells} |n {numbers}\n")
    base = f"--loss_function logistic -b {BITS} --quiet --random_seed 1 {options}"
    cache, model, predictions = folder / "cache", folder / "model", folder / "predictions"
    trained = f"{base} -d {folder / 'train.vw'} --cache_file {cache}"
    Workspace(f"{trained} -k").finish()
    Workspace(f"{trained} -f {model}").finish()
    Workspace(f"-t -i {model} --quiet --link logistic -d {folder / 'test.vw'} -p {predictions}").finish()
    probability = np.loadtxt(predictions, ndmin=1)

    def run() -> Run:
        begun = time.perf_counter()
        Workspace(base).finish()
        middle = time.perf_counter()
        Workspace(trained).finish()
        return Run(time.perf_counter() - middle - (middle - begun), probability)

    return run


def modern_fm_side(train: Rows, test: Rows, rate: float, threads: int) -> Side:
    """modern-fm over a sparse matrix of the training rows' ids, one epoch. It needs to know every id beforehand."""
    from modern_fm import CategoricalEncoder, FMClassifier
    from scipy import sparse

    encoder = CategoricalEncoder()
    first, second = encoder.fit_transform(train.ids), encoder.transform(test.ids)
    trained, tested = (
        sparse.hstack([ids, sparse.csr_matrix(rows.numeric)], format="csr", dtype=np.float32)
        for ids, rows in ((first, train), (second, test))
    )
    how = {"n_factors": DIM, "max_iter": 1, "random_state": 0, "learning_rate": rate}

    def run() -> Run:
        model = FMClassifier(**how, n_jobs=threads)
        begun = time.perf_counter()
        model.fit(trained, train.label.astype(int))
        return Run(time.perf_counter() - begun, model.predict_proba(tested)[:, 1])

    return run


def auc(label: np.ndarray, score: np.ndarray) -> float:
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positives = label.sum()
    return float((rank[label > 0.5].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives)))


def log_loss(label: np.ndarray, probability: np.ndarray) -> float:
    p = probability.clip(1e-7, 1 - 1e-7)
    return float(-(label * np.log(p) + (1 - label) * np.log1p(-p)).mean())


def main() -> None:
    from pyarrow import concat_tables
    from pyarrow.orc import ORCFile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--train_rows", type=int, default=35_000, help="the others are tested: 7 eighths and 1")
    args = parser.parse_args()
    use_threads(args.threads)
    torch.set_num_threads(args.threads)
    table = concat_tables([ORCFile(path).read() for path in sorted(Path(args.folder).glob("*.orc"))])
    tables = table.slice(0, args.train_rows), table.slice(args.train_rows)
    train, test = map(rows_of, tables)
    print(f"{len(train.label):,} rows trained, {len(test.label):,} tested, {test.label.mean():.3f} of them clicks")
    with tempfile.TemporaryDirectory() as one:
        folder = Path(one)
        sides = {
            "LR, FTRL: recfx": recfx_side(lr, tables, args.batch_size, 0.1),
            "LR, FTRL: Vowpal Wabbit": vw_side(train, test, folder, "--ftrl --ftrl_alpha 0.1 --ftrl_beta 1"),
        }
        for rate in (0.02, 0.05):
            sides[f"FM, Adagrad {rate}: recfx"] = recfx_side(fm, tables, args.batch_size, rate)
            sides[f"FM, Adagrad {rate}: modern-fm"] = modern_fm_side(train, test, rate, args.threads)
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                one_run = side()
                if number:  # the first warms up
                    runs[name].append(one_run)
    print(f"{'':28}{'rows/s, median':>16}{'quartiles':>24}{'AUC':>8}{'log loss':>10}")
    for name, found in runs.items():
        low, middle, high = statistics.quantiles([args.train_rows / run.seconds for run in found], n=4)
        p = found[-1].probability
        quality = f"{auc(test.label, p):8.4f}{log_loss(test.label, p):10.4f}"
        print(f"{name:28}{middle:16,.0f}{f'{low:,.0f} to {high:,.0f}':>24}{quality}")
    for ours, theirs in zip(list(runs)[::2], list(runs)[1::2], strict=True):
        ratios = [b.seconds / a.seconds for a, b in zip(runs[ours], runs[theirs], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{ours} / {theirs.split(': ')[1]}: {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
