"""Feature ops: pure functions on dense tensors [B, d] and Ragged lists. Nothing is written to its input.

A feature function is an ordinary function of the batch that calls these ops; it is traced into the step. Every op has
static shapes and never waits for the host.

Many columns: to apply one op to many columns, pass a dict of columns (to select_dense, a list). The graph then contains
one loop for any number of columns. One call per column gives the same values, but one loop to compile per column.
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
from recfx.features.numbers import (
    bucketize,
    clip,
    fill_missing,
    log1p,
    min_max,
    quantile_boundaries,
    signed_log1p,
    standardize,
)

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
    "signed_log1p",
    "split_dense",
    "standardize",
    "to_dense",
    "truncate",
    "truncate_lists",
]
