"""Timing on a GPU: device events, medians, bytes against the device's own copy; and the page the numbers go to.

`python -m bench.gpu_timing RECORDS` makes gpu_<device>_<yyyymm>.md and .json of what the parts wrote to RECORDS.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def need_device(part: str) -> None:
    """Ends the program with one line where torch finds no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{part}: needs a CUDA device, torch {torch.__version__} finds none. Nothing was measured.")


def times_ms(
    function: Callable[[Any], Any], inputs: Iterable[Any], *, repeats: int = 3, warm_up: int = 3
) -> list[float]:
    """Device time of each call; inputs are made beforehand and, together, should be larger than the L2 cache."""
    inputs = list(inputs)
    for x in inputs[:warm_up]:
        function(x)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats * len(inputs))]
    torch.cuda.synchronize()
    for n, (begin, end) in enumerate(pairs):
        begin.record()
        function(inputs[n % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


@functools.cache
def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(times_ms(target.copy_, [source] * 10)) / 1e3)


def add(
    records: Path,
    name: str,
    ms: list[float],
    *,
    num_bytes: int | None = None,
    items: int | None = None,
    unit: str = "",
    target: str = "",
) -> None:
    """Appends a record at once, so that a part that is cut short leaves what it measured.

    Args:     num_bytes: moved, by count; items: done per call, for a rate in `unit`.
    """
    median = statistics.median(ms)
    quarters = statistics.quantiles(ms, n=4) if len(ms) > 1 else [median] * 3
    record: dict[str, Any] = {"name": name, "median_ms": median, "iqr_ms": quarters[2] - quarters[0], "target": target}
    if num_bytes is not None:
        rate = num_bytes / (median / 1e3)
        record |= {"bytes": num_bytes, "gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy_bytes_per_s()}
    if items is not None:
        record |= {"rate": items / (median / 1e3), "unit": unit}
    with records.open("a") as file:
        print(json.dumps(record), file=file)
    print(line(record), flush=True)


def line(record: dict[str, Any]) -> str:
    """A row of the page."""
    moved = ("bytes", "{:,}"), ("gb_per_s", "{:.0f}"), ("percent_of_copy", "{:.0f} %")
    cells = [record["name"], f"{record['median_ms']:.4f}", f"{record['iqr_ms']:.4f}"]
    cells += [form.format(record[key]) if key in record else "" for key, form in moved]
    cells += [f"{record['rate']:.3g} {record['unit']}" if "rate" in record else "", record["target"]]
    return f"| {' | '.join(cells)} |"


def page(records: list[dict[str, Any]], device: str) -> str:
    """The page of one run."""
    heads = ["what", "median ms", "IQR ms", "bytes", "GB/s", "of copy", "rate", "target"]
    return "\n".join(
        [
            f"# On one {device}, torch {torch.__version__}, CUDA {torch.version.cuda}",
            "",
            f"`bash bench/gpu.sh`, {datetime.date.today()}. Device events, medians. A copy of 1 GiB moved "
            f"{copy_bytes_per_s() / 1e9:.0f} GB/s.",
            "",
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
            *map(line, records),
            "",
        ]
    )


def main() -> None:
    need_device("bench.gpu_timing")
    records = [json.loads(text) for text in Path(sys.argv[1]).read_text().splitlines()]
    device = torch.cuda.get_device_name()
    short = re.sub(r"[^a-z0-9]+", "", device.lower().removeprefix("nvidia"))
    stem = RESULTS / f"gpu_{short}_{datetime.date.today():%Y%m}"
    stem.with_suffix(".md").write_text(page(records, device))
    stem.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    print(f"wrote {stem}.md and .json")


if __name__ == "__main__":
    main()
