"""count_rows_ and count_candidates_."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.index import count_candidates, hashing
from recfx.kernels.rows import count_rows
from recfx.table import Limits, TableState, table
from recfx.table.policies import Life, at_least
from tests.reference import DictTable, Reading, features_of, positions, streams, table_plan

COUNTS = {"definition": count_candidates.definition, "kernel": count_candidates.count_candidates_}


@pytest.mark.parametrize("op", [count_rows.definition, count_rows.count_rows_], ids=["definition", "kernel"])
@given(
    rows=st.lists(st.integers(0, 19), unique=True),
    spare=st.integers(0, 3),
    due=st.booleans(),
    threads=st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_each_touched_row_counts_once_if_due(op, rows, spare, due, threads):
    torch.set_num_threads(threads)
    counts, unique_rows = torch.arange(20, dtype=torch.int32), torch.tensor(rows + [3] * spare, dtype=torch.int32)
    op(counts, torch.tensor(len(rows)), unique_rows, torch.tensor(due))
    assert counts.tolist() == [i + (due and i in rows) for i in range(20)]


def arguments(s: TableState, r: Reading) -> tuple:
    return (*s.candidates, s.slots, s.ids, s.num_slots, s.salt, *r)


@given(stream=streams(4), known=st.integers(0, 3), max_candidates=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_candidates_are_counted_as_a_dict_counts(stream, known, max_candidates):
    """Ids of the first `known` batches have rows and are not counted; a full store counts further ids as seen once."""
    life = Life(admit=at_least(2), candidates=max_candidates)
    t = table(table_plan(stream.vocabularies), optimizer_slots=2, seed=1, limits=Limits(max_rows=256))
    empty = table(
        table_plan(stream.vocabularies), optimizer_slots=2, seed=1, limits=Limits(max_rows=256), life=life
    ).init()
    oracle, state = DictTable(), t.init()
    for lists, reading in list(zip(stream.batches, stream.readings(), strict=True))[:known]:
        t.insert_(state, t.read(features_of(lists)))
        oracle.insert(reading)
    stores = {
        name: state._replace(candidates=type(empty.candidates)(*(c.clone() for c in empty.candidates)))
        for name in COUNTS
    }
    candidates: dict[tuple[int, int], int] = {}
    for reading in stream.readings():
        expected = [0] * reading.id.numel()
        for _, l, p in positions(reading):
            key = int(reading.vocabularies[l]), int(reading.id[p])
            if key in oracle.rows:
                continue
            if key in candidates or len(candidates) < min(max_candidates, int(empty.candidates.num_slots) // 8 * 7):
                candidates[key] = candidates.get(key, 0) + 1
            expected[p] = candidates.get(key, 1)
        for name, op in COUNTS.items():
            assert op(*arguments(stores[name], reading)).tolist() == expected
    for s in stores.values():
        num = int(s.candidates.num)
        keys = zip(s.candidates.vocabularies[:num].tolist(), s.candidates.ids[:num].tolist(), strict=True)
        assert dict(zip(keys, s.candidates.counts[:num].tolist(), strict=True)) == candidates
        used = s.candidates.slots[: int(s.candidates.num_slots)]
        assert sorted((used[used != hashing.EMPTY] & 0xFFFFFFFF).tolist()) == list(range(num))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    life = Life(admit=at_least(2), candidates=10)
    state = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=16), life=life).init()
    reading = Reading(torch.tensor([5, 5, 0]), torch.tensor([0, 1, -1]).int(), torch.tensor([0]).int())
    torch.library.opcheck(count_candidates.count_candidates_, arguments(state, reading))
    rows = torch.zeros(4, dtype=torch.int32), torch.tensor(2), torch.tensor([3, 1, 0]).int(), torch.tensor(True)
    torch.library.opcheck(count_rows.count_rows_, rows)
