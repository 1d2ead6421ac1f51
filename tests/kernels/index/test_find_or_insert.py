import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from recfx.kernels.index import find, find_or_insert, hashing
from recfx.table import Limits, TableState, copy_of, grow_, initializer_tensors, rebuild_, table
from tests.reference import (
    EXTREMES,
    DictTable,
    Reading,
    Stream,
    assert_same_table,
    id_of_hash,
    on_threads,
    random_lists,
    reading_of,
    streams,
    table_plan,
)

OPS = {"definition": find_or_insert.definition, "kernel": find_or_insert.find_or_insert_}
FINDS = {"definition": find.definition, "kernel": find.find}


def empty_table(vocabularies, *, max_rows=64, max_unique=None) -> tuple[TableState, tuple]:
    plan = table_plan(vocabularies)
    state = table(plan, optimizer_slots=2, seed=1, limits=Limits(max_rows=max_rows, max_unique=max_unique)).init()
    return state, initializer_tensors(plan, 1)


def arguments(s: TableState, r: Reading, init: tuple, admit: list[bool] | None = None) -> tuple:
    return (
        s.slots,
        s.ids,
        s.vocabularies,
        s.seen,
        s.born,
        s.rows,
        s.num_rows,
        s.free_rows,
        s.num_free,
        s.num_refused,
        s.tally,
        s.num_crowded,
        s.unique_rows,
        s.num_unique,
        s.num_slots,
        s.salt,
        s.step + 1,
        *r,
        *init,
        None if admit is None else torch.tensor(admit, dtype=torch.bool),
    )


def insert(op, state, reading, init, admit=None):
    row, inverse = op(*arguments(state, reading, init, admit))
    return row.tolist(), inverse.tolist()


def find_with(op, s: TableState, r: Reading):
    return op(s.slots, s.ids, s.num_slots, s.salt, *r).tolist()


def finish_step(state: TableState) -> None:
    state.num_unique.zero_()
    state.step.add_(1)


def free(state: TableState, rows: list[int]) -> None:
    """What a sweep leaves."""
    if not rows:
        return
    state.vocabularies[rows], state.rows[rows], state.counts[rows] = -1, 0, 0
    freed = torch.nonzero(state.vocabularies[: int(state.num_rows)] < 0)[:, 0].flip(0)
    state.free_rows[: len(freed)] = freed.int()
    state.num_free.fill_(len(freed))
    state.tally[find_or_insert.EVICTED] += len(rows)
    rebuild_(state)


