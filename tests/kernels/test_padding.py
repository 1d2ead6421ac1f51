"""Padding between the ids changes nothing: definitions and kernels skip it wherever it stands."""

import random
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from recfx.kernels.index import count_candidates, find, find_or_insert
from recfx.kernels.rows import add_row_grads, pool, sum_adamw_rows
from recfx.table import Limits, initializer_tensors, table
from recfx.table.policies import Life, at_least
from tests.kernels.index.test_find_or_insert import arguments
from tests.reference import (
    EXTREMES,
    Reading,
    assert_same_table,
    on_threads,
    random_lists,
    reading_of,
    scattered,
    table_plan,
)

DEFINITIONS = {
    "find": find.definition,
    "find_or_insert_": find_or_insert.definition,
    "count_candidates_": count_candidates.definition,
    "pool": pool.definition,
    "add_row_grads_": add_row_grads.definition,
    "sum_adamw_rows_": sum_adamw_rows.definition,
}
KERNELS = {
    "find": find.find,
    "find_or_insert_": find_or_insert.find_or_insert_,
    "count_candidates_": count_candidates.count_candidates_,
    "pool": pool.pool,
    "add_row_grads_": add_row_grads.add_row_grads_,
    "sum_adamw_rows_": sum_adamw_rows.sum_adamw_rows_,
}
HYPER = torch.tensor([0.9, 0.9, 0.1, 0.99, 0.01, 0.05, 1e-8, 0.5], dtype=torch.float64)


def check(ops: Mapping[str, Callable], seed: int, *, samples: int = 40, max_rows: int = 50) -> None:
    """Every operator on a reading and on the same with padding in it; ids that are refused and not admitted too."""
    rng, vocabularies, dims = random.Random(seed), [0, 1, 0], (8, 1)
    plan = table_plan(vocabularies, dims)
    life = Life(admit=at_least(2), candidates=25)
    lists = random_lists(rng, lookups=3, samples=samples, longest=3, ids=[*EXTREMES, *range(9)])
    plain = reading_of(lists, vocabularies, spare=2)
    padded, at = scattered(rng, plain)
    admit, weight = [rng.random() < 0.8 for _ in plain.id], torch.rand(len(plain.id))
    keys, params = initializer_tensors(plan, 1)
    blocks = [torch.randn(samples, 3, dim) for dim in dims]

    def run(reading: Reading, places: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per id, per cell, and per unique row."""
        state = table(plan, optimizer_slots=2, seed=1, limits=Limits(max_rows=max_rows), life=life).init()
        admits = torch.ones(len(reading.id), dtype=torch.bool).index_put((places,), torch.tensor(admit))
        weights = torch.full((len(reading.id),), 5.0).index_put((places,), weight)
        index = state.slots, state.ids, state.num_slots, state.salt
        counts = ops["count_candidates_"](*state.candidates, *index, *reading)
        rows = ops["find_or_insert_"](*arguments(state, reading, (keys, params), admits.tolist()))
        found = ops["find"](*index, *reading)
        ids = found, *reading, samples, keys
        pooled = ops["pool"](state.rows, *ids, params, plan.firsts, plan.dims, weights)
        pooled += ops["pool"](state.rows, *ids, None, plan.firsts, plan.dims)
        of_ids = rows[1], reading.cell, plan.firsts, plan.dims, blocks, weights
        ops["add_row_grads_"](state.grads, *of_ids)
        states.append(state)
        fused, num = state.rows.clone(), state.num_unique.clone()
        ops["sum_adamw_rows_"](fused, num, state.unique_rows, HYPER, *of_ids)
        return [counts, *rows, found], pooled, [state.grads, fused]

    states: list = []
    expected, pooled, grads = run(plain, torch.arange(len(plain.id)))
    got, pooled_padded, grads_padded = run(padded, at)
    between = torch.ones(len(padded.id), dtype=torch.bool).index_put((at,), torch.tensor(False))
    for name, a, b in zip(("count", "row", "inverse", "found"), expected, got, strict=True):
        assert torch.equal(a, b[at]), name
        assert (b[between] == (0 if name == "count" else -1)).all(), name
    for a, b in zip(pooled + grads, pooled_padded + grads_padded, strict=True):
        assert torch.equal(a, b)
    assert_same_table(*states)
    assert bool(states[0].num_refused) == (max_rows < 50)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ops", [DEFINITIONS, KERNELS], ids=["definition", "kernel"])
def test_padding_between_ids_changes_nothing(ops, seed, threads):
    on_threads(threads, check, ops, seed)


def test_padding_between_ids_changes_nothing_where_the_table_is_full():
    for ops in (DEFINITIONS, KERNELS):
        for seed in (7, 8):
            check(ops, seed, samples=60, max_rows=12)


@pytest.mark.parametrize("num", [1, 64, 200])
def test_nothing_but_padding_is_nothing(num):
    reading = Reading(
        torch.arange(num), torch.full((num,), -1, dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    )
    for ops in (DEFINITIONS, KERNELS):
        state = table(table_plan([0], (2,)), optimizer_slots=2, seed=1, limits=Limits(max_rows=9)).init()
        init = initializer_tensors(table_plan([0], (2,)), 1)
        row, inverse = ops["find_or_insert_"](*arguments(state, reading, init))
        assert (row == -1).all()
        assert (inverse == -1).all()
        assert not int(state.num_rows)
        assert not state.tally.any()
        (block,) = ops["pool"](state.rows, row, *reading, 3, *init, [0], [2])
        assert not block.any()
