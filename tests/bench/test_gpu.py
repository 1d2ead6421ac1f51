"""bench/gpu.sh and its parts, without a GPU: they say so and end, and small sizes of them run on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_deepfm, gpu_table, gpu_timing

ROOT = Path(gpu_timing.__file__).parents[1]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records go; calls are made and not timed."""

    def times_ms(function, inputs, *, repeats=3, warm_up=3):
        for x in inputs:
            function(x)
        return [1.0, 2.0, 4.0]

    for part in (gpu_table, gpu_deepfm):
        monkeypatch.setattr(part, "times_ms", times_ms)
    monkeypatch.setattr(gpu_timing, "copy_bytes_per_s", lambda: 1e12)
    return tmp_path / "records"


def read(records: Path) -> list[dict]:
    return [json.loads(text) for text in records.read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("part", ["gpu_timing", "gpu_table", "gpu_deepfm"])
def test_a_part_without_a_device_says_so(part, tmp_path):
    command = [sys.executable, "-m", f"bench.{part}", str(tmp_path / "records")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"bench.{part}: needs a CUDA device")
    assert len(done.stderr.splitlines()) == 1


def test_the_script_is_bash_and_its_parts_together_take_less_than_nine_minutes():
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    parts = [text.split() for text in script.read_text().splitlines() if text.startswith("part ")]
    assert sum(int(seconds) for _, _, seconds, *_ in parts) < 540
    modules = {words[5] for words in parts if words[4] == "-m"} - {"pytest"}
    assert modules == {"bench.gpu_table", "bench.gpu_deepfm", "bench.gpu_timing"}
    paths = [word for words in parts for word in words if word.startswith("tests/")]
    assert len(paths) == 3
    assert all((ROOT / path).exists() for path in paths)


def test_dynamicemb_s_case(records):
    gpu_table.dynamicemb(records, rows=200, lookups=50, pool=20, device="cpu", graph=False)
    training, in_two, in_any_order, evaluation = read(records)
    assert training["name"].startswith("10 tables, 500 lookups, ")
    assert training["median_ms"] == 2.0
    assert evaluation["bytes"] < training["bytes"] < in_two["bytes"]
    assert in_any_order["bytes"] < in_two["bytes"]
    assert training["percent_of_copy"] == pytest.approx(100 * training["bytes"] / 2e-3 / 1e12)


def test_look_ups_at_each_load(records):
    gpu_table.look_ups(records, num_slots=2**14, keys=2**8, device="cpu")
    assert [r["rate"] for r in read(records)] == [2**8 / 2e-3] * 9
    assert all(
        f"load {load}" in r["name"] for load, r in zip([0.5] * 3 + [0.75] * 3 + [0.87] * 3, read(records), strict=True)
    )


def test_the_page_has_a_row_for_each_record(records):
    gpu_timing.add(records, "one", [1.0])
    gpu_timing.add(records, "two", [1.0, 2.0, 3.0], num_bytes=2_000_000, items=10, unit="keys/s", target="5")
    page = gpu_timing.page(read(records), "a device")
    assert "| one | 1.0000 | 0.0000 |  |  |  |  |  |" in page
    assert "| two | 2.0000 | 2.0000 | 2,000,000 | 1 | 0 % | 5e+03 keys/s | 5 |" in page


@pytest.mark.slow
def test_deepfm_beside_its_peers_and_over_table_sizes(records):
    gpu_deepfm.compare(records, 32, num_batches=2, device="cpu")
    gpu_deepfm.sizes(records, [10_000, 20_000], batch_size=32, device="cpu")
    assert len(read(records)) == 6
