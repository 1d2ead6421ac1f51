"""Timing on a GPU: device events, medians, bytes against the device's own copy; and the pages the numbers go to.

`python -m bench.gpu_timing OUTCOMES` makes parts_<device>_<yyyymm>.md and .json of how bench/gpu.sh's parts ended.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
HEADS = ["what", "median ms", "IQR ms", "bytes", "GB/s", "of copy", "rate", "target"]
MOST_APART = 0.01
OUTCOMES = ["part", "limit_s", "seconds", "exit_code", "last_line"]


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
    ms = statistics.median(times_ms(target.copy_, [source] * 10))
    del source, target
    torch.cuda.empty_cache()
    return 2 * 2**30 / (ms / 1e3)


class Results:
    """What a part measured. The page and its JSON are written anew with every record, so a part cut short leaves them.

    Args:     theme: files are <theme>_<device>_<yyyymm>.md and .json; folder: where, None to print alone.
    """

    def __init__(self, theme: str, folder: Path | None, *, command: str = "bash bench/gpu.sh") -> None:
        self.theme, self.folder, self.command = theme, folder, command
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failures: list[str] = []

    def add(
        self,
        name: str,
        ms: list[float],
        *,
        num_bytes: int | None = None,
        items: int | None = None,
        unit: str = "",
        target: str = "",
    ) -> float:
        """Adds a record and returns its median.

        Args:     num_bytes: moved, by count; items: done per call, for a rate in `unit`.
        """
        median = statistics.median(ms)
        quarters = statistics.quantiles(ms, n=4) if len(ms) > 1 else [median] * 3
        record = {"name": name, "median_ms": median, "iqr_ms": quarters[2] - quarters[0], "target": target}
        if num_bytes is not None:
            rate = num_bytes / (median / 1e3)
            record |= {"bytes": num_bytes, "gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy_bytes_per_s()}
        if items is not None:
            record |= {"rate": items / (median / 1e3), "unit": unit}
        self.records.append(record)
        print(line(record), flush=True)
        self.write()
        return median

    def note(self, text: str) -> None:
        """A sentence under the table: why something was left out, what follows from the numbers."""
        self.notes.append(text)
        print(text, flush=True)
        self.write()

    def same_rows(self, what: str, ours: Tensor, theirs: Tensor, before: Tensor) -> None:
        """Raises where the rows of two sides differ, after the same step, by more than MOST_APART of the way they went.

        Of the way: AdamW moves weights by the learning rate, whatever the gradient, and turns rounding of a gradient
        that is nearly 0 into as much.
        """
        apart = float((ours - theirs).abs().mean() / (theirs - before).abs().mean())
        if not apart <= MOST_APART:
            raise ValueError(f"{what}: got rows {apart:.3g} of their step apart, expected {MOST_APART} at most.")
        self.note(f"{what}: checked before timing, rows {apart:.1e} of their step apart.")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error inside is noted, and what comes after is measured all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(what)
            self.note(f"{what}: failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def end(self) -> None:
        """Ends the program with an error if an attempt failed."""
        if self.failures:
            raise SystemExit(f"{self.theme}: failed: {', '.join(self.failures)}")

    def write(self) -> None:
        if self.folder is not None:
            held = {"records": self.records, "notes": self.notes}
            write(self.folder, self.theme, page(self.records, self.notes, self.command), held)


def results(theme: str) -> tuple[Results, bool]:
    """Where `python -m bench.gpu_<theme> [--small]` puts its numbers, and whether it is small: then nowhere."""
    part = f"bench.gpu_{theme}"
    need_device(part)
    small = "--small" in sys.argv
    return Results(theme, None if small else RESULTS, command=f"python -m {part}"), small


def line(record: dict[str, Any]) -> str:
    """A row of the page."""
    moved = ("bytes", "{:,}"), ("gb_per_s", "{:.0f}"), ("percent_of_copy", "{:.0f} %")
    cells = [record["name"], f"{record['median_ms']:.4f}", f"{record['iqr_ms']:.4f}"]
    cells += [form.format(record[key]) if key in record else "" for key, form in moved]
    cells += [f"{record['rate']:.3g} {record['unit']}" if "rate" in record else "", record["target"]]
    return f"| {' | '.join(cells)} |"


def page(records: list[dict[str, Any]], notes: list[str], command: str) -> str:
    """The page of one part."""
    copy = (
        f"Medians; device events where nothing else is said. A copy of 1 GiB moved {copy_bytes_per_s() / 1e9:.0f} GB/s."
    )
    return "\n".join([*head(command), copy, "", *ruled(HEADS), *map(line, records), "", *(f"- {n}" for n in notes), ""])


def head(command: str) -> list[str]:
    title = f"# On one {device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return [title, "", f"`{command}`, {datetime.date.today()}.", ""]


def ruled(heads: list[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write(folder: Path, theme: str, text: str, held: Any) -> None:
    short = re.sub(r"[^a-z0-9]+", "", device_name().lower().removeprefix("nvidia"))
    stem = folder / f"{theme}_{short}_{datetime.date.today():%Y%m}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")


def write_outcomes(outcomes: Path, folder: Path) -> None:
    """The page of how the parts ended, tests included: lines of OUTCOMES with tabs between."""
    rows = [text.split("\t") for text in outcomes.read_text().splitlines()]
    held = [dict(zip(OUTCOMES, row, strict=True)) for row in rows]
    table = [*ruled(OUTCOMES), *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]
    write(folder, "parts", "\n".join([*head("bash bench/gpu.sh"), *table, ""]), held)


if __name__ == "__main__":
    need_device("bench.gpu_timing")
    write_outcomes(Path(sys.argv[1]), RESULTS)
