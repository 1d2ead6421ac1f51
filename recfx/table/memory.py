"""Memory that is reserved at its largest size and taken as it is used."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

__all__ = ["padded", "reserve", "reserve_rows"]

FLOATS_PER_LINE = 16
HUGE_PAGE_BYTES = 2**21
# Python names this flag from 3.13 on; elsewhere than on Linux the system overcommits without being asked.
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on a CPU, is taken page by page when first written.

    Raises:   MemoryError naming the size when the system, or the device, will not reserve that much.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        if num_bytes == 0 or device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, torch.OutOfMemoryError) as error:
        raise MemoryError(
            f"max_rows: could not reserve {num_bytes} bytes for a table tensor {list(shape)}. Lower max_rows."
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= HUGE_PAGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def reserve_rows(shape: tuple[int, ...], device: torch.device, *, most_padding: float) -> Tensor:
    """`reserve` of f32 rows that each begin on a cache line, unless that takes more than `most_padding` extra memory.

    The result is a view [rows, ...] with the padding left out; a row then touches the fewest lines it can.
    """
    width = torch.Size(shape[1:]).numel()
    memory = reserve((shape[0], padded(width, most_padding=most_padding)), torch.float32, device)
    return memory[:, :width].unflatten(1, shape[1:])


def padded(width: int, *, most_padding: float) -> int:
    """Floats from one row to the next."""
    lines = -(-width // FLOATS_PER_LINE) * FLOATS_PER_LINE
    return lines if lines <= (1 + most_padding) * width else width
