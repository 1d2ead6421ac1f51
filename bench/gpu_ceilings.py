"""The maximum rates of a GPU, from which the predictions in results/gpu_notes.md are made.

`python -m bench.gpu_ceilings [--small]`; small: sizes for a first look, printed and not saved. Each kernel's result is
checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu_timing import DEVICE, Results, copy_bytes_per_s, graph_of, results, times_ms

WIDTH = 128  # floats of a gathered row: 512 bytes
ROWS = 8  # a program
BLOCK = 128  # lanes a program
PER_LANE = 8  # random reads that a lane has in flight
SECTOR = 32  # bytes that a read of 8 moves
FACTOR, SUMMAND = 1_103_515_245, 12_345  # i -> FACTOR i + SUMMAND mod 2**k visits all places
SAME, IN_ORDER, AT_RANDOM = 0, 1, 2  # addresses of compare-and-swaps


class Sizes(NamedTuple):
    table: int  # i64 numbers, a power of two
    reads: int
    steps: int  # of reads that each depend on the previous one
    rows: int
    gathered: int
    places: int  # i32 numbers for compare-and-swap, a power of two
    same: int  # compare-and-swaps on one address
    swaps: int
    nodes: int


FULL = Sizes(2**30, 2**26, 2**10, 2**23, 2**20, 2**26, 2**20, 2**24, 150)
SMALL = Sizes(2**10, 2**11, 2**5, 2**6, 2**5, 2**10, 2**8, 2**9, 150)


@triton.jit
def empty(anything):
    pass


@triton.jit
def gather(table, row, out, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, WIDTH)
    source = tl.load(row + line)[:, None] * WIDTH + column
    tl.store(out + line[:, None] * WIDTH + column, tl.load(table + source))


@triton.jit
def mixed(x):
    """A hash of 32 bits: every bit depends on all bits of `x`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def read_at_random(table, out, last_place, PER_LANE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for k in tl.static_range(PER_LANE):
        place = mixed((lane * PER_LANE + k).to(tl.uint32)).to(tl.int64) & last_place
        total += tl.load(table + place)
    tl.store(out + lane, total)


@triton.jit
def follow(table, out, steps):
    place = tl.load(table)
    for _ in range(1, steps):
        place = tl.load(table + place)
    tl.store(out, place)


@triton.jit
def swap(places, last_place, ADDRESSES: tl.constexpr, BLOCK: tl.constexpr):
    """Replaces 0 by 1."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if ADDRESSES == 0:
        place = lane * 0
    elif ADDRESSES == 1:
        place = lane & last_place
    else:
        place = (mixed(lane.to(tl.uint32)).to(tl.int64) & last_place).to(tl.int32)
    tl.atomic_cas(places + place, lane * 0, lane * 0 + 1, sem="relaxed")


def check(what: str, is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"{what}: got a wrong result, expected that of torch. Its time would be meaningless.")


def chain(num: int, device: str) -> Tensor:
    """i64 [num]: a cycle through all places, where each holds the next."""
    return torch.arange(num, device=device).mul_(FACTOR).add_(SUMMAND).bitwise_and_(num - 1)


def mixed_numbers(x: Tensor) -> Tensor:
    """`mixed` by torch, in 64 bits."""
    low = 2**32 - 1
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def time_gather(to: Results, sizes: Sizes, device: str) -> None:
    table = torch.arange(sizes.rows * WIDTH, dtype=torch.float32, device=device).view(sizes.rows, WIDTH)
    draws = [torch.randint(0, sizes.rows, (sizes.gathered,), device=device) for _ in range(4)]
    out = table.new_empty(sizes.gathered, WIDTH)

    def run(row: Tensor) -> None:
        gather[(sizes.gathered // ROWS,)](table, row, out, WIDTH=WIDTH, ROWS=ROWS)

    run(draws[0])
    check("gather", torch.equal(out, table[draws[0]]))
    name = f"gather of {sizes.gathered:,} rows of 512 bytes from {sizes.rows:,}"
    to.add(name, times_ms(run, draws), num_bytes=sizes.gathered * (8 + 2 * 4 * WIDTH), items=sizes.gathered,
        unit="rows/s")  # fmt: skip


def time_reads(to: Results, sizes: Sizes, device: str) -> None:
    """Independent random reads, then reads that each depend on the previous one."""
    table, lanes = chain(sizes.table, device), sizes.reads // PER_LANE
    out = table.new_empty(lanes)

    def read(_: Any) -> None:
        read_at_random[(lanes // BLOCK,)](table, out, sizes.table - 1, PER_LANE=PER_LANE, BLOCK=BLOCK)

    read(None)
    place = mixed_numbers(torch.arange(BLOCK * PER_LANE, device=device)) & (sizes.table - 1)
    check("random reads", torch.equal(out[:BLOCK], table[place].view(BLOCK, PER_LANE).sum(1)))
    name = f"{sizes.reads:,} reads of 8 bytes at random places of {8 * sizes.table:,} bytes, {SECTOR} bytes each"
    to.add(name, times_ms(read, range(5)), num_bytes=sizes.reads * SECTOR, items=sizes.reads, unit="reads/s")

    def wait(_: Any) -> None:
        follow[(1,)](table, out, sizes.steps, num_warps=1)

    wait(None)
    place = 0
    for _ in range(sizes.steps):
        place = (place * FACTOR + SUMMAND) % sizes.table
    check("reads that wait", int(out[0]) == place)
    ms = to.add(f"{sizes.steps:,} reads, each at the place that the one before found", times_ms(wait, range(5)))
    to.note(f"A read whose address depends on another takes {1e3 * ms / sizes.steps:.2f} us.")


def time_swaps(to: Results, sizes: Sizes, device: str) -> None:
    places = torch.zeros(sizes.places, dtype=torch.int32, device=device)
    kinds = {
        "one address": (SAME, sizes.same),
        "addresses in order": (IN_ORDER, sizes.swaps),
        "random addresses": (AT_RANDOM, sizes.swaps),
    }
    for name, (addresses, num) in kinds.items():

        def run(_: Any, addresses: int = addresses, num: int = num) -> None:
            swap[(num // BLOCK,)](places, sizes.places - 1, ADDRESSES=addresses, BLOCK=BLOCK)

        places.zero_()
        run(None)
        lane = torch.arange(num, device=device)
        expected = {SAME: lane * 0, IN_ORDER: lane, AT_RANDOM: mixed_numbers(lane)}[addresses] & (sizes.places - 1)
        check(name, int(places.sum()) == len(expected.unique()))
        ms = times_ms(run, range(5))
        to.add(f"{num:,} compare-and-swaps, {name}", ms, items=num, unit="swaps/s")


def time_graph(to: Results, sizes: Sizes, device: str) -> None:
    """Graphs of empty kernels, and of torch's smallest kernels: the cost of a node that does almost nothing."""
    one = torch.zeros(1, device=device)
    kinds: dict[str, Callable[[], Any]] = {
        "empty kernels": lambda: empty[(1,)](one),
        "additions to one number": lambda: one.add_(1),
    }
    for name, launch in kinds.items():

        def launches(launch: Callable[[], Any] = launch) -> None:
            for _ in range(sizes.nodes):
                launch()

        graph = graph_of(launches)
        ms = times_ms(lambda _, graph=graph: graph.replay(), range(20))
        median = to.add(f"a graph of {sizes.nodes} {name}", ms, items=sizes.nodes, unit="nodes/s")
        to.note(f"A node of the graph of {sizes.nodes} {name}: {1e3 * median / sizes.nodes:.2f} us.")


def main() -> None:
    to, small = results("ceilings")
    sizes = SMALL if small else FULL
    to.note(f"A copy of {to.copy_bytes:,} bytes: {copy_bytes_per_s(to.copy_bytes) / 1e9:.0f} GB/s read and written.")
    for part in (time_graph, time_gather, time_reads, time_swaps):
        with to.attempt(part.__name__.removeprefix("time_")):
            part(to, sizes, DEVICE)
        torch.cuda.empty_cache()
    to.end()


if __name__ == "__main__":
    main()
