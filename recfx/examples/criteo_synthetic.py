"""ORC files shaped like a Criteo click log, with labels from a planted model whose best possible AUC is known."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import orc

from recfx.examples.generated import auc, sigmoid, written_once

__all__ = ["CATEGORICAL", "NUMERIC", "generate"]

VERSION = 1  # of the generator: another one makes other rows
CLICK_RATE = 0.032

# c column: shares of its most frequent ids, then the other ids' power law: how many, and its exponent.
IDS: dict[str, tuple[tuple[float, ...], int, float]] = {
    "c1": ((0.1975, 0.1062, 0.0221, 0.0144, 0.0114, 0.0098), 909_803, 1.0),
    "c2": ((0.0232, 0.0211, 0.0208, 0.0159, 0.0151, 0.0149), 6_594, 1.1),
    "c3": ((0.0153, 0.0112, 0.0083, 0.0078, 0.0070, 0.0067), 9_004, 1.0),
    "c4": ((0.2924, 0.1268, 0.0768, 0.0534, 0.0380, 0.0314), 5_441, 1.4),
    "c5": ((0.2072, 0.0989, 0.0640, 0.0450, 0.0338, 0.0272), 76_807, 1.3),
    "c6": ((0.8677, 0.1322), 1, 1.0),
    "c7": ((0.0314, 0.0162, 0.0134, 0.0099, 0.0098, 0.0088), 4_105, 1.0),
    "c8": ((0.0781, 0.0771, 0.0348, 0.0314, 0.0237, 0.0221), 825, 1.5),
    "c9": ((0.4957, 0.0964, 0.0885, 0.0836, 0.0651, 0.0600), 16, 4.0),
    "c10": ((0.1975, 0.1062, 0.0221, 0.0144, 0.0114, 0.0098), 304_444, 1.0),
    "c11": ((0.1979, 0.1176, 0.0275, 0.0272, 0.0221, 0.0190), 20_157, 1.1),
    "c12": ((0.2024, 0.0131, 0.0078, 0.0077, 0.0070, 0.0068), 16_279, 0.9),
    "c13": ((0.3887, 0.1389, 0.1245, 0.0906, 0.0644, 0.0614), 3, 2.4),
    "c14": ((0.6199, 0.0983, 0.0215, 0.0115, 0.0087, 0.0067), 1_241, 1.2),
    "c15": ((0.0283, 0.0232, 0.0223, 0.0211, 0.0208, 0.0181), 3_679, 1.3),
    "c16": ((0.6299, 0.0847, 0.0519, 0.0336, 0.0270, 0.0225), 40, 4.0),
    "c17": ((0.5834, 0.2510), 1, 1.0),
    "c18": ((0.5023, 0.1675, 0.0826, 0.0486, 0.0338, 0.0247), 1_272, 2.0),
    "c19": ((0.5404, 0.1895, 0.0699, 0.0505, 0.0416, 0.0365), 8, 4.0),
    "c20": ((0.1975, 0.1062, 0.0221, 0.0114, 0.0098, 0.0086), 1_999_994, 1.0),
    "c21": ((0.1975, 0.1062, 0.0221, 0.0189, 0.0144, 0.0114), 68_399, 1.0),
    "c22": ((0.1975, 0.1062, 0.0221, 0.0144, 0.0114, 0.0098), 531_950, 1.0),
    "c23": ((0.3274, 0.0568, 0.0257, 0.0118, 0.0094, 0.0079), 24_017, 1.0),
    "c24": ((0.0151, 0.0134, 0.0120, 0.0115, 0.0099, 0.0088), 6_591, 1.1),
    "c25": ((0.3690, 0.2513, 0.1516, 0.0578, 0.0489, 0.0417), 29, 4.0),
    "c26": ((0.3266, 0.1844, 0.1766, 0.1140, 0.0366, 0.0365), 26, 4.0),
}

# i column: its values at these probabilities, interpolated on a logarithmic scale and rounded.
PROBABILITIES = (0, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
QUANTILES: dict[str, tuple[int, ...]] = {
    "i1": (1, 1, 1, 2, 3, 5, 7, 10, 16, 25, 47, 78, 245, 2_688, 30_030),
    "i2": (1, 3, 20, 50, 91, 146, 219, 319, 463, 693, 1_148, 1_716, 3_569, 7_695, 7_999),
    "i3": (0, 0, 1, 1, 2, 3, 4, 6, 8, 11, 18, 25, 40, 58, 277),
    "i4": (0, 0, 3, 8, 15, 24, 37, 56, 87, 146, 290, 523, 1_665, 7_396, 55_288),
    "i5": (1, 1, 1, 2, 3, 4, 6, 9, 13, 22, 47, 89, 316, 1_032, 5_020),
    "i6": (0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 9, 29, 91, 333),
    "i7": (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 25, 111),
    "i8": (-1, -1, 0, 0, 1, 2, 4, 11, 28, 61, 193, 541, 2_185, 3_555, 9_153),
    "i9": (0, 0, 0, 1, 2, 4, 6, 9, 13, 20, 32, 40, 48, 49, 179),
    "i10": (0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 4, 7),
    "i11": (1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 9, 16, 39, 82, 147),
    "i12": (0, 1, 21, 326, 1_088, 1_473, 3_015, 5_833, 9_491, 16_984, 33_768, 79_170, 369_178, 911_802, 2_011_298),
    "i13": (0, 0, 1, 1, 2, 3, 4, 6, 9, 13, 20, 29, 46, 95, 615),
}

# Columns missing together, and in which share of the rows.
MISSING: tuple[tuple[tuple[str, ...], float], ...] = (
    (("c1", "c10", "c11", "c20", "c21", "c22"), 0.0406),
    (("c14", "c16", "c17", "c23"), 0.4212),
    (("i1",), 0.2014),
    (("i2",), 0.0959),
    (("i3", "i13"), 0.2323),
    (("i4",), 0.2605),
    (("i5", "i11"), 0.4064),
    (("i6", "i10"), 0.0691),
    (("i7",), 0.0184),
    (("i12",), 0.0135),
)

NUMERIC = tuple(QUANTILES)
CATEGORICAL = tuple(IDS)

ID_PAIRS = (("c9", "c13"), ("c6", "c26"), ("c17", "c25"), ("c19", "c4"), ("c16", "c18"), ("c14", "c26"))
ID_NUMBER_PAIRS = (("c13", "i2"), ("c25", "i9"), ("c9", "i13"), ("c26", "i12"))
STD = {"ids": 0.9, "numbers": 0.5, "pairs": 0.5}  # of each part of the logit
NUM_EFFECTS = 512  # only the most frequent ids have an effect: rare ones could not be learnt
NUM_FACTORS = 4


class _Rows(NamedTuple):
    ranks: dict[str, np.ndarray]  # i64 [rows]: 0 is the column's most frequent id, -1 missing
    numbers: dict[str, np.ndarray]  # f64 [rows], NaN missing


class _Planted(NamedTuple):
    bias: float
    scales: dict[str, float]  # of the parts of the logit
    first_order: dict[str, np.ndarray]  # [NUM_EFFECTS + 1]; the last, 0, is that of rarer and missing ids
    factors: dict[str, np.ndarray]  # [NUM_EFFECTS + 1, NUM_FACTORS]
    slopes: np.ndarray  # [13]


def generate(
    folder: str | os.PathLike[str], *, rows_per_file: int, train_files: int, eval_files: int, seed: int
) -> dict[str, Any]:
    """Writes folder/train/*.orc, folder/eval/*.orc and folder/info.json, once; returns what info.json holds.

        logit = bias + sum of effects of ids + sum of slopes * log1p(numbers) + sum over pairs of inner products

    Schema, missing patterns, cardinalities, skew and the numbers' distributions are a Criteo click log's; columns are
    independent of each other. Effects sit on frequent ids, so that a few million rows are enough to learn them.

    Info:     parameters; train_rows, eval_rows; click_rate, of the evaluation files; best_auc and best_log_loss, of
              the true probabilities on them; numeric_lr_auc, of a logistic regression on log1p of the numbers.
    Cost:     rows_per_file rows in memory for each of two threads; about 6 s a million rows on 2 cores.
    Raises:   ValueError when a count is below 1, or the folder holds something else. It is never overwritten.
    """
    parameters = {"rows_per_file": rows_per_file, "train_files": train_files, "eval_files": eval_files, "seed": seed}
    for name, value in parameters.items():
        if name != "seed" and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1.")
    parameters["version"] = VERSION
    return written_once(
        folder, parameters, lambda built: _write_all(built, rows_per_file, train_files, eval_files, seed)
    )


def _write_all(folder: Path, rows_per_file: int, train_files: int, eval_files: int, seed: int) -> dict[str, Any]:
    planted = _plant(seed)

    def write(part: str, file: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, ("train", "eval").index(part), file])
        rows = _draw_rows(rng, rows_per_file)
        probability = sigmoid(_logit(planted, rows))
        label = (rng.random(rows_per_file) < probability).astype(np.float64)
        orc.write_table(_table(rows, label), folder / part / f"part-{file:05}.orc", compression="uncompressed")
        keep = part == "eval" or file == 0
        return (probability, label, _log_numbers(rows)) if keep else (np.empty(0),) * 3

    for part in ("train", "eval"):
        (folder / part).mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        train = list(pool.map(lambda file: write("train", file), range(train_files)))
        evaluation = list(pool.map(lambda file: write("eval", file), range(eval_files)))
    probability, label, numbers = (np.concatenate(part) for part in zip(*evaluation, strict=True))
    weights = _fit_logistic(train[0][2], train[0][1])
    return {
        "train_rows": rows_per_file * train_files,
        "eval_rows": rows_per_file * eval_files,
        "click_rate": float(label.mean()),
        "best_auc": auc(probability, label),
        "best_log_loss": float(-np.mean(np.log(np.where(label == 1, probability, 1 - probability)))),
        "numeric_lr_auc": auc(_with_ones(numbers) @ weights, label),
    }


def _draw_rows(rng: np.random.Generator, num_rows: int) -> _Rows:
    ranks = {name: _draw_ranks(rng, name, num_rows) for name in CATEGORICAL}
    numbers = {name: _draw_numbers(rng, name, num_rows) for name in NUMERIC}
    for names, share in MISSING:
        missing = rng.random(num_rows) < share
        for name in names:
            if name in ranks:
                ranks[name][missing] = -1
            else:
                numbers[name][missing] = np.nan
    return _Rows(ranks, numbers)


def _draw_ranks(rng: np.random.Generator, name: str, num_rows: int) -> np.ndarray:
    head, tail, exponent = IDS[name]
    shares = np.cumsum(head)
    uniform = rng.random(num_rows)
    ranks = np.searchsorted(shares, uniform, side="right")
    in_tail = np.flatnonzero(ranks == len(head))
    u = (uniform[in_tail] - shares[-1]) / (1 - shares[-1])
    low, high, power = len(head) + 1, len(head) + tail + 1, 1 - exponent
    if power == 0:
        drawn = low * np.exp(u * np.log(high / low))
    else:
        drawn = (low**power + u * (high**power - low**power)) ** (1 / power)
    ranks[in_tail] = np.minimum(drawn.astype(np.int64), high - 1) - 1
    return ranks


def _draw_numbers(rng: np.random.Generator, name: str, num_rows: int) -> np.ndarray:
    values = np.array(QUANTILES[name], dtype=np.float64)
    logs = np.interp(rng.random(num_rows), PROBABILITIES, np.log1p(values - values[0]))
    return np.rint(np.expm1(logs) + values[0])


def _ids_of(name: str, ranks: np.ndarray) -> np.ndarray:
    """Random looking ids below 2**40: a bijection of 40 bits, another for each column."""
    mask, column = np.uint64((1 << 40) - 1), np.uint64(1 + CATEGORICAL.index(name))
    ids = (ranks.astype(np.uint64) * np.uint64(0x9E3779B97F) + column * np.uint64(0xC2B2AE3D27)) & mask
    ids ^= ids >> np.uint64(20)
    ids = (ids * np.uint64(0x85EBCA6B35)) & mask
    ids ^= ids >> np.uint64(19)
    ids = (ids * np.uint64(0x27D4EB2F65)) & mask
    return (ids ^ (ids >> np.uint64(21))).astype(np.int64)


def _table(rows: _Rows, label: np.ndarray) -> pa.Table:
    """Lists of length 0 or 1, columns in alphabetical order."""
    columns = {"label": _lists(label, np.ones(len(label), dtype=bool))}
    columns |= {name: _lists(values, ~np.isnan(values)) for name, values in rows.numbers.items()}
    for name, ranks in rows.ranks.items():
        columns[name] = _lists(_ids_of(name, ranks), ranks >= 0)
    return pa.table(dict(sorted(columns.items())))


def _lists(values: np.ndarray, present: np.ndarray) -> pa.ListArray:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum(present, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[present]))


def _plant(seed: int) -> _Planted:
    """The effects, scaled so that the parts of the logit have their deviations and the click rate is CLICK_RATE."""
    rng = np.random.default_rng([seed, 2])
    shrink = 1 / np.sqrt(1 + np.arange(NUM_EFFECTS) / 50)
    first_order = {name: np.append(rng.standard_normal(NUM_EFFECTS) * shrink, 0.0) for name in CATEGORICAL}
    factors = {}
    for name in CATEGORICAL:
        drawn = rng.standard_normal((NUM_EFFECTS, NUM_FACTORS)) * shrink[:, None]
        factors[name] = np.vstack([drawn, np.zeros(NUM_FACTORS)])
    planted = _Planted(0.0, dict.fromkeys(STD, 1.0), first_order, factors, rng.standard_normal(len(NUMERIC)))
    parts = _logit_parts(planted, _draw_rows(rng, 50_000))
    scales = {name: STD[name] / part.std() for name, part in parts.items()}
    logit = sum(scales[name] * part for name, part in parts.items())
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logit + middle).mean() < CLICK_RATE else (low, middle)
    return planted._replace(bias=low, scales=scales)


def _logit(planted: _Planted, rows: _Rows) -> np.ndarray:
    parts = _logit_parts(planted, rows)
    return planted.bias + np.sum([planted.scales[name] * part for name, part in parts.items()], axis=0)


def _logit_parts(planted: _Planted, rows: _Rows) -> dict[str, np.ndarray]:
    known = {n: np.where((r < 0) | (r >= NUM_EFFECTS), NUM_EFFECTS, r) for n, r in rows.ranks.items()}
    spread = _log_spread()
    numbers = {name: logs / spread[name] for name, logs in zip(NUMERIC, _log_numbers(rows).T, strict=True)}
    pairs = [_inner(planted.factors[a][known[a]], planted.factors[b][known[b]]) for a, b in ID_PAIRS]
    pairs += [
        planted.factors[c][known[c], 0] * (numbers[i] - np.log1p(QUANTILES[i][6]) / spread[i])
        for c, i in ID_NUMBER_PAIRS
    ]
    return {
        "ids": sum(planted.first_order[name][known[name]] for name in CATEGORICAL),
        "numbers": sum(slope * numbers[name] for slope, name in zip(planted.slopes, NUMERIC, strict=True)),
        "pairs": sum(pairs),
    }


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("bk,bk->b", a, b)


def _log_numbers(rows: _Rows) -> np.ndarray:
    """log1p of the numbers, clamped at 0, missing as 0: [rows, 13], what a model is given."""
    return np.stack([np.log1p(np.maximum(np.nan_to_num(rows.numbers[name]), 0)) for name in NUMERIC], axis=1)


def _log_spread() -> dict[str, float]:
    """Distance of the 10 % and 90 % quantiles of each number's log1p, at least 1."""
    return {name: max(np.log1p(q[10]) - np.log1p(max(q[2], 0)), 1.0) for name, q in QUANTILES.items()}


def _with_ones(numbers: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(numbers)), numbers])


def _fit_logistic(numbers: np.ndarray, label: np.ndarray, num_steps: int = 12) -> np.ndarray:
    """Newton's method, with a small ridge: [1 + 13]."""
    x = _with_ones(numbers)
    weights, ridge = np.zeros(x.shape[1]), 1e-3 * np.eye(x.shape[1])
    for _ in range(num_steps):
        p = sigmoid(x @ weights)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + ridge
        weights -= np.linalg.solve(curvature, x.T @ (p - label) + ridge @ weights)
    return weights
