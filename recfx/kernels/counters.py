"""The places of a table's counters, as counters.h defines them for the C++ kernels: `counters.NUM_ROWS` is 0."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PLACES", "new_counters"]

PLACES: dict[str, int] = {
    name: place
    for place, name in enumerate(re.findall(r"^  ([A-Z_]+)", Path(__file__).with_suffix(".h").read_text(), re.M))
}


def __getattr__(name: str) -> int:
    if name not in PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return PLACES[name]


def new_counters(device: torch.device | str = "cpu", **values: int) -> Tensor:
    """i64 [NUM_COUNTERS]: zeros, but for `values` by lower-case name.

    Example:  >>> from recfx.kernels import counters
              >>> int(new_counters(num_slots=8)[counters.NUM_SLOTS])
              8
    """
    counters = [0] * PLACES["NUM_COUNTERS"]
    for name, value in values.items():
        counters[PLACES[name.upper()]] = value
    return torch.tensor(counters, dtype=torch.int64, device=device)
