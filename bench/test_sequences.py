"""Histories of very unequal length: rows that stay lists beside tiled and padded ones, in whole training steps.

A batch has lists of mean length 30, of which the longest has 1000 items. The same models are fed in three ways: by
`combiner=None` and `recfx.ragged`; by `tile(1000)` of the same lists; by ids that are padded to [B, 1000], tiled too.
All three compute the same, which is checked. Last come lists that all have 30 items, for the same sum. One thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.harness import Claims, Loop, compare
from recfx.capture import capture
from recfx.embeddings import Embedding, normal, tile
from recfx.layers import init_mlp, mlp
from recfx.optim import adamw, sparse_adamw
from recfx.ragged import segment_sum, spread
from recfx.step import train_step
from recfx.types import Batch, Params, Ragged, pack

BATCH_SIZE, MEAN, LONGEST, DIM, NUM_ITEMS, NUM_BATCHES = 512, 30, 1000, 16, 200_000, 8
PADDING = -1


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # The few batches are soon learnt by heart. Denormal gradients would then slow the side that has taken more steps.
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(before)


def skewed_lengths(rng: np.random.Generator) -> np.ndarray:
    """Lengths of sum BATCH_SIZE * MEAN, one of them LONGEST, the others log-normal; most are short."""
    rest = rng.lognormal(0, 1.2, BATCH_SIZE - 1)
    rest = np.minimum(rest * ((BATCH_SIZE * MEAN - LONGEST) / rest.sum()), LONGEST).astype(int)
    lengths = np.concatenate([[LONGEST], rest])
    lengths[np.argsort(lengths)[: BATCH_SIZE * MEAN - lengths.sum()]] += 1
    assert lengths.sum() == BATCH_SIZE * MEAN
    return rng.permutation(lengths)


def equal_lengths(rng: np.random.Generator) -> np.ndarray:
    """Lengths of the same sum, all equal."""
    return np.full(BATCH_SIZE, MEAN)


def batches(lengths_of: Callable[[np.random.Generator], np.ndarray], *, pads: bool) -> list[Batch]:
    """Batches of lists; or, for the same lists, of ids padded to LONGEST."""
    rng, out = np.random.default_rng(0), []
    for _ in range(NUM_BATCHES):
        lengths = lengths_of(rng)
        offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        ids = torch.from_numpy((NUM_ITEMS * rng.random(int(offsets[-1])) ** 3).astype(np.int64))
        history: Any = Ragged(ids, offsets)
        if pads:
            history = torch.full((BATCH_SIZE, LONGEST), PADDING)
            history[torch.arange(LONGEST) < offsets.diff()[:, None]] = ids
        item = torch.from_numpy((NUM_ITEMS * rng.random((BATCH_SIZE, 1)) ** 3).astype(np.int64))
        label = torch.from_numpy(rng.integers(0, 2, (BATCH_SIZE, 1)).astype(np.float32))
        out.append(pack({"label": label, "item": item, "history": history}))
    return out


def pairs(history: Tensor, target: Tensor) -> Tensor:
    return torch.cat([history, target, history - target, history * target], dim=-1)


def of_lists(params: Params, rows: Ragged, target: Tensor) -> Tensor:
    """The user, f32 [B, D]: the mean of the history's rows, or their sum by the scores that the target gives them."""
    values, offsets = rows.values, rows.offsets
    if "attention.0.weight" not in params:
        return segment_sum(values, offsets) / offsets.diff().clamp(min=1)[:, None]
    score = mlp(params, "attention", pairs(values, spread(target, offsets, len(values))), num_hidden=1)
    return segment_sum(values * score, offsets)


def of_cells(params: Params, rows: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same of rows side by side, [B, LONGEST, D], with zeros after a list."""
    if "attention.0.weight" not in params:
        return rows.sum(1) / mask.sum(1).clamp(min=1)[:, None]
    score = mlp(params, "attention", pairs(rows, target[:, None].expand_as(rows)), num_hidden=1)
    return (rows * torch.where(mask[:, :, None], score, 0.0)).sum(1)


def forward(params: Params, emb: dict[str, Any], feats: dict[str, Any]) -> Tensor:
    history, target = emb["history"], emb["item"][:, 0]
    if isinstance(history, Ragged):
        user = of_lists(params, history, target)
    else:
        ids = feats["history"]
        is_dense = isinstance(ids, Tensor)
        mask = ids != PADDING if is_dense else torch.arange(LONGEST) < ids.offsets.diff()[:, None]
        user = of_cells(params, history, target, mask)
    return mlp(params, "top", torch.cat([target, user, target * user], dim=1), num_hidden=1)


def init(model: str) -> Params:
    random = torch.Generator().manual_seed(0)
    params, _ = init_mlp("top", [3 * DIM, 32, 1], random)
    return params | (init_mlp("attention", [4 * DIM, 16, 1], random)[0] if model == "attention" else {})


def captured(model: str, way: str, lengths_of: Callable[..., np.ndarray]) -> tuple[Loop, float]:
    """The captured training step over the batches, and its loss after the first of each of them."""
    how = {"lists": {"combiner": None}, "tiled": {"combiner": tile(LONGEST)}}
    how["padded"] = how["tiled"] | {"padding_id": PADDING}
    of_items: dict[str, Any] = {"dim": DIM, "shared_name": "items", "init": normal(0.05)}
    step = train_step(
        features=dict,
        embeddings={"item": [Embedding("item", **of_items)], "history": [Embedding("history", **of_items, **how[way])]},
        forward=forward,
        sparse_optimizer=sparse_adamw(1e-3),
        dense_optimizer=adamw(1e-3),
    )
    data = batches(lengths_of, pads=way == "padded")
    state = step.init(init(model))
    run = capture(step, state, data[0])
    losses = [float(run(state, batch)[1].loss) for batch in data]
    return Loop(lambda batch: run(state, batch), data), sum(losses) / NUM_BATCHES


@pytest.mark.parametrize("model", ["mean", "attention"])
def test_lists_cost_what_they_hold(benchmark, claims: Claims, model: str) -> None:
    title = f"{model}, mean length {MEAN}, longest {LONGEST}"
    lists, loss = captured(model, "lists", skewed_lengths)
    for way, words in (("tiled", f"tile({LONGEST})"), ("padded", f"ids padded to [B, {LONGEST}]")):
        other, expected = captured(model, way, skewed_lengths)
        assert loss == pytest.approx(expected, abs=1e-4)
        result = compare(lists, other, blocks=11)
        claims.add(result.claim(title, words, batch_size=BATCH_SIZE, target=None))
    equal, _ = captured(model, "lists", equal_lengths)
    result = benchmark.pedantic(compare, args=(lists, equal), kwargs={"blocks": 11}, rounds=1)
    claims.add(result.claim(title, f"lists of {MEAN} each, same sum", batch_size=BATCH_SIZE, target=None))
