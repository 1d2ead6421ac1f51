"""The kernels of DeepFM's replayed step and their times, by torch's profiler.

`python -m bench.gpu_profile [--small]`; small: sizes for a first look, printed and not saved.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.gpu_deepfm import TABLE_ROWS, TARGETS, build, check_losses, moved_bytes
from bench.gpu_timing import DEVICE, Results, results, times_ms
from bench.workload import Workload, make_batches
from recfx.capture import capture
from recfx.types import Batch

NUM_BATCHES = {1000: 160, 65_536: 8}  # not in the L2 cache together, as in gpu_deepfm
HEADS = ["kernel", "calls a step", "us a call", "us a step", "share"]
LONGEST_NAME = 100
PREDICTED = Path(__file__).parents[1] / "graphs" / "deepfm.cuda.txt"


class Kernel(NamedTuple):
    """The device time of one kernel, copy or memset of a step."""

    name: str
    calls: float  # a step
    us: float  # a call, the mean


def kernels_of(run: Callable[[Any], Any], inputs: Iterable[Any], *, warm_up: int = 3) -> list[Kernel]:
    """The device's work in calls of `run`, slowest first. Nodes of a CUDA graph are listed separately.

    Raises:   ValueError when the profiler recorded no kernel.
    """
    inputs = list(inputs)
    for x in inputs[:warm_up]:
        run(x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for x in inputs:
            run(x)
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent[event.name].append(event.time_range.elapsed_us())
    if not spent:
        raise ValueError(
            "profiler: got no kernel, expected those of the calls. Times need their kernels. Run "
            "`nsys profile --cuda-graph-trace=node` over the same command."
        )
    kernels = [Kernel(name, len(us) / len(inputs), statistics.fmean(us)) for name, us in spent.items()]
    return sorted(kernels, key=lambda k: k.calls * k.us, reverse=True)


def add_kernels(to: Results, say: str, kernels: list[Kernel], step_ms: float) -> None:
    """A table of kernels, and a note of their sum against the step as it was measured without a profiler."""
    total, calls = sum(k.calls * k.us for k in kernels), sum(k.calls for k in kernels)
    rows = [
        (k.name[:LONGEST_NAME], f"{k.calls:g}", f"{k.us:.2f}", f"{k.calls * k.us:.2f}", f"{k.calls * k.us / total:.1%}")
        for k in kernels
    ]
    to.add_table(f"{say}kernels of a step", HEADS, rows)
    between = 1e3 * step_ms - total
    to.note(
        f"{say}{calls:g} nodes a step, their sum {total:.1f} us, the step {1e3 * step_ms:.1f} us without the profiler: "
        f"{between:.1f} us between them, {between / calls:.2f} us a node."
    )


def predicted_nodes(path: Path = PREDICTED) -> list[str]:
    """The predicted numbers of nodes per operator and in all, from graphs/deepfm.cuda.txt. Empty without the file."""
    blocks = path.read_text().split("\n\n") if path.exists() else []
    return next(([line.strip() for line in b.splitlines()] for b in blocks if " in all" in b), [])


def first_losses(run: Callable[[Any, Batch], Any], state: Any, batches: list[Batch]) -> list[float]:
    return [float(run(state, batch)[1].loss) for batch in batches[:2]]


def profile_step(to: Results, work: Workload, device: str) -> None:
    """The captured step, checked against the uncaptured one, timed, and kernel by kernel."""
    batch_size = len(work.dense[0].num)
    say = f"DeepFM, batch {batch_size:,}: "
    here = [Batch(b.buffer.to(device), b.layout) for b in work.batches]
    step, state = build(work, device)
    with torch.no_grad():
        expected = first_losses(step.update_, state, here)
    del state
    step, state = build(work, device)
    run = capture(step, state, work.batches[0])
    apart = check_losses(f"{say}captured", expected, first_losses(run, state, here))
    to.note(f"{say}captured step: checked before timing, losses {apart:.1e} from those of the uncaptured one.")
    num_bytes = moved_bytes(work.batches[0], int((work.dense[0].row < work.table_rows).sum()), work.num_distinct[0])
    ms = times_ms(lambda batch: run(state, batch), here)
    target = TARGETS.get(batch_size, "")
    name = f"{say}captured step, batch on the device"
    median = to.add(name, ms, items=batch_size, unit="samples/s", num_bytes=num_bytes, target=target)
    add_kernels(to, say, kernels_of(lambda batch: run(state, batch), here[:32]), median)


def main() -> None:
    to, small = results("profile")
    sizes, table_rows = ({64: 8, 256: 4}, 20_000) if small else (NUM_BATCHES, TABLE_ROWS)
    if nodes := predicted_nodes():
        to.note(f"Predicted nodes at batch 1,000, by graphs/{PREDICTED.name}: {'; '.join(nodes)}.")
    for size, num in sizes.items():
        with to.attempt(f"DeepFM, batch {size:,}"):
            profile_step(to, make_batches(num, size, table_rows=table_rows), DEVICE)
    to.end()


if __name__ == "__main__":
    main()
