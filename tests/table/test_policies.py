"""Admission and eviction: the table's life against a dict with the same rules written out."""

import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from recfx.table import Limits, copy_of, delete_, is_sweep_due, num_live, policies, stats, sweep_, table
from recfx.table.policies import Life
from tests.by_definition import by_definition
from tests.reference import (
    DictTable,
    features_of,
    mix,
    positions,
    random_lists,
    streams,
    table_plan,
)

VOCABULARIES = [0, 1, 0]


class DictLife(DictTable):
    """What a `Life` does, key by key. `admit`, `expire` and `score` take one key's numbers."""

    def __init__(self, *, admit=None, expire=None, score=None, keep=None, every=1, max_rows=2**31, evicts=False):
        super().__init__(max_rows)
        self.evicts = evicts
        self.admit, self.expire, self.score, self.keep, self.every = admit, expire, score, keep, every
        self.step = 0
        self.last: dict[tuple[int, int], int] = {}
        self.first: dict[tuple[int, int], int] = {}
        self.steps: dict[tuple[int, int], int] = {}
        self.occurred: dict[tuple[int, int], int] = {}

    def take(self, reading):
        """One micro-batch of the step in progress."""
        admits = [False] * reading.id.numel()
        new: set[tuple[int, int]] = set()
        for _, l, p in positions(reading):
            key = int(reading.vocabularies[l]), int(reading.id[p])
            if key in self.rows or key in new:
                admits[p] = True
                continue
            self.occurred[key] = self.occurred.get(key, 0) + 1
            admits[p] = self.admit is None or self.admit(self.occurred[key], key)
            if admits[p] and len(self.rows) + len(new) < self.max_rows:
                new.add(key)
        out = self.insert(reading, admits)
        for key in new:
            self.first[key], self.steps[key] = self.step + 1, 0
        return out

    def finish(self):
        self.step += 1
        for key, row in self.rows.items():
            if row in self.unique:
                self.last[key] = self.step
                self.steps[key] += 1
        self.next_step()
        if self.step % self.every == 0 or (self.evicts and len(self.rows) == self.max_rows):
            self.sweep()

    def sweep(self):
        gone = [key for key in self.rows if self.expire and self.expire(self, key)]
        if self.score:
            left = sorted((self.score(self, key), row, key) for key, row in self.rows.items() if key not in gone)
            gone += [key for *_, key in left[: max(len(left) - self.keep, 0)]]
        self.evict(gone)
        for key in gone:
            self.occurred.pop(key, None)


def finish(t, state, life, number):
    """The end of an optimiser step without an optimiser."""
    state = t.count_steps_(state, torch.tensor(True))
    state.num_unique.zero_()
    state.step.add_(1)
    return sweep_(state, life) if is_sweep_due(state, life, number) else state


def check_same(state, oracle):
    n = int(state.num_rows)
    keys = list(zip(state.vocabularies[:n].tolist(), state.ids[:n].tolist(), strict=True))
    assert [key if key[0] >= 0 else None for key in keys] == oracle.keys()
    assert state.free_rows[: int(state.num_free)].tolist() == sorted(oracle.freed, reverse=True)
    assert (state.tally.tolist(), int(state.num_refused)) == (oracle.tally(), oracle.num_refused)
    got, num = stats(state), oracle.num_looked_up
    assert got.hit_rate == pytest.approx(oracle.num_hits / num if num else math.nan, nan_ok=True)
    assert (got.size, got.refused, got.evicted) == (len(oracle.rows), oracle.num_refused, oracle.num_evicted)
    assert (got.admitted, got.unadmitted) == (oracle.num_created, oracle.num_unadmitted)
    for key, row in oracle.rows.items():
        assert int(state.seen[row] >> 32) == oracle.last[key]
        assert (int(state.born[row]), int(state.counts[row])) == (oracle.first[key], oracle.steps[key])
    for row in oracle.freed:
        assert not state.rows[row].any()
        assert not state.seen[row]


