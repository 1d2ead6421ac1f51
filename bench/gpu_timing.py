"""Timing on a GPU: device events, medians, bytes compared with the device's copy rate; and pages of the results.

`python -m bench.gpu_timing` prints the device. With `--outcomes FILE` it makes parts_<device>_<yyyymm>.md and
.json of how bench/gpu.sh's parts ended.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import re
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results"
COPY_BYTES, SMALL_COPY_BYTES = 2**30, 2**20
HEADS = ["what", "median ms", "IQR ms", "bytes", "GB/s", "of copy", "rate", "target"]
MOST_APART = 0.01
OUTCOMES = ["part", "limit_s", "seconds", "exit_code", "last_line"]


def need_device(part: str) -> None:
    """Ends the program with one line when torch finds no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{part}: needs a CUDA device, torch {torch.__version__} finds none. Nothing was measured.")


def times_ms(
    function: Callable[[Any], Any],
    inputs: Iterable[Any],
    *,
    repeats: int = 3,
    warm_up: int = 3,
    before: Callable[[Any], Any] = lambda x: None,
) -> list[float]:
    """Device time of each call; inputs are made beforehand and, together, should be larger than the L2 cache.

    Args:     before: called with each input before its call, and not timed.
    """
    inputs = list(inputs)
    for x in inputs[:warm_up]:
        before(x)
        function(x)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats * len(inputs))]
    torch.cuda.synchronize()
    for n, (begin, end) in enumerate(pairs):
        before(inputs[n % len(inputs)])
        begin.record()
        function(inputs[n % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def graph_of(function: Callable[[], Any]) -> Any:
    """`function` recorded as a CUDA graph; `replay()` runs it. It is called once before, to compile."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@functools.cache
def copy_bytes_per_s(num_bytes: int) -> float:
    """Bytes read and written per second by a copy of so many bytes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = statistics.median(times_ms(target.copy_, [source] * 10))
    del source, target
    torch.cuda.empty_cache()
    return 2 * num_bytes / (ms / 1e3)


class Results:
    """The results of a part. The page and its JSON are rewritten after every record, so they survive an aborted part.

    Args:     theme: files are <theme>_<device>_<yyyymm>.md and .json; folder: where they are written; None: only print.
              copy_bytes: of the copy that rates are compared with.
    """

    def __init__(
        self, theme: str, folder: Path | None, *, command: str = "bash bench/gpu.sh", copy_bytes: int = COPY_BYTES
    ) -> None:
        self.theme, self.folder, self.command, self.copy_bytes = theme, folder, command, copy_bytes
        self.records: list[dict[str, Any]] = []
        self.tables: list[dict[str, Any]] = []
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
            of_copy = 100 * rate / copy_bytes_per_s(self.copy_bytes)
            record |= {"bytes": num_bytes, "gb_per_s": rate / 1e9, "percent_of_copy": of_copy}
        if items is not None:
            record |= {"rate": items / (median / 1e3), "unit": unit}
        self.records.append(record)
        print(line(record), flush=True)
        self.write()
        return median

    def note(self, text: str) -> None:
        """Adds a sentence under the table, such as why something was skipped, or what follows from the numbers."""
        self.notes.append(text)
        print(text, flush=True)
        self.write()

    def add_table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Adds a table with a heading after that of the records."""
        self.tables.append({"title": title, "rows": [dict(zip(heads, row, strict=True)) for row in rows]})
        print("\n".join(tabled(self.tables[-1])), flush=True)
        self.write()

    def same_rows(self, what: str, ours: Tensor, theirs: Tensor, before: Tensor) -> None:
        """Raises when the rows of two sides differ after the same step by more than MOST_APART of their movement.

        It is relative to the movement: AdamW moves weights by the learning rate whatever the gradient, so rounding of
        a gradient that is nearly 0 has the same effect.
        """
        apart = float((ours - theirs).abs().mean() / (theirs - before).abs().mean())
        if not apart <= MOST_APART:
            raise ValueError(f"{what}: got rows {apart:.3g} of their step apart, expected {MOST_APART} at most.")
        self.note(f"{what}: checked before timing, rows {apart:.1e} of their step apart.")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Notes an error inside; later measurements still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(what)
            self.note(f"{what}: failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def end(self) -> None:
        """The last line of a part. Ends the program with an error if an attempt failed."""
        if self.failures:
            raise SystemExit(f"{self.theme}: failed: {', '.join(self.failures)}")
        print(f"{self.theme}: all done, {len(self.records)} records")

    def write(self) -> None:
        if self.folder is not None:
            held = {"records": self.records, "tables": self.tables, "notes": self.notes}
            write(self.folder, self.theme, self.page(), held)

    def page(self) -> str:
        rate = copy_bytes_per_s(self.copy_bytes) / 1e9
        copy = (
            f"Medians; device events where nothing else is said. A copy of {self.copy_bytes:,} bytes moved {rate:.0f} "
            "GB/s."
        )
        records = [*ruled(HEADS), *map(line, self.records)] if self.records else []
        tables = [text for table in self.tables for text in ["", *tabled(table)]]
        return "\n".join([*head(self.command), copy, "", *records, *tables, "", *(f"- {n}" for n in self.notes), ""])


def arguments() -> argparse.Namespace:
    """The arguments that bench/gpu.sh passes to its parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="sizes for a first look, printed and not saved")
    parser.add_argument("--results", type=Path, help="folder of the pages; default: bench/results, none where small")
    parser.add_argument("--outcomes", type=Path, help="of the parts of bench/gpu.sh")
    parser.add_argument("paths", nargs="*", help="of tests")
    return parser.parse_args()


def results_folder(args: argparse.Namespace) -> Path | None:
    return args.results or (None if args.small else RESULTS)


def copy_bytes(args: argparse.Namespace) -> int:
    return SMALL_COPY_BYTES if args.small else COPY_BYTES


def results(theme: str) -> tuple[Results, bool]:
    """Where `python -m bench.gpu_<theme> [--small] [--results FOLDER]` puts its numbers, and whether it is small."""
    part = f"bench.gpu_{theme}"
    need_device(part)
    args = arguments()
    command = f"python -m {part}{' --small' * args.small}"
    return Results(theme, results_folder(args), command=command, copy_bytes=copy_bytes(args)), args.small


def line(record: dict[str, Any]) -> str:
    """A row of the page."""
    moved = ("bytes", "{:,}"), ("gb_per_s", "{:.0f}"), ("percent_of_copy", "{:.0f} %")
    cells = [record["name"], f"{record['median_ms']:.4f}", f"{record['iqr_ms']:.4f}"]
    cells += [form.format(record[key]) if key in record else "" for key, form in moved]
    cells += [f"{record['rate']:.3g} {record['unit']}" if "rate" in record else "", record["target"]]
    return f"| {' | '.join(cells)} |"


def head(command: str) -> list[str]:
    title = f"# On one {device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return [title, "", f"`{command}`, {datetime.date.today()}.", ""]


def ruled(heads: list[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]


def tabled(table: dict[str, Any]) -> list[str]:
    """A table of dicts with equal keys, as lines of a page."""
    rows = [[str(cell).replace("|", "/") for cell in row.values()] for row in table["rows"]]
    heads = ruled(list(table["rows"][0])) if rows else ["Nothing."]
    return [f"## {table['title']}", "", *heads, *(f"| {' | '.join(row)} |" for row in rows)]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write(folder: Path, theme: str, text: str, held: Any) -> None:
    short = re.sub(r"[^a-z0-9]+", "", device_name().lower().removeprefix("nvidia"))
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{theme}_{short}_{datetime.date.today():%Y%m}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")


def write_outcomes(outcomes: Path, folder: Path | None) -> None:
    """Writes the page of the outcomes of all parts and tests, from lines of OUTCOMES separated by tabs."""
    rows = [text.split("\t") for text in outcomes.read_text().splitlines()]
    held = [dict(zip(OUTCOMES, row, strict=True)) for row in rows]
    table = [*ruled(OUTCOMES), *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]
    print("\n".join(table))
    if folder is not None:
        write(folder, "parts", "\n".join([*head("bash bench/gpu.sh"), *table, ""]), held)


def main() -> None:
    need_device("bench/gpu.sh")
    args = arguments()
    if args.outcomes is None:
        print(f"torch {torch.__version__}, {device_name()}", flush=True)
    else:
        write_outcomes(args.outcomes, results_folder(args))


if __name__ == "__main__":
    main()
