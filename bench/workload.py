"""Criteo-shaped DeepFM batches in memory, on which every CPU benchmark and its opponents train.

One draw of ids has two forms: recfx's (raw 64-bit ids, ragged, packed) and the baselines' (ids remapped beforehand to
rows of one stacked table, missing = a last row of zeros). How often ids repeat follows the statistics of a public
80 000-row Criteo sample: per batch of 1000 / 4096 / 16 384 about 7 830 / 22 700 / 62 100 distinct (column, id) pairs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recfx.types import Batch, Ragged, pack

NUM_COLUMNS, NUM_NUMERICS, LABEL_MEAN = 26, 13, 0.032
DIM, HIDDEN = 8, (64, 16)
CATEGORICAL = tuple(f"c{i}" for i in range(1, NUM_COLUMNS + 1))
NUMERIC = tuple(f"i{i}" for i in range(1, NUM_NUMERICS + 1))
HEAD = 1024  # the most frequent ids of a column: the same in every batch; rarer ids change in each batch


class Column(NamedTuple):
    """How often ids of a column repeat: P(rank r) = (1 - uniform) (r + shift)^-exponent / Z + uniform / cardinality."""

    cardinality: int  # in a table of 0.2 M rows
    missing: float  # columns of equal share are missing together
    uniform: float
    exponent: float
    shift: float


# Fitted to the sample's distinct ids per 1000, 4096 and 16 384 rows; c1 to c26.
COLUMNS = tuple(Column(*c) for c in (
    (23921, 0.041, 0.4, 1.6, 4), (8432, 0, 0.1, 2.0, 128), (11712, 0, 0, 1.3, 128), (3159, 0, 0, 1.4, 0),
    (7172, 0, 0.1, 2.0, 16), (3, 0, 0, 0.3, 0), (7214, 0, 0, 1.6, 128), (1458, 0, 0, 1.9, 16), (22, 0, 0, 2.5, 0),
    (21199, 0.041, 0.4, 2.2, 16), (10386, 0.041, 0.1, 1.2, 0), (16228, 0, 0.1, 1.0, 1), (9, 0, 0, 0.3, 0),
    (1453, 0.421, 0, 1.4, 0), (4559, 0, 0, 1.8, 64), (46, 0.421, 0, 2.2, 0), (3, 0.421, 0, 0.3, 0),
    (565, 0, 0, 2.1, 1), (14, 0, 0, 2.5, 0), (25608, 0.041, 0.4, 1.3, 0), (16758, 0.041, 0.3, 1.9, 16),
    (22893, 0.041, 0.4, 2.1, 16), (8690, 0.421, 0.2, 1.3, 1), (8429, 0, 0, 1.5, 128), (35, 0, 0, 2.5, 0),
    (32, 0, 0, 2.4, 0),
))  # fmt: skip
FIXED = 60  # columns with fewer ids than this do not grow with the table

# Per numeric: share missing, mean and standard deviation of log1p.
NUMERIC_STATS = np.array((
    (0.201, 2.24, 1.20), (0.096, 5.20, 1.58), (0.232, 1.69, 0.89), (0.260, 3.57, 1.70), (0.406, 2.15, 1.23),
    (0.069, 0.46, 0.83), (0.018, 0.06, 0.29), (0, 2.22, 2.10), (0, 1.83, 1.23), (0.069, 0.22, 0.36),
    (0.406, 1.31, 0.73), (0.014, 7.56, 2.78), (0.232, 1.76, 0.94),
))  # fmt: skip


class DenseBatch(NamedTuple):
    """A batch for the baselines: ids already remapped to table rows.

    The indices of a column are contiguous, so two threads share no row: the baselines' scatters take half the time.
    """

    row: Tensor  # i64 [26, B], row of the stacked table; missing = table_rows, the padding row
    num: Tensor  # f32 [B, 13], missing = 0
    label: Tensor  # f32 [B, 1]


class Workload(NamedTuple):
    """Batches in both forms, and all ids a table starts with."""

    batches: list[Batch]  # "label" f32 [B, 1], "i1".."i13" Ragged f32, "c1".."c26" Ragged i64; capacity B each
    dense: list[DenseBatch]
    universe: dict[str, Tensor]  # i64 ids by column; end to end their positions are the rows of DenseBatch.row
    table_rows: int
    num_distinct: list[int]  # distinct (column, id) pairs, per batch


def column_rows(table_rows: int) -> np.ndarray:
    """The number of the `table_rows` ids in each of the 26 columns: small columns are fixed, others in proportion."""
    cardinality = np.array([c.cardinality for c in COLUMNS])
    fixed = np.where(cardinality < FIXED, cardinality, 0)
    spare = table_rows - fixed.sum()
    if spare < 10 * NUM_COLUMNS:
        raise ValueError(f"table_rows: got {table_rows}, expected at least {fixed.sum() + 10 * NUM_COLUMNS}.")
    share = np.where(fixed == 0, cardinality, 0)
    ends = np.round(np.cumsum(share) / share.sum() * spare).astype(np.int64)
    return fixed + np.diff(ends, prepend=0)


def raw_ids(row: Tensor) -> Tensor:
    """A fixed bijection of [0, 2^40): distinct rows get distinct ids, scattered as hashes are."""
    mask = (1 << 40) - 1
    x = (row * -7046029254386353131) & mask
    x = ((x ^ (x >> 20)) * -4658895280553007687) & mask
    return x ^ (x >> 20)


def draw_ranks(column: Column, cardinality: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Popularity ranks, 0 the most frequent."""
    weight = (np.arange(1, cardinality + 1) + column.shift) ** -column.exponent
    cdf = np.cumsum(weight)
    zipf = np.searchsorted(cdf, rng.random(size) * cdf[-1], side="right").clip(max=cardinality - 1)
    return np.where(rng.random(size) < column.uniform, rng.integers(0, cardinality, size), zipf)


