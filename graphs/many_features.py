"""200 features, written in two ways: `features200.ops.txt` shows their ops, bench/test_features.py times them.

Numbers, their buckets, ids and strings, a quarter each; so one feature in four is computed from another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from graphs.dataflow import is_op, is_view
from recfx import features as ops
from recfx.capture import trace
from recfx.types import Batch, Ragged, pack

__all__ = ["NUM_FEATURES", "Features", "columns", "dicts_of_columns", "one_call_per_column", "op_counts", "ops_text"]

NUM_FEATURES, FEW = 200, 4
BOUNDARIES = [1.0, 3, 10, 30, 100, 300]
NUM_BUCKETS = 100_003
VIEWS = "views"

Features = Callable[[dict, int], dict[str, Any]]


def one_call_per_column(batch: dict, num: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i in range(num // 4):
        x = ops.log1p(ops.select_dense(batch[f"x{i}"]))
        out |= {f"x{i}": x, f"bucket{i}": ops.from_dense(ops.bucketize(x, BOUNDARIES))}
        out[f"id{i}"] = ops.mod(batch[f"id{i}"], NUM_BUCKETS)
        out[f"word{i}"] = ops.mod(ops.farm_hash(batch[f"word{i}"]), NUM_BUCKETS)
    return out


def dicts_of_columns(batch: dict, num: int) -> dict[str, Any]:
    x = ops.log1p(ops.select_dense([batch[f"x{i}"] for i in range(num // 4)]))
    return {
        "x": x,
        **ops.split_dense(ops.bucketize(x, BOUNDARIES), [f"bucket{i}" for i in range(num // 4)]),
        **ops.mod({f"id{i}": batch[f"id{i}"] for i in range(num // 4)}, NUM_BUCKETS),
        **ops.mod(ops.farm_hash({f"word{i}": batch[f"word{i}"] for i in range(num // 4)}), NUM_BUCKETS),
    }


def columns(num: int, batch_size: int) -> Batch:
    """The columns of `num` features: lists of at most one number, two ids and 16 bytes per sample."""
    packed: dict[str, Ragged] = {}
    for i in range(num // 4):
        packed[f"x{i}"] = _ragged(torch.float32, batch_size, 1, i)
        packed[f"id{i}"] = _ragged(torch.int64, batch_size, 2, i)
        packed[f"word{i}"] = _ragged(torch.uint8, batch_size, 16, i)
    return pack(packed)


def _ragged(dtype: torch.dtype, batch_size: int, longest: int, seed: int) -> Ragged:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], rng.integers(0, longest + 1, batch_size).cumsum()]).astype(np.int32)
    values = torch.randint(0, 256, (longest * batch_size,), generator=torch.Generator().manual_seed(seed))
    return Ragged(values.to(dtype), torch.from_numpy(offsets))


def op_counts(features: Features, num: int, batch_size: int = 4) -> Counter[str]:
    """The number of each op in the ATen graph of `num` features, with all views under one name."""

    def update_(state: tuple, batch: dict) -> tuple[tuple, dict[str, Any]]:
        return state, features(batch, num)

    nodes = filter(is_op, trace(update_, (), columns(num, batch_size)).graph.nodes)
    return Counter(VIEWS if is_view(n) else str(n.target) for n in nodes)


def ops_text() -> str:
    """The counts of both ways side by side."""
    few, many = (op_counts(dicts_of_columns, num) for num in (FEW, NUM_FEATURES))
    apart = op_counts(one_call_per_column, NUM_FEATURES)
    sides = (few, many, apart)
    lines = [
        f"# {NUM_FEATURES} features: the ATen graph of a feature function alone (graphs/many_features.py), batch of 4.",
        "# Numbers, their buckets, ids and strings, a quarter each, by dicts of columns and by one call per column.",
        "",
        f"{'dicts':>8}{'dicts':>8}{'calls':>8}",
        f"{FEW:>8}{NUM_FEATURES:>8}{NUM_FEATURES:>8}  features",
        _row(sides, VIEWS),
        f"{few.total() - few[VIEWS]:>8}{many.total() - many[VIEWS]:>8}{apart.total() - apart[VIEWS]:>8}  ops",
    ]
    names = sorted({*few, *many, *apart} - {VIEWS})
    for title, is_own in (("custom ops", True), ("ops", False)):
        lines += ["", title, *(_row(sides, name) for name in names if name.startswith("recfx.") == is_own)]
    return "\n".join(lines) + "\n"


def _row(sides: tuple[Counter[str], ...], name: str) -> str:
    return "".join(f"{side[name]:>8}" for side in sides) + f"  {name}"
