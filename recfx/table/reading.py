"""What a table reads of a batch: the ids of its lookups in one order, before and after they are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.embeddings import Lookup
from recfx.kernels.lists import order_ids, order_lists
from recfx.types import NUM_SAMPLES, Ragged

__all__ = ["Cells", "Found", "Kept", "Reading", "cells_of", "check_num_samples", "ids_of", "in_order"]


class Reading(NamedTuple):
    """The ids that one table looks up, in the order (sample, lookup, place in the list), padding anywhere between."""

    id: Tensor  # i64 [P]
    cell: Tensor  # i32 [P], sample * L + cell of the sample, -1 padding; a lookup is one cell, or n that are tiled
    vocabularies: Tensor  # i32 [L], of each cell
    weight: Tensor | None = None  # f32 [P]; None: all 1
    ends: Tensor | None = None  # i32 [B * L], the position at which each cell's ids end, where `pool_lists` is used
    lists: Sequence[Ragged] = ()  # the feature of each lookup, the read-only ones last
    read_only: Reading | None = None  # of the read-only lookups, where the table has others too
    trains: Tensor | None = None  # bool [L], which cells train rows; None: all
    kept: Sequence[Kept] = ()  # the lookups whose rows stay lists


class Kept(NamedTuple):
    """A lookup whose rows stay lists: where each value of its feature is among the ids of a reading."""

    first_cell: int  # of the lookup, in a sample
    position: Tensor  # i64 [values], in the reading; 0 for padding
    cell: Tensor  # i32 [values], 0 1 2 ..., a cell for each value, -1 for padding


class Found(NamedTuple):
    """Where the ids of a reading are. Valid inside one step.

    Where several ranks share a table, rows are fetched from the ranks that own them: see `recfx.dist.exchange`.
    """

    reading: Reading
    row: Tensor  # i32 [P], -1 unknown or padding, -2 rejected
    inverse: Tensor  # i32 [P], unique number in this step, -1 without
    read_only: Found | None = None  # of `reading.read_only`
    rows: Tensor | None = None  # f32 [R, 1, W], what `row` counts, fetched; None: the table's own rows
    requested: Found | None = None  # the ids that all ranks have requested from this one; None: one process

    @property
    def own(self) -> Found:
        """Where ids are in this process's table: those that ranks have requested, or the batch's."""
        return self if self.requested is None else self.requested


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """The cells of a sample that some lookups fill."""

    lookups: Sequence[Lookup]
    vocabularies: Tensor  # i32 [L], of each cell
    trains: Tensor | None  # bool [L], which cells train rows; None: all
    padding: tuple[Tensor, Tensor] | None  # i64 [L], an id that is not counted, and bool [L], whether there is one


def cells_of(lookups: Sequence[Lookup], device: torch.device) -> Cells:
    """The cells that these lookups fill."""
    of_cells = [lookup for lookup in lookups for _ in range(lookup.num_cells)]
    vocabularies = torch.tensor([l.vocabulary for l in of_cells], dtype=torch.int32, device=device)
    has_one = [l.padding_id is not None for l in of_cells]
    ids = torch.tensor([l.padding_id or 0 for l in of_cells], dtype=torch.int64, device=device)
    padding = (ids, torch.tensor(has_one, device=device)) if any(has_one) else None
    trains = (
        None if all(l.trainable for l in of_cells) else torch.tensor([l.trainable for l in of_cells], device=device)
    )
    return Cells(lookups=lookups, vocabularies=vocabularies, trains=trains, padding=padding)


def in_order(lists: Sequence[Ragged], cells: Cells) -> Reading:
    """The ids of all lists in the table's order. An id that is padding has cell -1."""
    values, offsets = [r.values.contiguous() for r in lists], [r.offsets.contiguous() for r in lists]
    lengths, weight, ends = [max(lookup.length, 0) for lookup in cells.lookups], None, None
    kept_lookups = [l for l, lookup in enumerate(cells.lookups) if lookup.is_kept]
    if not any(lengths) and all(r.weights is None for r in lists):
        if order_ids.uses_ends(values[0].device) and not kept_lookups:
            id, cell, ends = order_ids.order_ids_ends(values, offsets)
        else:
            id, cell = order_ids.order_ids(values, offsets)
    else:
        weights = [None if r.weights is None else r.weights.contiguous() for r in lists]
        id, cell, weight = order_lists.order_lists(values, offsets, weights, lengths)
    places = [_positions(cell, cells, l, values[l].numel()) for l in kept_lookups]
    if cells.padding is not None:
        padding_id, has_one = (t[cell % len(t)] for t in cells.padding)
        cell = torch.where(has_one & (id == padding_id), -1, cell)
    kept = [_kept(first, position, cell) for first, position in places]
    return Reading(id, cell, cells.vocabularies, weight, ends, lists, trains=cells.trains, kept=kept)


