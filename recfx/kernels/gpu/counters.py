"""The places of a table's counters as constants of Triton: `from recfx.kernels.gpu.counters import NUM_ROWS`."""

from __future__ import annotations

import triton.language as tl

from recfx.kernels.counters import PLACES

__all__: list[str] = []


def __getattr__(name: str) -> tl.constexpr:
    if name not in PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return tl.constexpr(PLACES[name])
