import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch.utils._pytree import tree_leaves

from recfx.table import Limits, copy_of, num_rows_bytes, rebuild_, reserve, table
from recfx.table import functions as table_module
from recfx.types import Ragged
from tests.by_definition import by_definition
from tests.reference import (
    EXTREMES,
    MAX_INT64,
    MIN_INT64,
    DictTable,
    assert_same_table,
    features_of,
    random_lists,
    reading_of,
    streams,
    table_plan,
)

VOCABULARIES = [0, 1, 0, 2]  # two lookups read one vocabulary


def make(vocabularies=VOCABULARIES, *, max_rows=4096, max_unique=None, seed=1, unknown="zeros"):
    plan = table_plan(vocabularies, unknown=unknown)
    return table(plan, optimizer_slots=2, seed=seed, limits=Limits(max_rows=max_rows, max_unique=max_unique))


def ids_in(lists):
    return sum(len(ids) for lookup in lists for ids in lookup)


def finish_step(state):
    state.num_unique.zero_()
    state.step.add_(1)


def random_stream(seed, *, batches=12, samples=20):
    rng = random.Random(seed)
    ids = [*EXTREMES, *range(-50, 50), *(rng.randint(MIN_INT64, MAX_INT64) for _ in range(300))]
    return [random_lists(rng, lookups=len(VOCABULARIES), samples=samples, longest=3, ids=ids) for _ in range(batches)]


@pytest.mark.parametrize("seed", range(3))
def test_growth_in_mid_stream_is_a_table_that_started_large_is_a_dict(seed, monkeypatch):
    t, oracle = make(), DictTable()
    large = t.init()
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)
    small = t.init()
    sizes = set()
    for lists in random_stream(seed):
        reading, features = reading_of(lists, VOCABULARIES), features_of(lists)
        t.grow_(small, ids_in(lists))
        sizes.add(int(small.num_slots))
        found = t.insert_(small, t.read(features))
        same = t.insert_(large, t.read(features))
        assert (found.row.tolist(), found.inverse.tolist()) == oracle.insert(reading)
        assert torch.equal(found.row, same.row)
        assert torch.equal(found.inverse, same.inverse)
        assert_same_table(small, large)
        oracle.next_step()
        finish_step(small)
        finish_step(large)
    assert len(sizes) > 3
    assert int(small.num_slots) < int(large.num_slots) or int(large.num_slots) == large.slots.numel()
    assert int(small.num_refused) == 0
    assert t.find(small, t.read(features)).row.tolist() == oracle.find(reading)


@given(stream=streams(3))
@settings(max_examples=30, deadline=None)
def test_insert_is_insert_and_leaves_its_input(stream):
    t = make(stream.vocabularies, max_rows=64)
    pure, in_place = t.init(), t.init()
    for lists in stream.batches:
        features = features_of(lists, spare=stream.spare)
        before = copy_of(pure)
        new, a = by_definition(t.insert_, pure, t.read(features))
        assert all(torch.equal(x, y) for x, y in zip(*map(tree_leaves, (before, pure)), strict=True))
        pure = new
        b = t.insert_(in_place, t.read(features))
        assert torch.equal(a.row, b.row)
        assert torch.equal(a.inverse, b.inverse)
        assert_same_table(pure, in_place, exact_rows=False)


def test_find_and_pool_change_no_byte():
    t = make()
    state, lists = t.init(), random_stream(0, batches=1)[0]
    t.insert_(state, t.read(features_of(lists)))
    before = copy_of(state)
    unknown = [[[10**15 + b] for b in range(20)] for _ in VOCABULARIES]
    for read in (lists, unknown):
        blocks = t.pool(state, t.find(state, t.read(features_of(read))))
    assert not any(block.any() for block in blocks)
    assert all(torch.equal(x, y) for x, y in zip(*map(tree_leaves, (before, state)), strict=True))