def place(rank: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Ranks to rows of one column, one to one: the head keeps its rows, the tail is spread evenly over all others."""
    tail, inverse = np.unique(rank[rank >= HEAD], return_inverse=True)
    row = rank.copy()
    if len(tail):
        row[rank >= HEAD] = HEAD + rng.choice(num_rows - HEAD, len(tail), replace=False, shuffle=False)[inverse]
    return row


def dense_batch(
    batch_size: int, rows: np.ndarray, shape_rng: np.random.Generator, place_rng: np.random.Generator
) -> DenseBatch:
    first = np.cumsum(rows) - rows
    index = np.full((NUM_COLUMNS, batch_size), rows.sum(), dtype=np.int64)
    missing = {share: shape_rng.random(batch_size) < share for share in sorted({c.missing for c in COLUMNS})}
    for f, column in enumerate(COLUMNS):
        present = ~missing[column.missing]
        rank = draw_ranks(column, min(column.cardinality, rows[f]), batch_size, shape_rng)[present]
        index[f, present] = first[f] + place(rank, rows[f], place_rng)
    share, mean, std = NUMERIC_STATS.T
    num = np.abs(shape_rng.normal(mean, std, (batch_size, NUM_NUMERICS)))
    num[shape_rng.random(num.shape) < share] = 0
    label = shape_rng.random((batch_size, 1)) < LABEL_MEAN
    return DenseBatch(torch.from_numpy(index), torch.from_numpy(num).float(), torch.from_numpy(label).float())


def ragged(value_B: Tensor, present_B: Tensor) -> Ragged:
    """Lists of length 0 or 1, with room for one value per sample."""
    values = torch.zeros_like(value_B)
    kept = value_B[present_B]
    values[: len(kept)] = kept
    return Ragged(values, torch.cat([torch.zeros(1, dtype=torch.int32), present_B.cumsum(0, dtype=torch.int32)]))


def recfx_batch(dense: DenseBatch, table_rows: int) -> Batch:
    columns: dict[str, Tensor | Ragged] = {"label": dense.label}
    columns |= {name: ragged(x, x != 0) for name, x in zip(NUMERIC, dense.num.unbind(1), strict=True)}
    for name, row in zip(CATEGORICAL, dense.row.unbind(0), strict=True):
        columns[name] = ragged(raw_ids(row), row < table_rows)
    return pack(columns)


def draw_batches(num_batches: int, batch_size: int, *, table_rows: int, seed: int = 0) -> list[DenseBatch]:
    """Different batches over a table of `table_rows` ids, without the table: see `make_batches`."""
    rows = column_rows(table_rows)
    shape_rng, place_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    return [dense_batch(batch_size, rows, shape_rng, place_rng) for _ in range(num_batches)]


def make_batches(num_batches: int, batch_size: int, *, table_rows: int = 200_000, seed: int = 0) -> Workload:
    """Draws `num_batches` different batches over a table of `table_rows` ids.

    From 0.2 M rows up the number of distinct ids per batch does not depend on `table_rows`, nor do missing values,
    numerics and labels; only the places of rarer ids in the table do.

    Args:     table_rows: distinct (column, id) pairs the table starts with, in `universe`.
    Cost:     about 1 s for 16 batches of 16 384 and 10 M rows.
    Raises:   ValueError when `table_rows` is too small to give each column an id.
    Example:
              >>> w = make_batches(2, 8, table_rows=1000)
              >>> len(w.batches), w.batches[0]["c1"].num_samples, w.dense[0].row.shape
              (2, 8, torch.Size([26, 8]))
    """
    dense = draw_batches(num_batches, batch_size, table_rows=table_rows, seed=seed)
    ids = raw_ids(torch.arange(table_rows)).split(column_rows(table_rows).tolist())
    num_distinct = [int((d.row.unique() < table_rows).sum()) for d in dense]
    batches = [recfx_batch(d, table_rows) for d in dense]
    return Workload(batches, dense, dict(zip(CATEGORICAL, ids, strict=True)), table_rows, num_distinct)


def init_weights(table_rows: int, *, seed: int = 0) -> dict[str, Tensor]:
    """DeepFM's first weights for every baseline: 21 206 dense ones, and the stacked tables, last row (padding) zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.nn.init.trunc_normal_(torch.empty(shape), std=0.001, a=-0.002, b=0.002, generator=generator)

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)

    weights = {"embedding": normal(table_rows + 1, DIM), "bias": normal(table_rows + 1, 1)}
    weights["embedding"][-1], weights["bias"][-1] = 0, 0
    weights |= {"numeric_embedding": normal(NUM_NUMERICS, DIM), "numeric_bias": normal(NUM_NUMERICS, 1)}
    widths = ((NUM_NUMERICS + NUM_COLUMNS) * DIM, *HIDDEN, 1)
    for i, (fan_in, width) in enumerate(pairwise(widths), start=1):
        weights |= {f"w{i}": uniform(width, fan_in, fan_in=fan_in), f"b{i}": uniform(width, fan_in=fan_in)}
    return weights
