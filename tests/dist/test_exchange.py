"""Ranks that share tables train what one process trains on the same batches."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recfx.dist import join
from recfx.dist.exchange import _check_places
from recfx.embeddings import Embedding, plan_tables
from tests.dist.launching import launch
from tests.dist.steps_of_ranks import STREAMS, digest, trained

SCRIPT = Path(__file__).with_name("steps_of_ranks.py")

# Shared, read-only and untrained lookups, growth and a short last batch are in all of them.
CASES: dict[str, dict[str, Any]] = {
    "accumulation": {},
    "uncaptured": {"run": "update_"},
    "two at a time": {"run": "two at a time"},
    "half of the steps overflow": {"shrink": True, "optimizer": "adagrad", "accumulation": 1},
    "clipped": {"clip": True, "accumulation": 1},
    "NaN is left out": {"nan": True, "on_nonfinite": "skip"},
    "NaN is noted": {"nan": True, "num": 5},
    "admission by count": {"admit": 2},
    "two tasks, rows of lists": {"kept": True},
    "deterministic, two tasks": {"kept": True, "deterministic": True},
    "deterministic": {"deterministic": True},
    "deterministic, half overflow": {"deterministic": True, "shrink": True, "clip": True},
}
LONG: dict[str, dict[str, Any]] = {
    "compiled": {"run": "inductor", "num": 100},
    "adagrad": {"run": "inductor", "num": 100, "optimizer": "adagrad", "shrink": True},
    "deterministic": {"run": "inductor", "num": 100, "deterministic": True, "clip": True},
}


def on_ranks(nproc: int, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank holds at the end of each case."""
    path = folder / f"{nproc}.pickle"
    for rank in launch(SCRIPT, [str(path), json.dumps(list(cases.values()))], nproc=nproc, timeout=500):
        assert rank.returncode == 0, rank.stderr
    return dict(zip(cases, pickle.loads(path.read_bytes()), strict=True))


def alone(case: dict[str, Any]) -> dict[str, Any]:
    """What one process holds at the end of a case."""
    options = {name: value for name, value in case.items() if name not in ("shrink", "deterministic")}
    if options.get("run") == "two at a time":
        del options["run"]  # one process takes single steps
    if "deterministic" not in case:
        return trained(None, **options)
    return trained(join(streams=STREAMS, deterministic=True, use=False), **options)


def assert_same(many: list[dict[str, Any]], one: dict[str, Any], tolerance: float = 1e-5) -> None:
    for t, expected in enumerate(one["rows"]):
        keys, rows = [tuple(row[:2]) for row in expected], {tuple(row[:2]): row for row in expected}
        found = [[tuple(row[:2]) for row in rank["rows"][t]] for rank in many]
        assert sorted(key for rank in found for key in rank) == sorted(keys)  # each on one rank
        for rank, mine in zip(many, found, strict=True):
            held = set(mine)
            assert mine == [key for key in keys if key in held]  # in the order of the one process
            for row in rank["rows"][t]:
                assert row[2:5] == rows[tuple(row[:2])][2:5]  # last seen, born, counted
                np.testing.assert_allclose(row[5], rows[tuple(row[:2])][5], rtol=0, atol=tolerance)
        assert sum(rank["tally"][t] for rank in many).tolist() == one["tally"][t].tolist()
    for rank in many:
        for name, p in one["params"].items():
            np.testing.assert_allclose(rank["params"][name], p, rtol=0, atol=tolerance)
        assert (rank["step"], rank["nonfinite"]) == (one["step"], one["nonfinite"])
        np.testing.assert_allclose(rank["losses"], one["losses"], rtol=0, atol=tolerance)
        for name in ("counts", "held_out"):
            moved = np.cumsum(rank[name][0] - one[name][0], axis=1)  # a logit at the edge of a bin may be in the next
            assert not moved[:, -1].any()
            assert np.abs(moved).max() <= 2
            np.testing.assert_allclose(rank[name][1], one[name][1], rtol=1e-6)
    logits = sorted(logit for rank in many for logit in rank["logits"])
    np.testing.assert_allclose(logits, sorted(one["logits"]), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return on_ranks(2, CASES, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", [name for name in CASES if "deterministic" not in CASES[name]])
def test_two_ranks_are_one_process(two: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert_same(two[name], alone(CASES[name]))


@pytest.mark.parametrize("name", [name for name in CASES if "deterministic" in CASES[name]])
def test_deterministic_ranks_end_with_the_same_bytes(two: dict[str, list[dict[str, Any]]], name: str) -> None:
    one = alone(CASES[name])
    assert digest(two[name]) == digest([one])
    for part in ("counts", "held_out"):
        assert all(map(np.array_equal, two[name][0][part], one[part]))


def test_a_bucket_that_is_too_small_repeats_the_step(two: dict[str, list[dict[str, Any]]]) -> None:
    assert all(rank["num_repeated"] == 4 for rank in two["half of the steps overflow"])
    assert all(rank["num_repeated"] > 0 for rank in two["deterministic, half overflow"])


def test_rank_0_s_parameters_are_everybody_s_and_rows_are_dealt(two: dict[str, list[dict[str, Any]]]) -> None:
    for ranks in two.values():
        for name in ranks[0]["params"]:
            assert np.array_equal(ranks[0]["params"][name], ranks[1]["params"][name], equal_nan=True)
        assert all(len(rank["rows"][t]) > 10 for rank in ranks for t in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_a_hundred_compiled_steps(nproc: int, tmp_path: Path) -> None:
    cases = {name: case for name, case in LONG.items() if nproc != 3 or "deterministic" in case}
    found = on_ranks(nproc, cases, tmp_path)
    for name, case in cases.items():
        one = alone(case)
        if "deterministic" in case:
            assert digest(found[name]) == digest([one])
        else:
            assert_same(found[name], one)


@pytest.mark.slow
def test_the_same_bytes_from_run_to_run(tmp_path: Path) -> None:
    cases = {"compiled": {**LONG["compiled"], "num": 30}}
    first, second = (on_ranks(2, cases, tmp_path)["compiled"] for _ in range(2))
    assert digest(first) == digest(second)


def test_buckets_have_places_of_32_bits():
    plan = plan_tables({"emb": [Embedding("c1", dim=8), Embedding("c2", dim=8)]}).tables[0]
    _check_places(plan, 2**30, 1)
    with pytest.raises(ValueError, match="features 'c1' to 'c2': got buckets of 1073741824 ids for each of 2 ranks"):
        _check_places(plan, 2**30, 2)
