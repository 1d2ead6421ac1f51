"""A click log with sequences of ids and of words, in Parquet, from a planted model whose best possible AUC is known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from recfx.examples.generated import auc, written_once

__all__ = ["LONGEST", "NUM_DENSE", "generate"]

LONGEST, NUM_DENSE = 2000, 8
NUM_CLASSES, NUM_ITEMS, NUM_WORDS, NUM_CITIES = 8, 20_000, 5_000, 50


def generate(folder: str | os.PathLike[str], *, rows: int, seed: int, files: int = 4) -> dict[str, Any]:
    """Writes folder/train/*.parquet, folder/eval/*.parquet and folder/info.json, once; returns what info.json holds.

        logit = bias + a [item's class is the user's taste] + b [item's class is the words' topic]
                + city-category effect + dense1 . slopes

    The taste shows in the clicked items alone, the topic in the words alone; both are lists of 0 to 2000, mostly short.

    Info:     parameters; best_auc, of the true probabilities on the evaluation rows.
    Raises:   ValueError when the folder holds something else. It is never overwritten.
    """
    parameters = {"rows": rows, "seed": seed, "files": files}
    return written_once(folder, parameters, lambda built: _write_all(built, **parameters))


def _write_all(folder: Path, rows: int, seed: int, files: int) -> dict[str, Any]:
    best_auc = 0.0
    for part, count in (("train", files), ("eval", 1)):
        (folder / part).mkdir(parents=True)
        for file in range(count):
            rng = np.random.default_rng([seed, part == "eval", file])
            table, probability = _draw(rng, rows // files, np.random.default_rng(seed))
            pq.write_table(table, folder / part / f"part-{file:05}.parquet", compression="zstd")
            best_auc = auc(probability, table["label"].to_numpy())
    return {"best_auc": best_auc}


def _draw(rng: np.random.Generator, n: int, planted: np.random.Generator) -> tuple[pa.Table, np.ndarray]:
    pair_effect = planted.normal(0, 0.7, (NUM_CITIES, NUM_CLASSES))
    slopes = planted.normal(0, 0.2, NUM_DENSE)
    taste, topic, city = (rng.integers(0, k, n) for k in (NUM_CLASSES, NUM_CLASSES, NUM_CITIES))
    item = rng.integers(0, NUM_ITEMS, n)
    category = item % NUM_CLASSES
    dense = rng.lognormal(1.0, 1.0, (2, n, NUM_DENSE)).astype(np.float32)
    logit = 1.6 * (category == taste) + 1.0 * (category == topic) + pair_effect[city, category]
    probability = 1 / (1 + np.exp(1.5 - logit - (np.log1p(dense[0]) - 1.3) @ slopes))
    click_ends, click = _sequence(rng, taste, NUM_ITEMS)
    word_ends, word = _sequence(rng, topic, NUM_WORDS)
    vocabulary = pa.array([f"word-{i}" for i in range(NUM_WORDS)])
    columns = {
        "label": (rng.random(n) < probability).astype(np.float64),
        "dense1": _dense_lists(rng, dense[0]),
        "dense2": _dense_lists(rng, dense[1]),
        "item": _ids(item),
        "category": category,
        "city": city,
        "clicks": pa.ListArray.from_arrays(click_ends, _ids(click)),
        "words": pa.ListArray.from_arrays(word_ends, vocabulary.take(pa.array(word))),
    }
    return pa.table(columns), probability


def _sequence(rng: np.random.Generator, wanted: np.ndarray, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of 0 to LONGEST ranks; rank % NUM_CLASSES is the wanted class half of the time."""
    lengths = np.minimum(rng.lognormal(2.5, 1.2, len(wanted)).astype(np.int64), LONGEST)
    rank = (num_ids * rng.random(lengths.sum()) ** 3).astype(np.int64)
    of_class = rank // NUM_CLASSES * NUM_CLASSES + np.repeat(wanted, lengths)
    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return ends, np.where(rng.random(len(rank)) < 0.5, of_class, rank)


def _dense_lists(rng: np.random.Generator, x: np.ndarray) -> pa.ListArray:
    """Lists of NUM_DENSE numbers; one in ten is missing."""
    present = rng.random(len(x)) > 0.1
    ends = np.concatenate([[0], (present * NUM_DENSE).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, x[present].ravel())


def _ids(rank: np.ndarray) -> np.ndarray:
    """64-bit ids that look random: an odd multiple, wrapping."""
    return (rank.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.int64)