def test_every_extreme_is_its_own_row_in_every_vocabulary():
    t = make([0, 1, 2])
    lists = [[list(EXTREMES)]] * 3
    state = t.init()
    found = t.insert_(state, t.read(features_of(lists)))
    assert found.row.tolist() == list(range(3 * len(EXTREMES)))
    assert t.find(state, t.read(features_of(lists))).row.tolist() == found.row.tolist()
    keys = zip(state.vocabularies[:30].tolist(), state.ids[:30].tolist(), strict=True)
    assert list(keys) == [(v, i) for v in range(3) for i in EXTREMES]
    weights = state.rows[: int(state.num_rows), 0]
    assert len(weights.unique(dim=0)) == len(weights)


@pytest.mark.parametrize("unknown", ["zeros", "initial"])
def test_hard_cap_refuses_and_counts_and_pools_the_unknown_value(unknown):
    capped, free = make([0], max_rows=5, unknown=unknown), make([0])
    features = features_of([[[i, i] for i in range(8)]])
    a = capped.init()
    found_a = capped.insert_(a, capped.read(features))
    capped.grow_(a, 100)
    b = free.init()
    found_b = free.insert_(b, free.read(features))
    assert found_a.row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, *[-2] * 6]
    assert (int(a.num_rows), int(a.num_refused), int(a.num_unique)) == (5, 6, 5)
    for x, y in zip(capped.pool(a, found_a), free.pool(b, found_b), strict=True):
        torch.testing.assert_close(x[:5], y[:5], rtol=1e-6, atol=0)
        torch.testing.assert_close(x[5:], y[5:] * (unknown == "initial"), rtol=1e-6, atol=0)
    grads = [torch.ones_like(block) for block in capped.pool(a, found_a)]
    assert capped.add_grads_(a, found_a, grads).grads[:5].eq(2).all()


def test_max_unique_refuses_gradients_and_counts():
    t = make([0], max_unique=3)
    features = features_of([[[i] for i in (5, 6, 5, 7, 8, 8)]])
    state = t.init()
    found = t.insert_(state, t.read(features))
    assert found.row.tolist() == [0, 1, 0, 2, 3, 3]
    assert found.inverse.tolist() == [0, 1, 0, 2, -1, -1]
    assert (int(state.num_rows), int(state.num_unique), int(state.num_refused)) == (4, 3, 2)


@given(stream=streams(1), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_add_grads_is_add_grads_(stream, seed):
    t = make(stream.vocabularies, max_rows=64)
    state = t.init()
    found = t.insert_(state, t.read(features_of(stream.batches[0], spare=stream.spare)))
    g = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(b.shape, generator=g) for b in t.pool(state, found)]
    pure, _ = by_definition(t.add_grads_, state, found, blocks)
    assert not state.grads.any()
    assert torch.equal(pure.grads, t.add_grads_(state, found, blocks).grads)


def test_rebuild_leaves_rows_and_answers_as_they_are():
    t = make()
    lists = random_stream(0, batches=1)[0]
    state = t.init()
    found = t.insert_(state, t.read(features_of(lists)))
    before = copy_of(state)
    state.slots.fill_(12345)
    rebuild_(state)
    assert torch.equal(t.find(state, t.read(features_of(lists))).row, found.row)
    assert_same_table(before, state)


def test_reserve_is_zeros_and_takes_memory_only_where_written():
    t = reserve((2**28, 4), torch.float32, torch.device("cpu"))  # 4 GB of address space
    assert t.shape == (2**28, 4)
    assert not t[:10].any()
    assert not t[-1].any()
    t[2**27] = 1
    assert t[2**27].tolist() == [1, 1, 1, 1]
    assert torch.equal(reserve((3, 0), torch.int64, torch.device("cpu")), torch.zeros(3, 0, dtype=torch.int64))


