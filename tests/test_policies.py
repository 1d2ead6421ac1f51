"""Admission and eviction: the table's life against a dict with the same rules written out."""

import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx import policies
from recfx.capture import capture, capture_evaluation
from recfx.policies import Life
from recfx.table import delete_, is_sweep_due, num_live, stats, sweep_, table
from recfx.train import TrainConfig, train
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
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
        {"expire": policies.created_before(4)},
        {"expire": lambda d, key: d.step - d.first[key] >= 4},
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
    stream=streams(6), ends=st.lists(st.booleans(), min_size=6, max_size=6), every=st.sampled_from([1, 2, 3, 100]),
    max_rows=st.sampled_from([3, 9, 200]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_life_is_the_dict_with_its_rules(name, stream, ends, every, max_rows):
    """Any cut into steps and micro-batches; ends[i]: a step ends after batch i."""
    rules, same_rules = PAIRS[name]
    life, oracle = Life(**rules, every=every), DictLife(**same_rules, every=every, max_rows=max_rows)
    t = table(table_plan(stream.vocabularies), optimizer_slots=2, seed=1, max_rows=max_rows, life=life)
    state, number = t.init(), 0
    for lists, reading, end in zip(stream.batches, stream.readings(), ends, strict=False):
        state, found = t.insert_(state, features_of(lists, spare=stream.spare))
        assert (found.row.tolist(), found.inverse.tolist()) == oracle.take(reading)
        if end:
            number += 1
            state = finish(t, state, life, number)
            oracle.finish()
            check_same(state, oracle)


@pytest.mark.parametrize("name", ["all", "with_probability"])
def test_pure_is_in_place(name):
    life = Life(**PAIRS[name][0], every=1)
    t = table(table_plan(VOCABULARIES), optimizer_slots=2, seed=1, max_rows=64, life=life)
    a, b = t.init(), t.init()
    rng = random.Random(0)
    for number in range(1, 6):
        lists = random_lists(rng, lookups=3, samples=5, longest=3, ids=range(12))
        (a, x), (b, y) = t.insert(a, features_of(lists)), t.insert_(b, features_of(lists))
        assert torch.equal(x.row, y.row)
        assert torch.equal(t.count_steps(a, torch.tensor(True)).counts, t.count_steps_(b, torch.tensor(True)).counts)
        a, b = finish(t, a, life, number), b
        b.num_unique.zero_()
        b.step.add_(1)
        sweep_(b, life)
        assert torch.equal(a.candidates.counts, b.candidates.counts)
        assert torch.equal(a.free_rows, b.free_rows)


def test_how_an_accumulation_window_is_cut_changes_no_row():
    rng = random.Random(1)
    life = Life(admit=policies.at_least(3), expire=policies.unseen_for(2), every=1)
    t = table(table_plan(VOCABULARIES), optimizer_slots=2, seed=1, max_rows=64, life=life)
    whole, cut = t.init(), t.init()
    for number in range(1, 8):
        lists = random_lists(rng, lookups=3, samples=6, longest=3, ids=range(15))
        whole, _ = t.insert_(whole, features_of(lists))
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            cut, _ = t.insert_(cut, features_of([lookup[part] for lookup in lists]))
        whole, cut = finish(t, whole, life, number), finish(t, cut, life, number)
        for name in ("ids", "vocabularies", "seen", "born", "counts", "rows", "free_rows", "tally"):
            assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    assert int(whole.tally[2]) > 0


def test_an_evicted_id_waits_for_admission_again():
    life = Life(admit=policies.at_least(2), expire=policies.unseen_for(1), every=1)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, max_rows=64, life=life)
    state = t.init()
    admitted = []
    for number, ids in enumerate([[5], [5], [9], [5], [5]], start=1):
        state, found = t.insert_(state, features_of([[ids]]))
        admitted.append(found.row.tolist()[0] >= 0)
        state = finish(t, state, life, number)
    assert admitted == [False, True, False, False, True]
    assert stats(state).evicted == 1