PAIRS = {
    "unseen_for": (
        {"expire": policies.unseen_for(3)},
        {"expire": lambda d, key: d.step - d.last[key] >= 3},
    ),
    "created_before": (
        {"expire": policies.created_before(2)},
        {"expire": lambda d, key: d.step - d.first[key] >= 2},
    ),
    "least_recently_used": (
        {"score": policies.least_recently_used, "keep": 7},
        {"score": lambda d, key: d.last[key], "keep": 7},
    ),
    "least_frequently_used": (
        {"score": policies.least_frequently_used, "keep": 5},
        {"score": lambda d, key: (d.steps[key], d.last[key]), "keep": 5},
    ),
    "both": (
        {"expire": policies.unseen_for(2), "score": lambda columns, step: columns.id % 3, "keep": 4},
        {"expire": lambda d, key: d.step - d.last[key] >= 2, "score": lambda d, key: key[1] % 3, "keep": 4},
    ),
    "evict at the cap": (
        {"score": policies.least_recently_used, "keep": 2, "at_cap": "evict"},
        {"score": lambda d, key: d.last[key], "keep": 2, "evicts": True},
    ),
    "at_least": ({"admit": policies.at_least(3)}, {"admit": lambda count, key: count >= 3}),
    "with_probability": (
        {"admit": policies.with_probability(0.4, seed=9)},
        {"admit": lambda count, key: probability(9, key, count) < 0.4},
    ),
    "read_only": ({"admit": policies.read_only, "candidates": 0}, {"admit": lambda count, key: False}),
    "all": (
        {
            "admit": policies.at_least(2),
            "expire": policies.unseen_for(2),
            "score": policies.least_frequently_used,
            "keep": 6,
        },
        {
            "admit": lambda count, key: count >= 2,
            "expire": lambda d, key: d.step - d.last[key] >= 2,
            "score": lambda d, key: (d.steps[key], d.last[key]),
            "keep": 6,
        },
    ),
}


def probability(seed, key, count):
    golden, low = 0x9E3779B97F4A7C15, 2**64 - 1
    first = mix(key[1] + (key[0] + 1) * golden & low) ^ seed
    return (mix(mix(first) + count * golden & low) >> 11) / 2**53


@pytest.mark.parametrize("name", PAIRS)
@given(
    stream=streams(8), ends=st.lists(st.sampled_from([True, True, False]), min_size=8, max_size=8),
    every=st.sampled_from([1, 2, 3, 100]), max_rows=st.sampled_from([3, 9, 200]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_life_is_the_dict_with_its_rules(name, stream, ends, every, max_rows):
    """Any cut into steps and micro-batches; ends[i]: a step ends after batch i."""
    rules, same_rules = PAIRS[name]
    life, oracle = Life(**rules, every=every), DictLife(**same_rules, every=every, max_rows=max_rows)
    t = table(table_plan(stream.vocabularies), optimizer_slots=2, seed=1, limits=Limits(max_rows=max_rows), life=life)
    state, number = t.init(), 0
    for lists, reading, end in zip(stream.batches, stream.readings(), ends, strict=False):
        found = t.insert_(state, t.read(features_of(lists, spare=stream.spare)))
        assert (found.row.tolist(), found.inverse.tolist()) == oracle.take(reading)
        if end:
            number += 1
            state = finish(t, state, life, number)
            oracle.finish()
            check_same(state, oracle)


@pytest.mark.parametrize("name", ["all", "with_probability"])
def test_pure_is_in_place(name):
    life = Life(**PAIRS[name][0], every=1)
    t = table(table_plan(VOCABULARIES), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=life)
    a, b = t.init(), t.init()
    rng = random.Random(0)
    for number in range(1, 6):
        lists = random_lists(rng, lookups=3, samples=5, longest=3, ids=range(12))
        reading = t.read(features_of(lists))
        (a, x), y = by_definition(t.insert_, a, reading), t.insert_(b, reading)
        assert torch.equal(x.row, y.row)
        counted, _ = by_definition(t.count_steps_, a, torch.tensor(True))
        assert torch.equal(counted.counts, t.count_steps_(b, torch.tensor(True)).counts)
        a, b = finish(t, a, life, number), b
        b.num_unique.zero_()
        b.step.add_(1)
        sweep_(b, life)
        assert torch.equal(a.candidates.counts, b.candidates.counts)
        assert torch.equal(a.free_rows, b.free_rows)


def test_how_an_accumulation_window_is_cut_changes_no_row():
    rng = random.Random(1)
    life = Life(admit=policies.at_least(3), expire=policies.unseen_for(2), every=1)
    t = table(table_plan(VOCABULARIES), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=life)
    whole, cut = t.init(), t.init()
    for number in range(1, 8):
        lists = random_lists(rng, lookups=3, samples=6, longest=3, ids=range(15))
        t.insert_(whole, t.read(features_of(lists)))
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            t.insert_(cut, t.read(features_of([lookup[part] for lookup in lists])))
        whole, cut = finish(t, whole, life, number), finish(t, cut, life, number)
        for name in ("ids", "vocabularies", "seen", "born", "counts", "rows", "free_rows", "tally"):
            assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    assert int(whole.tally[2]) > 0


@pytest.mark.parametrize(
    ("expire", "touched", "every", "gone_after"),
    [
        (policies.unseen_for(1), [1], 1, 2),
        (policies.unseen_for(3), [1, 2], 1, 5),
        (policies.unseen_for(3), [1, 2], 4, 8),
        (policies.created_before(1), [1], 1, 2),
        (policies.created_before(3), [1, 2, 3], 1, 4),
        (policies.created_before(3), [2, 3, 4], 3, 6),
        (policies.created_before(3), [3], 3, 6),
    ],
)
def test_the_step_after_which_a_row_goes(expire, touched, every, gone_after):
    life = Life(expire=expire, every=every)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=8), life=life)
    state, there = t.init(), []
    for number in range(1, 10):
        t.insert_(state, t.read(features_of([[[7] if number in touched else []]])))
        state = finish(t, state, life, number)
        there.append(num_live(state) == 1)
    assert there == [touched[0] <= number < gone_after for number in range(1, 10)]