def test_a_device_without_the_memory_is_an_error_that_names_the_size(monkeypatch):
    def zeros(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(MemoryError, match=r"max_rows: could not reserve 64 bytes for a table tensor \[8\]"):
        reserve((8,), torch.int64, torch.device("meta"))


def test_num_rows_bytes():
    t = make([0])
    state = t.init()
    t.insert_(state, t.read(features_of([[[i] for i in range(10)]])))
    assert num_rows_bytes(state) == 10 * (8 + 4 + 8 + 4 + 3 * 4 * 4) + int(state.num_slots) * 8


@pytest.mark.parametrize("max_rows", [0, -1, 2**31])
def test_max_rows_out_of_range(max_rows):
    with pytest.raises(ValueError, match=rf"max_rows: got {max_rows}, expected 1 to 2\*\*31 - 1"):
        make(max_rows=max_rows)


@pytest.mark.parametrize("max_unique", [0, -3])
def test_max_unique_out_of_range(max_unique):
    with pytest.raises(ValueError, match=f"max_unique: got {max_unique}, expected"):
        make(max_unique=max_unique)


class TableMachine(RuleBasedStateMachine):
    """Any order of inserts, finds, growth, rebuilds and step ends agrees with the dict."""

    @initialize(max_rows=st.integers(1, 40), max_unique=st.integers(1, 20))
    def start(self, max_rows, max_unique):
        self.vocabularies = [0, 1, 0]
        self.table = make(self.vocabularies, max_rows=max_rows, max_unique=max_unique)
        self.state = self.table.init()
        self.oracle = DictTable(max_rows, min(max_rows, max_unique))

    lists = st.lists(
        st.lists(st.lists(st.sampled_from(EXTREMES) | st.integers(0, 30), max_size=3), min_size=2, max_size=2),
        min_size=3,
        max_size=3,
    )

    @rule(lists=lists, spare=st.integers(0, 2))
    def insert(self, lists, spare):
        self.state = self.table.grow_(self.state, ids_in(lists))
        found = self.table.insert_(self.state, self.table.read(features_of(lists, spare=spare)))
        expected = self.oracle.insert(reading_of(lists, self.vocabularies, spare=spare))
        assert (found.row.tolist(), found.inverse.tolist()) == expected
        assert int(self.state.num_refused) == self.oracle.num_refused
        assert int(self.state.num_rows) == len(self.oracle.rows)

    @rule(lists=lists)
    def find(self, lists):
        found = self.table.find(self.state, self.table.read(features_of(lists)))
        assert found.row.tolist() == self.oracle.find(reading_of(lists, self.vocabularies))
        assert (found.inverse == -1).all()

    @rule()
    def end_step(self):
        finish_step(self.state)
        self.oracle.next_step()

    @rule(num=st.integers(0, 200))
    def grow(self, num):
        self.table.grow_(self.state, num)

    @rule()
    def rebuild(self):
        rebuild_(self.state)


def test_any_order_of_operations_is_the_dict(monkeypatch):
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)
    run_state_machine_as_test(TableMachine, settings=settings(max_examples=60, stateful_step_count=15, deadline=None))


def test_ids_may_be_strided_and_wrong_dtypes_are_errors():
    plan = table_plan([0])
    subject = table(plan, optimizer_slots=2, seed=1, limits=Limits(max_rows=64))
    offsets = torch.arange(4, dtype=torch.int32)
    values = torch.tensor([5, 0, 6, 0, 5, 0])
    state = subject.init()
    found = subject.insert_(state, subject.read({"f0": Ragged(values[::2], offsets)}))
    assert found.row.tolist() == [0, 1, 0]
    with pytest.raises(TypeError, match=r"feature 'f0': got torch.int64 offsets, expected torch.int32"):
        subject.insert_(subject.init(), subject.read({"f0": Ragged(values, offsets.long())}))
    with pytest.raises(TypeError, match=r"feature 'f0': got torch.float32 ids, expected torch.int64"):
        subject.insert_(subject.init(), subject.read({"f0": Ragged(values.float(), offsets)}))
