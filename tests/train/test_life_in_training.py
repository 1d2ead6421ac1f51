"""Admission and eviction in a step and in the loop: captured, evaluated, interrupted, at the cap."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from recfx.capture import capture, capture_evaluation
from recfx.checkpoint import load, save
from recfx.kernels.index.find_or_insert import TALLIES
from recfx.table import ROW_FIELDS, Limits, num_live, policies, stats, sweep_, table
from recfx.table.policies import Life
from recfx.train import TrainConfig, evaluate, train
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
from tests.reference import on_threads, table_plan

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
    """Under policies that read tensors of their own."""
    needed, idle = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4])
    life = replace(
        LIFE,
        admit=lambda count, id, vocabulary, step: count >= needed[vocabulary.long()],
        expire=lambda columns, step: step - columns.last_step >= idle[columns.vocabulary.long()],
    )
    step = deepfm_step(life=life, max_rows=60)
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


@pytest.mark.parametrize(("answer", "got"), [(None, "NoneType"), (torch.ones(2), r"torch.float32 \[2\]")])
def test_an_admit_of_the_wrong_kind_is_named_before_it_is_captured(answer, got):
    with pytest.raises(TypeError, match=rf"admit: got {got}, expected torch.bool \[2\]"):
        deepfm_step(life=Life(admit=lambda count, id, vocabulary, step: answer))


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


def test_nothing_is_left_of_an_evicted_id():
    """Weights and moments are gone, evaluation gives zeros, and training meets it as an id it has never seen."""
    step = deepfm_step(life=Life(expire=policies.unseen_for(1), every=2))
    (gone,), (other,) = deepfm_batches(1, ids=(5, 6, 7)), deepfm_batches(1, ids=(900, 901))
    state, _ = step.update_(step.init(deepfm_params()), gone)
    table, num = state.tables[0], num_live(state.tables[0])
    assert table.rows[:num, 1:].ne(0).any((1, 2)).all()
    state, _ = step.update_(step.sweep_(state, 1), other)
    state = step.sweep_(state, 2)
    assert table.free_rows[:num].tolist() == [*range(num)][::-1]
    for column in (table.rows, table.seen, table.born, table.counts, table.ids):
        assert not column[:num].any()
    new = tree_map(torch.clone, state)._replace(tables=step.init(deepfm_params()).tables)
    new.tables[0].step.fill_(2)
    assert torch.equal(step.evaluate_(state, gone)[1].logit, step.evaluate_(new, gone)[1].logit)
    state, new = (on_threads(1, step.update_, s, gone)[0] for s in (state, new))
    for name in ROW_FIELDS:
        assert torch.equal(getattr(table, name)[:num], getattr(new.tables[0], name)[:num]), name


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
    held_out = {"evaluate_with": lambda s: evaluate(step.evaluate_, s, batches[:2])}  # which sweeps nothing
    state, _ = train(step, step.update_, state, Batches(batches), config, **held_out)
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


def test_what_was_refused_before_the_cap_was_raised_stops_nothing(tmp_path):
    """A run that refused goes on under a larger cap, as one that is to stop."""
    batches, small = deepfm_batches(2), deepfm_step(max_rows=8)
    state, _ = small.update_(small.init(deepfm_params()), batches[0])
    saved = save(tmp_path, small, state, number=1, loop={})
    for max_rows in (512, 9):
        step = deepfm_step(life=Life(at_cap="stop"), max_rows=max_rows)
        state, _ = step.update_(load(saved, step, step.init(deepfm_params()))[0], batches[1])
        if max_rows == 512:
            assert int(state.tables[0].num_refused) > 0
            step.sweep_(state, 2)
        else:
            with pytest.raises(RuntimeError, match=r"table 0: got \d+ ids without room, expected none. Its cap is 9"):
                step.sweep_(state, 2)


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


@pytest.mark.parametrize("max_unique", [None, 7])
@pytest.mark.parametrize("candidates", [None, 20])
def test_max_bytes_is_the_most_memory_that_a_table_takes(max_unique, candidates):
    """All of its tensors, but for the counters."""
    plan, life = table_plan([0]), candidates and Life(admit=policies.at_least(2), candidates=candidates)
    options = {"optimizer_slots": 2, "seed": 1, "life": life}
    for max_bytes in (10_000, 123_456, 10**7):
        leaves = tree_leaves(table(plan, **options, limits=Limits(max_bytes=max_bytes, max_unique=max_unique)).init())
        taken = sum(len(t) * t.stride(0) * t.element_size() for t in leaves if t.dim()) - 8 * TALLIES
        assert taken <= max_bytes
        assert taken > 0.6 * max_bytes  # the index doubles
    with pytest.raises(ValueError, match=r"max_bytes: got 100, expected at least \d+, the bytes of one row"):
        table(plan, optimizer_slots=2, seed=1, limits=Limits(max_bytes=100))
    assert table(plan, optimizer_slots=2, seed=1, limits=Limits(max_bytes=10**9, max_rows=5)).init().ids.numel() == 5