def test_an_evicted_id_waits_for_admission_again():
    life = Life(admit=policies.at_least(2), expire=policies.unseen_for(1), every=1)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=life)
    state = t.init()
    admitted = []
    for number, ids in enumerate([[5], [5], [9], [5], [5]], start=1):
        found = t.insert_(state, t.read(features_of([[ids]])))
        admitted.append(found.row.tolist()[0] >= 0)
        state = finish(t, state, life, number)
    assert admitted == [False, True, False, False, True]
    assert stats(state).evicted == 1


def test_what_expires_counts_among_what_goes():
    """Down to `keep` rows, no further: what `expire` deletes leaves room for the rest."""
    life = Life(expire=policies.unseen_for(2), score=policies.least_recently_used, keep=3, every=3)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=life)
    state = t.init()
    for number, ids in enumerate([[1, 2, 3], [4], [5, 6]], start=1):
        t.insert_(state, t.read(features_of([[ids]])))
        state = finish(t, state, life, number)
    live = state.vocabularies[:6] >= 0
    assert state.ids[:6][live].tolist() == [4, 5, 6]


def test_candidates_are_forgotten_when_more_than_half_full():
    life = Life(admit=policies.at_least(2), candidates=6, every=1)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=life)
    state, held = t.init(), []
    for number, ids in enumerate([[1, 2, 3], [4], [1]], start=1):
        t.insert_(state, t.read(features_of([[ids]])))
        state = finish(t, state, life, number)
        held.append(stats(state).candidates)
    assert held == [3, 0, 1]
    assert num_live(state) == 0


def test_rows_are_deleted_only_between_steps():
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=8))
    state = t.init()
    t.insert_(state, t.read(features_of([[[1, 2]]])))
    with pytest.raises(ValueError, match="state: got a step in progress, expected none"):
        delete_(state, torch.tensor([0]))


@pytest.mark.parametrize(
    ("name", "policy", "error"),
    [
        (
            "expire",
            lambda columns, step: columns.last_step,
            r"expire: got torch.int64 \[2\], expected torch.bool \[2\]",
        ),
        ("expire", lambda columns, step: True, "expire: got bool, expected torch.bool"),
        ("score", lambda columns, step: columns.weight[:, 0], "score: got torch.float32"),
        ("admit", lambda count, *_: count, r"admit: got torch.int32 \[2\], expected torch.bool \[2\]"),
        ("admit", lambda count, *_: (count > 1)[:1], r"admit: got torch.bool \[1\], expected torch.bool \[2\]"),
        ("admit", lambda *_: True, "admit: got bool, expected torch.bool"),
        ("admit", lambda count, *_: torch.ones(2, dtype=torch.bool), r"admit: got .* \[2\], expected torch.bool \[3\]"),
    ],
)
def test_a_policy_of_the_wrong_kind_is_named(name, policy, error):
    life = Life(**{name: policy}, keep=1 if name == "score" else None)

    def run():
        t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=8), life=life)
        state = t.init()
        t.insert_(state, t.read(features_of([[[1, 2, 3] if name == "admit" else [1, 2]]])))
        state.num_unique.zero_()
        sweep_(state, life)

    with pytest.raises(TypeError, match=error):
        run()