def check(
    stream: Stream, ends: list[bool], max_rows: int, max_unique: int | None, rng: random.Random | None = None
) -> None:
    """Every spelling against the dict, batch by batch; `ends[i]` says that a step ends after batch i.

    With `rng`, some occurrences are not admitted, and after a step some rows are freed.
    """
    oracle = DictTable(max_rows, max_unique or max_rows)
    tables = {}
    for name in OPS:
        tables[name], init = empty_table(stream.vocabularies, max_rows=max_rows, max_unique=max_unique)
    for reading, end in zip(stream.readings(), ends, strict=True):
        known = oracle.find(reading)
        admit = rng and [rng.random() < 0.5 for _ in reading.id]
        expected = oracle.insert(reading, admit)
        assert find_with(FINDS["definition"], tables["kernel"], reading) == known
        assert find_with(FINDS["kernel"], tables["definition"], reading) == known
        for name, op in OPS.items():
            assert insert(op, tables[name], reading, init, admit) == expected
            assert find_with(FINDS["kernel"], tables[name], reading) == oracle.find(reading)
        state = tables["kernel"]
        keys = list(zip(state.vocabularies.tolist(), state.ids.tolist(), strict=True))[: int(state.num_rows)]
        assert [key if key[0] >= 0 else None for key in keys] == oracle.keys()
        assert int(state.num_refused) == oracle.num_refused
        assert state.tally.tolist() == oracle.tally()
        assert state.unique_rows[: int(state.num_unique)].tolist() == list(oracle.unique)
        assert_same_table(state, tables["definition"], exact_rows=False)
        if end:
            oracle.next_step()
            evicted = rng.sample(list(oracle.rows), len(oracle.rows) // 2) if rng else []
            rows = [oracle.rows[key] for key in evicted]
            oracle.evict(evicted)
            for table_state in tables.values():
                finish_step(table_state)
                free(table_state, rows)


@given(stream=streams(3), ends=st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_kernel_is_definition_is_dict(stream, ends):
    check(stream, ends[: len(stream.batches)], max_rows=256, max_unique=None)


@given(
    stream=streams(3),
    ends=st.lists(st.booleans(), min_size=3, max_size=3),
    max_rows=st.integers(1, 12),
    max_unique=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_full_table_and_full_step_are_counted(stream, ends, max_rows, max_unique):
    check(stream, ends[: len(stream.batches)], max_rows=max_rows, max_unique=max_unique)


@given(
    stream=streams(5),
    ends=st.lists(st.booleans(), min_size=5, max_size=5),
    max_rows=st.integers(1, 12),
    max_unique=st.integers(1, 6),
    rng=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_freed_rows_are_reused_and_admission_waits(stream, ends, max_rows, max_unique, rng):
    check(stream, ends[: len(stream.batches)], max_rows, max_unique, rng)


def test_ids_of_one_tag_and_one_home_slot_are_told_apart():
    """Hashes that agree in all the bits the index looks at: only the id itself is left to compare."""
    ids = [id_of_hash(0xABCD << 48 | k << 24 | 5, 0) for k in range(150)]
    hashes = hashing.hash_id(torch.tensor(ids), torch.zeros(150), torch.tensor(0))
    assert len((hashes & 0xFFFF).unique()) == len((hashes >> 48).unique()) == 1
    stored, absent = reading_of([[[i] for i in ids[:100]]], [0]), reading_of([[[i] for i in ids[100:]]], [0])
    for op in OPS.values():
        state, init = empty_table([0], max_rows=2**15)
        assert insert(op, state, stored, init)[0] == list(range(100))
        assert insert(op, state, stored, init)[0] == list(range(100))
        assert int(state.num_crowded) == 100 - hashing.RUN
        for finder in FINDS.values():
            assert find_with(finder, state, stored) == list(range(100))
            assert find_with(finder, state, absent) == [-1] * 50


def test_index_refuses_rows_beyond_seven_eighths():
    """A table that was not grown in time stays right: what finds no slot is refused and counted."""
    state, init = empty_table([0], max_rows=64)
    state.num_slots.fill_(8)
    state.slots[:8] = -1
    reading = reading_of([[[i] for i in range(20)]], [0])
    for op in OPS.values():
        s = copy_of(state)
        row, _ = insert(op, s, reading, init)
        assert row == [*range(7), *[-2] * 13]
        assert (int(s.num_rows), int(s.num_refused)) == (7, 13)


def test_refused_ids_leave_no_trace_and_are_taken_after_growth():
    state, init = empty_table([0], max_rows=64)
    state.num_slots.fill_(8)
    state.slots[:8] = -1
    reading = reading_of([[[i] for i in range(20)]], [0])
    insert(OPS["kernel"], state, reading, init)
    grow_(state, 64)
    assert find_with(FINDS["kernel"], state, reading) == [*range(7), *[-1] * 13]
    assert insert(OPS["kernel"], state, reading, init)[0] == list(range(20))


def test_many_ids_on_one_two_and_five_threads():
    """Enough ids for several blocks per thread; equal bytes whatever the thread count."""
    rng = random.Random(0)
    vocabularies = [v % 5 for v in range(7)]
    ids = [*EXTREMES, *(rng.getrandbits(64) - 2**63 for _ in range(3000))]
    batches = [random_lists(rng, lookups=7, samples=400, longest=3, ids=ids) for _ in range(2)]
    stream = Stream(vocabularies, batches, 5)
    tables, rows = {}, {}
    oracle = DictTable()
    expected = [oracle.insert(r) for r in stream.readings()]
    for threads in (1, 2, 5):
        tables[threads], init = empty_table(vocabularies, max_rows=16384)
        rows[threads] = [
            on_threads(threads, insert, OPS["kernel"], tables[threads], r, init) for r in stream.readings()
        ]
        assert rows[threads] == expected
    for one, *others in zip(*map(tree_leaves, tables.values()), strict=True):
        assert all(torch.equal(one, other) for other in others)


@given(stream=streams(max_batches=1))
@settings(max_examples=30, deadline=None)
def test_new_rows_start_with_zero_moments_whatever_the_memory_held(stream):
    for op in OPS.values():
        state, init = empty_table(stream.vocabularies, max_rows=64)
        state.rows.fill_(9.0)
        state.seen.fill_((1 << 32) | 3)  # what an evicted row might leave
        insert(op, state, stream.readings()[0], init)
        new = state.rows[: int(state.num_rows)]
        assert not new[:, 1:].any()
        assert (new[:, 0] < 1.5).all()
        assert torch.equal(state.rows[int(state.num_rows) :], torch.full_like(state.rows[int(state.num_rows) :], 9.0))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    state, init = empty_table([0, 1], max_rows=64)
    reading = reading_of([[[1, 2], []], [[1], [3, 3]]], [0, 1], spare=1)
    torch.library.opcheck(find_or_insert.find_or_insert_, arguments(state, reading, init))
    torch.library.opcheck(find.find, (state.slots, state.ids, state.num_slots, state.salt, *reading))
