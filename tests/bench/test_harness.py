"""The record of a benchmark: alternating blocks, ratios above 1 where recfx is ahead, one JSON form."""

from __future__ import annotations

import json

import pytest

from bench import harness
from bench.harness import Claim, Claims, compare

KEYS = ["name", "unit", "recfx", "baseline", "baseline_name", "ratio", "target"]


class Clockwork:
    """A side whose steps take what they are told to; `order` is shared by both."""

    def __init__(self, name: str, step_s: float, order: list[str]) -> None:
        self.name, self.step_s, self.order = name, step_s, order

    def run(self, steps: int) -> float:
        self.order.append(self.name)
        return steps * self.step_s


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE_S", 0)


def test_sides_alternate_and_a_ratio_above_one_is_recfx_ahead():
    order: list[str] = []
    result = compare(Clockwork("a", 1e-3, order), Clockwork("b", 2e-3, order), blocks=4, block_s=0.01)
    assert "".join(order).endswith("aabb" + "bbaa" + "aabb" + "bbaa")  # a step to wake up, then the block
    claim = result.claim("step", "the other", batch_size=10, target=1.8)
    assert claim.ratio == pytest.approx(2)
    assert (claim.recfx, claim.baseline, claim.unit) == (pytest.approx(10_000), pytest.approx(5_000), "samples/s")


def test_claims_are_one_table_and_one_list_in_json(tmp_path):
    claims = Claims()
    for ratio, target in ((2.0, 1.8), (1.7, 1.8), (1.7, None)):
        claims.add(Claim(name="x", unit="s", recfx=1.0, baseline=ratio, baseline_name="y", ratio=ratio, target=target))
    claims.note("lookup 0.8")
    header, *lines, note = claims.table().splitlines()
    assert header.split() == ["claim", "recfx", "baseline", "unit", "ratio", "target"]
    assert [line.split()[-1] for line in lines] == ["met", "MISSED", "1.70"]
    assert note == "lookup 0.8"
    claims.write(tmp_path / "results" / "latest.json")
    written = json.loads((tmp_path / "results" / "latest.json").read_text())
    assert [list(claim) for claim in written] == [KEYS] * 3
    assert [claim["target"] for claim in written] == [1.8, 1.8, None]


def test_the_results_in_the_repository_have_this_form():
    written = json.loads(harness.RESULTS.read_text())
    assert [list(claim) for claim in written] == [KEYS] * len(written)
    assert all(claim["ratio"] > 0 for claim in written)
