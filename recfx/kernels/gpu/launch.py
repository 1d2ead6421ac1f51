"""How much of its work one Triton program takes, and how many programs a launch has. Sizes of tensors alone decide, so
a launch can be part of a CUDA graph; what a batch really holds is read on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = [
    "at_once", "chosen", "columns_of", "cover_of", "held_at_once", "list_bounds", "lower_bound", "multiprocessors",
    "programs", "rows_of", "search_steps", "slices",
]  # fmt: skip

BLOCK, NUM_WARPS = 128, 1  # positions per program of most kernels, four a lane
KEYS = 32  # of those that probe an index, one a lane: a warp waits for the longest of its probes
TILE = 1024  # floats per program of the kernels that move rows
MULTIPROCESSORS = 132  # of an H100 or H200, for compilation without a GPU
REGISTERS, MOST_AT_ONCE = 65536, 32  # registers of a multiprocessor, and programs that it holds at most


def multiprocessors() -> int:
    """Of the current device."""
    if not torch.cuda.is_available():
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def programs(num: int, per_program: int, at_once: int = 7) -> tuple[int]:
    """The grid of programs that walk over `num` items by the number of programs. Never empty.

    It has no more programs than the device holds at once: all begin together and walk equally far. With more, the last
    ones begin when the first ones end, and most of the device then waits for them.

    Args:     at_once: programs of this kernel on a multiprocessor, which follows from its registers; 7 is 72 registers
              at 4 warps. A test holds it against the compiled kernel.
    """
    return (max(1, min(triton.cdiv(num, per_program), at_once * multiprocessors())),)


def at_once(width: int, held: tuple[int, int, int], num_slices: int = 1) -> int:
    """The one of `held` that is of rows of this width: as many programs as a multiprocessor holds by the registers that
    the compiler gives them. The first is of rows of 16, 32 .. 256 floats in one slice, the second of other rows of 4 to
    128 floats in one slice or two, the last of all others."""
    if num_slices == 1 and width % 16 == 0 and width <= 256:
        return held[0]
    return held[1] if num_slices <= 2 and 4 <= width <= 128 else held[2]


def held_at_once(registers: int, num_warps: int) -> int:
    """Programs that a multiprocessor holds at once. It gives out registers by 8 a thread."""
    return min(REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps), MOST_AT_ONCE, 64 // num_warps)


def columns_of(width: int) -> int:
    """Columns of a tile that holds whole rows: Triton's sizes are powers of two."""
    return triton.next_power_of_2(width)


def cover_of(width: int, *strides: int) -> int:
    """Columns up to a multiple of 4, if those after `width` belong to the same row: 16 bytes then need one mask."""
    cover = -(-width // 4) * 4
    return cover if all(stride % 4 == 0 and stride >= cover for stride in strides) else width


def rows_of(width: int) -> int:
    """Rows of a tile, so that a tile is about TILE floats."""
    return max(1, TILE // columns_of(width))


def slices(firsts: Sequence[int], dims: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Static arguments of a kernel over the logical tables side by side in a row."""
    return {"FIRSTS": tuple(firsts), "DIMS": tuple(dims), "COLUMNS": tuple(map(columns_of, dims))}


def search_steps(num: int) -> int:
    """Halvings after which `lower_bound` over `num` items has ended."""
    return num.bit_length()


@triton.jit
def lower_bound(items, num, steps, key):
    """The first place whose item is not less than `key`, in rising items[:num]; a block of keys at a time."""
    low = tl.zeros_like(key)
    high = low + num
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(items + middle, mask=low < high, other=0) < key
        high = tl.where((low < high) & ~less, middle, high)
        low = tl.where((low < high) & less, middle + 1, low)
    return low


@triton.jit
def list_bounds(offsets, list, num_lists, size):
    """Where each list begins and ends. Whatever the offsets say, 0 <= begin <= end <= size: a kernel cannot raise."""
    within = list < num_lists
    begin = tl.minimum(tl.maximum(tl.load(offsets + list, mask=within, other=0), 0), size).to(tl.int32)
    end = tl.minimum(tl.load(offsets + list + 1, mask=within, other=0), size).to(tl.int32)
    return begin, tl.maximum(end, begin)


@triton.jit
def chosen(items, nth):
    """items[nth] of a tuple of pointers of one type, or of numbers."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(nth == i, items[i], item)
    return item