def test_candidates_are_forgotten_when_more_than_half_full():
    life = Life(admit=policies.at_least(2), candidates=6, every=1)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, max_rows=64, life=life)
    state, held = t.init(), []
    for number, ids in enumerate([[1, 2, 3], [4], [1]], start=1):
        state, _ = t.insert_(state, features_of([[ids]]))
        state = finish(t, state, life, number)
        held.append(stats(state).candidates)
    assert held == [3, 0, 1]
    assert num_live(state) == 0


def test_rows_are_deleted_only_between_steps():
    t = table(table_plan([0]), optimizer_slots=2, seed=1, max_rows=8)
    state, _ = t.insert_(t.init(), features_of([[[1, 2]]]))
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
    ],
)
def test_a_policy_of_the_wrong_kind_is_named(name, policy, error):
    life = Life(**{name: policy}, keep=1 if name == "score" else None)
    t = table(table_plan([0]), optimizer_slots=2, seed=1, max_rows=8, life=life)

    def run():
        state, _ = t.insert_(t.init(), features_of([[[1, 2]]]))
        state.num_unique.zero_()
        sweep_(state, life)

    with pytest.raises(TypeError, match=error):
        run()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"keep": 5}, "keep: got 5 with score None, expected both or neither"),
        ({"score": policies.least_recently_used}, "keep: got None with score"),
        ({"score": policies.least_recently_used, "keep": -1}, "keep: got -1, expected at least 0"),
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"candidates": -1}, "candidates: got -1, expected 0 to"),
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


# In a step and in the loop.

LIFE = Life(
    admit=policies.at_least(2), candidates=1000, expire=policies.unseen_for(3), score=policies.least_recently_used,
    keep=40, every=2,
)  # fmt: skip


def equal_tables(a, b):
    for name in ("ids", "vocabularies", "born", "counts", "num_rows", "num_free", "tally", "num_refused", "step"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.free_rows[: int(a.num_free)], b.free_rows[: int(b.num_free)])
    torch.testing.assert_close(a.rows, b.rows, rtol=1e-4, atol=1e-6)


def test_captured_pure_and_in_place_steps_live_alike():
    step = deepfm_step(life=LIFE, max_rows=60)
    batches = deepfm_batches(8)
    captured, in_place, pure = (step.init(deepfm_params()) for _ in range(3))
    run = capture(step, captured, batches[0])
    for number, batch in enumerate(batches, start=1):
        captured, _ = run(captured, batch)
        in_place, _ = step.update_(in_place, batch)
        pure, _ = step.update(pure, batch)
        for state in (captured, in_place, pure):
            assert step.sweep_(state, number) is state
        equal_tables(captured.tables[0], in_place.tables[0])
        equal_tables(pure.tables[0], in_place.tables[0])
    seen = stats(captured.tables[0])
    assert seen.evicted > 0
    assert seen.unadmitted > 0
    assert seen.size == seen.admitted - seen.evicted


def test_evaluation_admits_evicts_and_counts_nothing():
    step = deepfm_step(life=LIFE, max_rows=60)
    batches = deepfm_batches(4)
    state = step.init(deepfm_params())
    for batch in batches[:3]:
        state, _ = step.update_(state, batch)
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(state.tables)]
    run = capture_evaluation(step, state, batches[3])
    for _ in range(10):
        state, _ = run(state, batches[3])
    after = torch.utils._pytree.tree_leaves(state.tables)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


class Batches:
    """A reader of batches at hand."""

    def __init__(self, batches, first=0):
        self.batches, self.position, self.first = batches, None, first

    def start_at(self, position):
        return Batches(self.batches, position["next"])

    def epoch(self, number):
        return Batches(self.batches)

    def __iter__(self):
        return self

    def __next__(self):
        if self.first == len(self.batches):
            raise StopIteration
        self.first += 1
        self.position = {"next": self.first}
        return self.batches[self.first - 1]

    def close(self):
        pass


