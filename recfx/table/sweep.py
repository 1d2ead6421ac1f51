"""Deleting rows between steps, and what there is to know about a table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recfx.kernels.counters import CREATED, EVICTED, LOOKED_UP, NUM_REFUSED, UNADMITTED
from recfx.kernels.index import hashing
from recfx.kernels.op import FREED, UNKNOWN
from recfx.table.index import rebuild_
from recfx.table.policies import Life, RowColumns
from recfx.table.state import TableState, is_full, num_live

__all__ = ["TableStats", "checked", "columns_of", "delete_", "is_sweep_due", "stats", "sweep_"]


def is_sweep_due(state: TableState, life: Life, number: int) -> bool:
    """Whether a sweep follows step `number`: where `every` divides it, and where a table that is to evict is full."""
    return (life.at_cap == "evict" and is_full(state)) or number % life.every == 0


def sweep_(state: TableState, life: Life) -> TableState:
    """Deletes the rows that `life` expires; afterwards forgets the candidates if they are more than half full.

    Cost:     one pass over the columns that the policies read, and a rehash when a row was deleted; host syncs.
    Raises:   ValueError inside a step; TypeError when a policy returns something else than it should.
    """
    columns, step = columns_of(state), int(state.step)
    live = columns.vocabulary != FREED
    dead = torch.zeros_like(live)
    if life.expire is not None:
        dead |= checked("expire", life.expire(columns, step), torch.bool, live) & live
    if life.score is not None:
        assert life.keep is not None
        score = checked("score", life.score(columns, step), torch.int64, live)
        left = torch.nonzero(live & ~dead)[:, 0]
        dead[left[_lowest(score[left], left.numel() - life.keep)]] = True
    gone = torch.nonzero(dead)[:, 0]
    delete_(state, gone)
    state.counters[EVICTED] += gone.numel()
    candidates = state.candidates
    if int(state.num_candidates) > candidates.ids.numel() // 2:
        state.num_candidates.zero_()
        candidates.slots[: int(state.num_candidate_slots)] = hashing.EMPTY
    return state


def columns_of(state: TableState) -> RowColumns:
    """What policies read; views of the state but for `last_step`."""
    n = int(state.num_rows)
    last_step, weight = state.seen[:n] >> 32, state.rows[:n, 0, : state.grads.shape[1]]
    return RowColumns(state.ids[:n], state.vocabularies[:n], last_step, state.born[:n], state.counts[:n], weight)


def checked(name: str, got: Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """What a policy returned. Raises: TypeError naming it when that is of another kind, dtype or shape."""
    if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != like.shape:
        what = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise TypeError(f"{name}: got {what}, expected {dtype} {list(like.shape)}, one for each.")
    return got


def _lowest(score: Tensor, num: int) -> Tensor:
    """bool [R]: the `num` lowest scores, of equal ones those that come first."""
    if num <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    highest = torch.kthvalue(score, num).values
    below, tied = score < highest, score == highest
    return below | (tied & (torch.cumsum(tied, 0) <= num - below.sum()))


def delete_(state: TableState, row: Tensor) -> TableState:
    """Frees rows (i64, in use): nothing is left of them, and the lowest is the first to be used again.

    Raises:   ValueError inside a step.
    """
    if int(state.num_unique):
        raise ValueError("state: got a step in progress, expected none. Rows are deleted between optimiser steps.")
    if not row.numel():
        return state
    _forget_(state, row)
    for t in (state.ids, state.seen, state.born, state.counts, state.rows):
        t[row] = 0
    state.vocabularies[row] = FREED
    free = torch.nonzero(state.vocabularies[: int(state.num_rows)] == FREED)[:, 0]
    state.free_rows[: free.numel()] = free.flip(0).int()
    state.num_free.fill_(free.numel())
    return rebuild_(state)


def _forget_(state: TableState, row: Tensor) -> None:
    """A deleted id that was once a candidate begins at zero again."""
    c = state.candidates
    if c.ids.numel():
        key = state.vocabularies[row].long(), state.ids[row]
        number = hashing.probe(c.slots, c.ids, state.num_candidate_slots, state.salt, *key)
        c.counts[number[number != UNKNOWN]] = 0


class TableStats(NamedTuple):
    """A table on the host. Counts of ids and rows are of training and its sweeps, from the table's beginning."""

    size: int  # rows in use
    load: float  # share of the index's slots that is taken
    mean_probe: float  # slots looked at to find a row, nan without one
    max_probe: int
    hit_rate: float  # share of the ids looked up by training that had a row before, nan without one
    admitted: int  # rows created by training
    refused: int  # ids that found no room, in the table or in their step
    unadmitted: int  # ids that were not given a row yet
    evicted: int  # rows deleted by sweeps
    candidates: int  # ids whose occurrences are being counted


def stats(state: TableState) -> TableStats:
    """Reads a table's counters and measures its index. Syncs, and takes a pass over the index: for now and then.

    Example:  >>> from recfx.table import Limits, table
              >>> from recfx.embeddings import Embedding, plan_tables
              >>> plan = plan_tables({"emb": [Embedding("item", dim=8)]}).tables[0]
              >>> stats(table(plan, optimizer_slots=2, seed=0, limits=Limits(max_rows=100)).init()).size
              0
    """
    size, probes = num_live(state), _probes(state)
    counters = state.counters.tolist()
    misses = counters[CREATED] + counters[UNADMITTED] + counters[NUM_REFUSED]
    return TableStats(
        size=size,
        load=size / int(state.num_slots),
        mean_probe=float(probes.double().mean()),
        max_probe=int(probes.max()) if size else 0,
        hit_rate=1 - misses / counters[LOOKED_UP] if counters[LOOKED_UP] else float("nan"),
        admitted=counters[CREATED],
        refused=counters[NUM_REFUSED],
        unadmitted=counters[UNADMITTED],
        evicted=counters[EVICTED],
        candidates=int(state.num_candidates),
    )


def _probes(state: TableState) -> Tensor:
    """i64 [size]: slots looked at to find each row."""
    slots = state.slots[: int(state.num_slots)]
    at = torch.nonzero(slots != hashing.EMPTY)[:, 0]
    row, mask = slots[at] & 0xFFFFFFFF, state.num_slots - 1
    start, probes = hashing.hash_id(state.ids[row], state.vocabularies[row], state.salt), torch.zeros_like(at)
    open_ = torch.arange(at.numel(), device=at.device)
    while open_.numel():
        distance = (at[open_] - start) & mask
        far = distance >= hashing.RUN
        probes[open_] += torch.where(far, hashing.RUN, distance + 1)
        open_, start = open_[far], hashing.next_run(start[far])
    return probes