@pytest.mark.parametrize("name", ["expire", "score"])
def test_a_policy_that_raises_deletes_nothing(name):
    rules = {"expire": lambda columns, step: columns.id > 0, "score": policies.least_recently_used}
    life = Life(**rules | {name: lambda columns, step: columns.id[99]}, keep=1, every=1)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=8), life=life)
    state = t.init()
    t.insert_(state, t.read(features_of([[[1, 2, 3]]])))
    state.num_unique.zero_()
    before = copy_of(state)
    with pytest.raises(IndexError):
        sweep_(state, life)
    assert all(map(torch.equal, tree_leaves(state), tree_leaves(before)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"keep": 5}, "keep: got 5 with score None, expected both or neither"),
        ({"score": policies.least_recently_used}, "keep: got None with score"),
        ({"score": policies.least_recently_used, "keep": -1}, "keep: got -1, expected at least 0"),
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"candidates": -1}, "candidates: got -1, expected at least 0"),
        ({"at_cap": "explode"}, "at_cap: got 'explode', expected 'refuse', 'evict' or 'stop'"),
        ({"at_cap": "evict"}, "score: got None with at_cap='evict', expected a function"),
    ],
)
def test_wrong_settings_are_named(arguments, error):
    with pytest.raises(ValueError, match=error):
        Life(**arguments)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: policies.at_least(0), "n: got 0, expected at least 1"),
        (lambda: policies.with_probability(1.5, seed=0), "p: got 1.5, expected 0 to 1"),
        (lambda: policies.unseen_for(0), "steps: got 0, expected at least 1"),
        (lambda: policies.created_before(-2), "steps: got -2, expected at least 1"),
        (lambda: policies.with_probability(math.nan, seed=0), "p: got nan, expected 0 to 1"),
        (lambda: policies.with_probability(0.5, seed=2**63), f"seed: got {2**63}, expected 64 bits"),
    ],
)
def test_wrong_numbers_of_policies_are_named(make, error):
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 1.5}, "every: got 1.5, expected an int"),
        ({"every": None}, "every: got None, expected an int"),
        ({"every": "x"}, "every: got 'x', expected an int"),
        ({"candidates": 0.5}, "candidates: got 0.5, expected an int"),
        ({"score": policies.least_recently_used, "keep": 1.5}, "keep: got 1.5, expected an int"),
        ({"expire": 5}, "expire: got 5, expected a function"),
    ],
)
def test_a_life_of_other_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        Life(**arguments)


@pytest.mark.parametrize("wrong", [1.5, "1", True, None, torch.tensor(1)])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (policies.at_least, "n"),
        (policies.unseen_for, "steps"),
        (policies.created_before, "steps"),
        (lambda seed: policies.with_probability(0.5, seed=seed), "seed"),
    ],
)
def test_what_is_no_int_is_named(make, name, wrong):
    with pytest.raises(TypeError, match=rf"{name}: got {re.escape(repr(wrong))}, expected an int"):
        make(wrong)


@pytest.mark.parametrize("wrong", ["1", True, None, torch.tensor(0.5)])
def test_a_probability_that_is_no_number_is_named(wrong):
    with pytest.raises(TypeError, match=rf"p: got {re.escape(repr(wrong))}, expected a float"):
        policies.with_probability(wrong, seed=0)


def test_with_probability_admits_its_share():
    admit = policies.with_probability(0.3, seed=1)
    id = torch.arange(100_000)
    share = admit(torch.ones(100_000), id.long(), torch.zeros(100_000).int(), None).double().mean()
    assert abs(float(share) - 0.3) < 5 * (0.21 / 100_000) ** 0.5
    assert (
        admit(torch.ones(1000).int(), id[:1000], torch.zeros(1000).int(), None)
        .ne(policies.with_probability(0.3, seed=2)(torch.ones(1000).int(), id[:1000], torch.zeros(1000).int(), None))
        .any()
    )