def test_the_loop_sweeps_after_the_steps_that_every_divides(tmp_path):
    step, batches = deepfm_step(life=LIFE, max_rows=60), deepfm_batches(7)
    state, by_hand = step.init(deepfm_params()), step.init(deepfm_params())
    config = TrainConfig(output_dir=str(tmp_path), log_steps=100, save_steps=100)
    state, _ = train(step, step.update_, state, Batches(batches), config)
    for number, batch in enumerate(batches, start=1):
        by_hand, _ = step.update_(by_hand, batch)
        if number in (2, 4, 6):
            sweep_(by_hand.tables[0], LIFE)
    equal_tables(state.tables[0], by_hand.tables[0])
    assert torch.equal(state.tables[0].rows, by_hand.tables[0].rows)
    assert stats(state.tables[0]).evicted > 0


def test_interrupted_and_resumed_life_goes_on_to_the_same_bytes(tmp_path):
    step, batches = deepfm_step(life=LIFE, max_rows=60), deepfm_batches(9)
    whole = step.init(deepfm_params())
    for number, batch in enumerate(batches, start=1):
        whole, _ = step.update_(whole, batch)
        step.sweep_(whole, number)
    for steps in (5, None):
        config = TrainConfig(output_dir=str(tmp_path), log_steps=100, save_steps=100, train_steps=steps)
        resumed, _ = train(step, step.update_, step.init(deepfm_params()), Batches(batches), config, resume=True)
    a, b = whole.tables[0], resumed.tables[0]
    equal_tables(a, b)
    assert torch.equal(a.rows, b.rows)
    num = int(a.candidates.num)
    assert num > 0
    for name in ("ids", "vocabularies", "counts"):
        assert torch.equal(getattr(a.candidates, name)[:num], getattr(b.candidates, name)[: int(b.candidates.num)]), (
            name
        )


def test_at_cap_a_table_refuses_or_stops():
    refuses, stops = (deepfm_step(life=Life(at_cap=what), max_rows=4) for what in ("refuse", "stop"))
    for step in (refuses, stops):
        state, _ = step.update_(step.init(deepfm_params()), deepfm_batches(1)[0])
        assert int(state.tables[0].num_refused) > 0
        if step is refuses:
            step.sweep_(state, 1)
        else:
            with pytest.raises(RuntimeError, match=r"table 0: got \d+ ids without room, expected none. Its cap is 4"):
                step.sweep_(state, 1)


def test_at_cap_a_table_evicts_before_the_next_step(tmp_path):
    """In the loop, far from the steps at which it sweeps: after a step that filled it there is room again."""
    life = Life(score=policies.least_recently_used, keep=30, every=1000, at_cap="evict")
    step, batches, sizes = deepfm_step(life=life, max_rows=60), deepfm_batches(12, ids=tuple(range(150))), []

    def look(event, progress, state):
        if event == "after_step":
            sizes.append(num_live(state.tables[0]))

    config = TrainConfig(output_dir=str(tmp_path), log_steps=100, save_steps=100)
    state, _ = train(step, step.update_, step.init(deepfm_params()), Batches(batches), config, on_event=look)
    assert max(sizes) < 60
    assert sizes.count(30) >= 2
    assert stats(state.tables[0]).evicted >= 60


def test_a_table_cannot_evict_at_its_cap_and_keep_as_much():
    life = Life(score=policies.least_recently_used, keep=60, at_cap="evict")
    with pytest.raises(ValueError, match="keep: got 60, expected less than the cap, 60 rows"):
        deepfm_step(life=life, max_rows=60)


def test_max_bytes_is_the_most_memory_that_a_table_takes():
    plan = table_plan([0])
    for max_bytes in (10_000, 123_456, 10**7):
        state = table(plan, optimizer_slots=2, seed=1, max_bytes=max_bytes).init()
        rows = state.ids.numel()
        kept = state.ids, state.vocabularies, state.seen, state.born, state.counts, state.free_rows, state.slots
        taken = sum(t.numel() * t.element_size() for t in kept) + rows * state.rows.stride(0) * 4
        assert taken <= max_bytes
        assert taken > 0.6 * max_bytes  # the index doubles
    with pytest.raises(ValueError, match=r"max_bytes: got 100, expected at least \d+, the bytes of one row"):
        table(plan, optimizer_slots=2, seed=1, max_bytes=100)
    assert table(plan, optimizer_slots=2, seed=1, max_bytes=10**9, max_rows=5).init().ids.numel() == 5
