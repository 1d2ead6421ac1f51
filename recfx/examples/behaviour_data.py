"""Generated behaviour: clicks with histories, sequences of items, clicks and purchases, each with a planted rule."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from recfx.examples.generated import auc, sigmoid, written_once

__all__ = ["clicks_and_purchases", "clicks_with_history", "item_sequences"]

NUM_ITEMS, NUM_CLASSES, LONGEST = 1_000, 20, 1_000
NUM_INTERESTS, NOISE = 3, 0.2
NUM_NEXT, FOLLOWS, LENGTH = 500, 0.7, 20
NUM_USERS, NUM_SHOPS, NUM_PRICES = 500, 100, 8

Folder = str | os.PathLike[str]
Drawn = tuple[pa.Table, dict[str, float]]


def clicks_with_history(folder: Folder, *, rows: int, seed: int, files: int = 4) -> dict[str, Any]:
    """Parquet files of clicks on an item, with the items that the user has clicked before.

        logit = -1.5 + 3 [the item's class is one of the user's interests] + effect of the item's class

    A user has three interests out of 20 classes. They show in the history alone: four of five of its items are of one
    of them, so a mean over the history dilutes each of them. Lists have 1 to 1000 items, 30 on average.

    Info:     parameters; best_auc, of the true probabilities on the evaluation rows.
    """
    return _generate(folder, _draw_clicks, rows=rows, seed=seed, files=files)


def item_sequences(folder: Folder, *, rows: int, seed: int, files: int = 4) -> dict[str, Any]:
    """Parquet files of sequences of 20 items in which each item tells the one after the next.

        item[t + 1] = follower of item[t - 1] with probability 0.7, else any of the 500 items

    The last item alone tells nothing about the next one: a model has to attend to the one before it.

    Info:     parameters; best_hit_rate, how often the follower of item[-3] is item[-1] in the evaluation files: no
              model can be right more often about the last item, apart from chance.
    """
    return _generate(folder, _draw_sequences, rows=rows, seed=seed, files=files)


def clicks_and_purchases(folder: Folder, *, rows: int, seed: int, files: int = 4) -> dict[str, Any]:
    """Parquet files of impressions with the labels click and buy, where what was not clicked was not bought.

        logit of click           = -2 + taste of the user . kind of the item + effect of the item
        logit of buy after click = -1 + wealth of the user - price + half the logit of click

    Info:     parameters; best_click_auc, best_buy_auc, of the true probabilities on the evaluation rows; best_buy_auc
              is over all impressions.
    """
    return _generate(folder, _draw_purchases, rows=rows, seed=seed, files=files)


def _generate(folder: Folder, draw: Callable[..., Drawn], *, rows: int, seed: int, files: int) -> dict[str, Any]:
    def write(built: Path) -> dict[str, Any]:
        known: dict[str, float] = {}
        for part, count in (("train", files), ("eval", 1)):
            (built / part).mkdir(parents=True)
            for file in range(count):
                rng = np.random.default_rng([seed, part == "eval", file])
                table, known = draw(rng, rows // files, np.random.default_rng(seed))
                pq.write_table(table, built / part / f"part-{file:05}.parquet", compression="zstd")
        return known

    return written_once(folder, {"rows": rows, "seed": seed, "files": files}, write)


def _draw_clicks(rng: np.random.Generator, n: int, planted: np.random.Generator) -> Drawn:
    effect = planted.normal(0, 0.5, NUM_CLASSES)
    interests = rng.integers(0, NUM_CLASSES, (n, NUM_INTERESTS))
    lengths = np.clip(rng.lognormal(2.9, 1.0, n).astype(np.int64), 1, LONGEST)
    total, user = int(lengths.sum()), np.repeat(np.arange(n), lengths)
    wanted = interests[user, rng.integers(0, NUM_INTERESTS, total)]
    kinds = np.where(rng.random(total) < NOISE, rng.integers(0, NUM_CLASSES, total), wanted)
    history = _of_class(rng, kinds)
    is_wanted = rng.random(n) < 0.5
    kind = np.where(is_wanted, interests[:, 0], rng.integers(0, NUM_CLASSES, n))
    probability = sigmoid(-1.5 + 3.0 * (kind[:, None] == interests).any(1) + effect[kind])
    label = (rng.random(n) < probability).astype(np.float64)
    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    table = {"label": label, "item": _of_class(rng, kind), "history": pa.ListArray.from_arrays(ends, history)}
    return pa.table(table), {"best_auc": auc(probability, label)}


def _of_class(rng: np.random.Generator, kinds: np.ndarray) -> np.ndarray:
    """An item of each class: those with the same remainder."""
    return rng.integers(0, NUM_ITEMS // NUM_CLASSES, len(kinds)) * NUM_CLASSES + kinds


def _draw_sequences(rng: np.random.Generator, n: int, planted: np.random.Generator) -> Drawn:
    follower = planted.permutation(NUM_NEXT)
    items = rng.integers(0, NUM_NEXT, (n, LENGTH))
    for t in range(2, LENGTH):
        items[:, t] = np.where(rng.random(n) < FOLLOWS, follower[items[:, t - 2]], items[:, t])
    ends = np.arange(n + 1, dtype=np.int32) * LENGTH
    best = float((items[:, -1] == follower[items[:, -3]]).mean())
    return pa.table({"items": pa.ListArray.from_arrays(ends, items.ravel())}), {"best_hit_rate": best}


def _draw_purchases(rng: np.random.Generator, n: int, planted: np.random.Generator) -> Drawn:
    taste, kind = planted.normal(0, 0.8, (NUM_USERS, 3)), planted.normal(0, 0.8, (NUM_SHOPS, 3))
    effect, wealth = planted.normal(0, 0.7, NUM_SHOPS), planted.normal(0, 1.0, NUM_USERS)
    user, item = rng.integers(0, NUM_USERS, n), rng.integers(0, NUM_SHOPS, n)
    price = rng.integers(0, NUM_PRICES, n)
    of_click = -2.0 + (taste[user] * kind[item]).sum(1) + effect[item]
    clicked = sigmoid(of_click)
    bought = clicked * sigmoid(-1.0 + wealth[user] - (price - 3.5) / 4 + 0.5 * of_click)
    drawn = rng.random(n)
    click, buy = (drawn < clicked).astype(np.float64), (drawn < bought).astype(np.float64)
    table = {"click": click, "buy": buy, "user": user, "item": item, "price": price}
    return pa.table(table), {"best_click_auc": auc(clicked, click), "best_buy_auc": auc(bought, buy)}
