"""Pooling: from the rows of a table to the embeddings that a model is given, and back to the gradients of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.embeddings import Cell, Combiner, Plan, Tile
from recfx.kernels.lists.order_lists import list_sums
from recfx.kernels.rows import pool as kernels
from recfx.table.combining import combined
from recfx.table.reading import Found, Reading
from recfx.types import Ragged

__all__ = ["Occurrences", "groups_of", "occurrences", "pool"]


class Occurrences(NamedTuple):
    """The gradients of a batch's ids, and the unique rows they are of, as the kernels take them."""

    inverse: Tensor  # i32 [P]
    cell: Tensor  # i32 [P]
    firsts: Sequence[int]  # of each logical table in a row
    dims: Sequence[int]
    grads: Sequence[Tensor]  # f32 [B, L, dim], gradients of pooled rows by logical table
    weight: Tensor | None  # f32 [P]


def pool(
    rows: Tensor,
    found: Found,
    init_keys: Tensor,
    unknown_params: Tensor | None,
    firsts: Sequence[int],
    dims: Sequence[int],
) -> list[Tensor]:
    """The sum of the weighted rows of each list: f32 [B, L, dim] per logical table, read-only cells last.

    Then the rows of each lookup that keeps them: f32 [values, 1, dim] per logical table, read-only lookups last.
    """
    reading = found.reading
    table_rows, rows = rows, rows if found.rows is None else found.rows
    ids, num_samples = (rows, found.row, reading.id, pooled_cells(reading)), reading.lists[0].num_samples
    rest = (reading.vocabularies, num_samples, init_keys, unknown_params, firsts, dims)
    if reading.ends is None:
        pooled = kernels.pool(*ids, *rest, reading.weight)
    else:
        pooled = kernels.pool_lists(*ids, reading.ends, *rest)
    kept: list[Tensor] = []
    for k in reading.kept:
        of_values = found.row[k.position], reading.id[k.position], k.cell, reading.vocabularies[k.first_cell, None]
        weight = None if reading.weight is None else reading.weight[k.position]
        kept += kernels.pool(rows, *of_values, k.cell.numel(), *rest[2:], weight)
    if found.read_only is None:
        return [*pooled, *kept]
    read_only = pool(table_rows, found.read_only, init_keys, unknown_params, firsts, dims)
    both = zip(pooled, read_only[: len(dims)], strict=True)
    return [*(torch.cat(pair, dim=1) for pair in both), *kept, *read_only[len(dims) :]]


def pooled_cells(reading: Reading) -> Tensor:
    """i32 [P]: the cells of a reading, -1 where rows are kept and not pooled."""
    cell, num_cells = reading.cell, len(reading.vocabularies)
    for k in reading.kept:
        cell = torch.where(reading.cell % num_cells == k.first_cell, -1, cell)
    return cell


def occurrences(found: Found, grads: Sequence[Tensor], firsts: Sequence[int], dims: Sequence[int]) -> list[Occurrences]:
    """The gradients of pooled rows by occurrence of an id: of lists that are pooled, then of each lookup that keeps
    its rows. No gradient reaches a row through a read-only cell."""
    reading, num = found.reading, len(dims)
    pooled = [grad[:, : len(reading.vocabularies)] for grad in grads[:num]] if found.read_only else grads[:num]
    all_of = [Occurrences(found.inverse, pooled_cells(reading), firsts, dims, pooled, reading.weight)]
    for number, k in enumerate(reading.kept, 1):
        weight = None if reading.weight is None else reading.weight[k.position]
        of_values = grads[number * num : (number + 1) * num]
        all_of.append(Occurrences(found.inverse[k.position], k.cell, firsts, dims, of_values, weight))
    return all_of


def groups_of(plan: Plan, pooled: Sequence[Sequence[Tensor]], found: Sequence[Found]) -> dict[str, Any]:
    """Each group's embeddings in its order, as one tensor: [B, cells, dim], or [B, sum of dims] if they differ.

    A group whose rows are kept is a Ragged with values [P, dim].

    Args:     pooled, found: of each physical table: what `pool` returned, and what it was given.
    """
    groups: dict[str, Any] = {}
    for name, cells in plan.groups.items():
        if cells[0].combiner is None:
            groups[name] = _rows_of(plan, cells[0], pooled[cells[0].table], found[cells[0].table])
            continue
        rows = pooled[cells[0].table][cells[0].column]
        whole = [(cells[0].table, cells[0].column, l, "sum") for l in range(rows.shape[1])]
        if [tuple(c) for c in cells] == whole and all(map(plan.learns, cells)):
            groups[name] = rows
            continue
        parts = []
        for c in cells:
            part = pooled[c.table][c.column][:, plan.tables[c.table].cells_of(c.lookup)]
            part = part if plan.learns(c) else part.detach()
            lookup, ids = plan.tables[c.table].lookups[c.lookup], found[c.table].reading.lists[c.lookup]
            if isinstance(c.combiner, Combiner):
                parts.append(combined(c.combiner, part, ids, lookup))
                continue
            divisor = _divisor(c.combiner, ids, lookup.padding_id)
            parts.append(part if divisor is None else part / divisor[:, None, None])
        same = len({part.shape[2] for part in parts}) == 1
        groups[name] = torch.cat(parts if same else [part.flatten(1) for part in parts], dim=1)
    return groups


def _rows_of(plan: Plan, cell: Cell, pooled: Sequence[Tensor], found: Found) -> Ragged:
    """The rows of a lookup that keeps them."""
    lookups = plan.tables[cell.table].lookups
    number = sum(lookup.is_kept for lookup in lookups[: cell.lookup])
    rows = pooled[(1 + number) * len(plan.tables[cell.table].dims) + cell.column][:, 0]
    return Ragged(rows if plan.learns(cell) else rows.detach(), found.reading.lists[cell.lookup].offsets)


def _divisor(combiner: str | Tile | Combiner | None, ids: Ragged, padding_id: int | None) -> Tensor | None:
    """What the sum of each list's weighted rows is divided by, [B]. None: by nothing."""
    if combiner not in ("mean", "sqrtn"):
        return None
    if ids.weights is None and padding_id is None:
        count = ids.offsets.diff().clamp(min=1)
        return count if combiner == "mean" else count.sqrt()
    weights = torch.ones_like(ids.values, dtype=torch.float32) if ids.weights is None else ids.weights
    weights = weights if padding_id is None else torch.where(ids.values == padding_id, 0.0, weights)
    sums = list_sums(weights if combiner == "mean" else weights.square(), ids.offsets)
    sums = sums if combiner == "mean" else sums.sqrt()
    return torch.where(sums == 0, 1, sums)