def _positions(cell: Tensor, cells: Cells, lookup: int, num_values: int) -> tuple[int, Tensor]:
    """The cell of a lookup in a sample, and the position of each value of its feature in a reading; -1 for padding."""
    first, num_cells = sum(l.num_cells for l in cells.lookups[:lookup]), len(cells.vocabularies)
    is_mine = (cell >= 0) & (cell % num_cells == first)
    number = torch.where(is_mine, is_mine.cumsum(0) - 1, num_values)  # ids are in the order of the lists
    places = torch.arange(cell.numel(), device=cell.device)
    return first, places.new_full((num_values + 1,), -1).scatter(0, number, places)[:num_values]


def _kept(first_cell: int, position: Tensor, cell: Tensor) -> Kept:
    """Args: cell: of the reading, -1 for padding."""
    numbers = torch.arange(position.numel(), dtype=torch.int32, device=cell.device)
    at = position.clamp(min=0)
    return Kept(first_cell, at, torch.where((position >= 0) & (cell[at] >= 0), numbers, -1))


def ids_of(features: Mapping[str, Any], name: str) -> Ragged:
    """The ids of a feature as lists: those of a dense [B, n] are lists of n, empty after the last real sample.

    Raises:   ValueError when there is no such feature or its lists are nested, TypeError when it holds no ids.
    """
    value = features.get(name)
    if value is None:
        raise ValueError(f"feature '{name}': missing, expected Ragged i64 ids. Known features: {sorted(features)}.")
    if isinstance(value, Tensor) and value.dim() == 2:
        num_samples, length = value.shape
        ends = torch.arange(num_samples + 1, dtype=torch.int32, device=value.device)
        if NUM_SAMPLES in features:
            ends = torch.minimum(ends, features[NUM_SAMPLES])
        value = Ragged(value.reshape(-1), ends * length)
    if not isinstance(value, Ragged):
        raise TypeError(f"feature '{name}': got {_said(value)}, expected Ragged i64 ids, or a dense [B, n] of them.")
    if value.outer:
        raise ValueError(
            f"feature '{name}': got lists nested {len(value.outer) + 1} levels, expected one list of ids for each "
            "sample. An embedding combines the ids of a list. Give it recfx.features.flatten(column)."
        )
    if value.values.dtype != torch.int64:
        raise TypeError(
            f"feature '{name}': got {value.values.dtype} ids, expected torch.int64. float32 merges ids above 2**24. "
            "Cast when loading, not in the step."
        )
    if value.offsets.dtype != torch.int32:
        raise TypeError(f"feature '{name}': got {value.offsets.dtype} offsets, expected torch.int32.")
    if value.weights is not None and value.weights.dtype != torch.float32:
        raise TypeError(f"feature '{name}': got {value.weights.dtype} weights, expected torch.float32.")
    return value


def check_num_samples(features: Mapping[str, Any], lookups: Sequence[Lookup]) -> None:
    """Raises ValueError, naming two features, when they have different numbers of samples."""
    numbers: dict[str, int] = {}
    for lookup in lookups:
        value = features.get(lookup.feature)
        if isinstance(value, Ragged):
            numbers[lookup.feature] = value.num_samples
        elif isinstance(value, Tensor) and value.dim():
            numbers[lookup.feature] = value.shape[0]
    for name, num in numbers.items():
        first, expected = next(iter(numbers.items()))
        if num != expected:
            raise ValueError(
                f"feature '{name}': got {num} samples, expected {expected}, as many as feature '{first}' has. A "
                "feature has one list for each sample of the batch."
            )


def _said(value: object) -> str:
    return f"Tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
