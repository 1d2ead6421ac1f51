"""Feature ops: hashing strings against PyPI bindings, and many features at once against one and against eager.

One core: string hashing is claimed for one. 200 features are claimed as a multiple of one feature's time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import Claim, Claims, Comparison, Loop, compare, rate
from graphs.many_features import NUM_FEATURES, Features, columns, dicts_of_columns, one_call_per_column
from recfx.capture.passes import StepPasses
from recfx.kernels.lists.order_ids import order_ids
from recfx.kernels.lists.string_hash import farm_hashes, murmur_hashes
from recfx.types import Layout, Ragged, unpack

NUM_STRINGS, BATCH_SIZE = 1_000_000, 1000
TARGET_RATE = 20e6
KINDS = ("x", "bucket", "id", "word")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(shortest: int, longest: int) -> tuple[Ragged, list[bytes]]:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], rng.integers(shortest, longest + 1, NUM_STRINGS).cumsum()]).astype(np.int32)
    values = rng.integers(97, 123, offsets[-1], dtype=np.uint8)
    data = values.tobytes()
    items = [data[a:b] for a, b in itertools.pairwise(offsets)]
    return Ragged(torch.from_numpy(values), torch.from_numpy(offsets)), items


@pytest.mark.parametrize("lengths", [(4, 16), (1, 32), (20, 60)])
@pytest.mark.parametrize("name", ["farm", "murmur"])
def test_string_hash(benchmark, claims: Claims, name, lengths):
    """The binding gets a list of Python bytes, made beforehand; recfx reads Arrow's buffers."""
    farmhash, mmh3 = pytest.importorskip("farmhash"), pytest.importorskip("mmh3")
    column, items = words(*lengths)
    kernel, peer, peer_name = {
        "farm": (farm_hashes, farmhash.Fingerprint64, "cityhash's farmhash"),
        "murmur": (murmur_hashes, mmh3.hash64, "mmh3.hash64 (MurmurHash3)"),
    }[name]
    if name == "farm":
        ours = kernel([column.values], [column.offsets])[0][:1000].tolist()
        assert [id % 2**64 for id in ours] == [peer(item) for item in items[:1000]]
    sides = (
        Loop(lambda _: kernel([column.values], [column.offsets]), [None]),
        Loop(lambda _: [peer(item) for item in items], [None]),
    )
    result = benchmark.pedantic(compare, args=sides, kwargs={"blocks": 5}, rounds=1)
    title = f"{name} hash, one core, strings of {lengths[0]} to {lengths[1]} bytes"
    claims.add(in_strings(result, title, peer_name))
    ours = NUM_STRINGS / statistics.median(result.recfx_s)
    claims.add(
        Claim(
            name=title, unit="strings/s", recfx=ours, baseline=TARGET_RATE, baseline_name="20 M strings/s",
            ratio=ours / TARGET_RATE, target=1.0,
        )
    )  # fmt: skip


def in_strings(result: Comparison, name: str, baseline_name: str) -> Claim:
    return result.claim(name, baseline_name, batch_size=NUM_STRINGS, target=None)


def consumed(features: dict[str, Any]) -> list[torch.Tensor]:
    """The inputs of a step: ids of all lists in the table's order, numbers side by side."""
    ids = [v for v in features.values() if isinstance(v, Ragged)]
    numbers = [v for v in features.values() if not isinstance(v, Ragged)]
    in_order = order_ids([v.values for v in ids], [v.offsets for v in ids]) if ids else ()
    return [*in_order, *([torch.cat(numbers, dim=1)] if numbers else [])]


def measured(features: Features, num: int, *, compiled: bool) -> tuple[float, float, float]:
    """Seconds per batch, seconds of the first call, and the checksum."""
    batch = columns(num, BATCH_SIZE)
    layout: Layout = batch.layout

    def run(sections: list[torch.Tensor]) -> list[torch.Tensor]:
        return consumed(features(unpack(sections, layout), num))

    if compiled:
        torch._dynamo.reset()
        options = {
            "post_grad_custom_pre_pass": StepPasses(),
            "guard_filter_fn": lambda guards: [False for _ in guards],
        }
        run = torch.compile(run, fullgraph=True, dynamic=False, options=options)
    with torch.no_grad():
        begin = time.perf_counter()
        total = sum(float(t.double().sum()) for t in run(batch.sections))
        first_s = time.perf_counter() - begin
        return statistics.median(rate(Loop(run, [batch.sections]), blocks=3)), first_s, total


def alone(kind: str) -> Features:
    """The feature of one kind, among four."""
    return lambda batch, num: {f"{kind}0": one_call_per_column(batch, num)[f"{kind}0"]}


def test_200_features_cost_far_less_than_200_times_one(benchmark, claims: Claims):
    """Numbers, buckets, ids and strings, a quarter each; batch 1000. "One" is the mean of one feature of each kind."""

    def measure() -> dict[str, tuple[float, float, float]]:
        out = {f"one {kind}": measured(alone(kind), 4, compiled=True) for kind in KINDS}
        for num in (4, NUM_FEATURES):
            out[f"{num} compiled"] = measured(dicts_of_columns, num, compiled=True)
            out[f"{num} eager, dicts"] = measured(dicts_of_columns, num, compiled=False)
            out[f"{num} eager, one call per column"] = measured(one_call_per_column, num, compiled=False)
        return out

    results = benchmark.pedantic(measure, rounds=1)
    for num in (4, NUM_FEATURES):
        sums = [total for name, (_, _, total) in results.items() if name.startswith(f"{num} ")]
        assert max(sums) - min(sums) <= 1e-6 * abs(sums[0])
    for name, (seconds, first_s, _) in results.items():
        claims.note(f"features, batch {BATCH_SIZE}: {name}: {seconds * 1e3:.3f} ms, first call {first_s:.1f} s")
    one = statistics.mean(results[f"one {kind}"][0] for kind in KINDS)
    many = results[f"{NUM_FEATURES} compiled"][0]
    eager = results[f"{NUM_FEATURES} eager, one call per column"][0]
    for title, baseline, baseline_name in (
        ("200 features, compiled", NUM_FEATURES * one, "200 times one"),
        ("200 features, compiled", NUM_FEATURES / 4 * results["4 compiled"][0], "50 times four"),
        ("200 features, compiled", eager, "eager, one call per column"),
    ):
        claims.add(
            Claim(
                name=title, unit="batches/s", recfx=1 / many, baseline=1 / baseline, baseline_name=baseline_name,
                ratio=baseline / many, target=None,
            )
        )  # fmt: skip
