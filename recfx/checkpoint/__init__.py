"""Saves and loads any training state: one folder per step, complete or absent, with safetensors and a JSON manifest.

    <folder>/step-000002000/manifest.json               checksums, table and column names, seed, reader position
    <folder>/step-000002000/state.safetensors           dense parameters, optimiser moments, counters, free rows
    <folder>/step-000002000/table-0.00000.safetensors   live rows in row order, with their numbers

No capacity, index, time or host name is written, so equal states give equal bytes.
"""

from recfx.checkpoint.folders import best, latest
from recfx.checkpoint.loading import load
from recfx.checkpoint.matching import held
from recfx.checkpoint.merging import compact, diff
from recfx.checkpoint.saving import Saver, save

__all__ = ["Saver", "best", "compact", "diff", "held", "latest", "load", "save"]
