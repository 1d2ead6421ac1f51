"""Feature ops: pure functions on dense tensors [B, d] and Ragged lists. Nothing is written to its input.

A feature function is an ordinary function of the batch that calls them; it is traced into the step. Every op has static
shapes and reads nothing back to the host.

Many columns: where an op is the same for all, give it a dict of columns, and select_dense a list. It is then one loop
in the graph, whatever their number; one call per column gives the same values, but a loop to compile for each.
"""

from recfx.features.ids import cross, farm_hash, mod, multi_hash, murmur_hash
from recfx.features.lists import (
    check_length,
    flatten,
    from_dense,
    select_dense,
    select_ragged,
    split_dense,
    to_dense,
    truncate,
    truncate_lists,
)
from recfx.features.numbers import bucketize, clip, fill_missing, log1p, min_max, quantile_boundaries, standardize

__all__ = [
    "bucketize",
    "check_length",
    "clip",
    "cross",
    "farm_hash",
    "fill_missing",
    "flatten",
    "from_dense",
    "log1p",
    "min_max",
    "mod",
    "multi_hash",
    "murmur_hash",
    "quantile_boundaries",
    "select_dense",
    "select_ragged",
    "split_dense",
    "standardize",
    "to_dense",
    "truncate",
    "truncate_lists",
]
