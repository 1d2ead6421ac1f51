"""A table's whole life in any order against a dict: train, evict, read, write, delete, grow, save, load."""

import copy
import shutil
import tempfile
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from recfx import optim, rows
from recfx.checkpoint import Saver, load
from recfx.embeddings import Embedding, uniform
from recfx.step import train_step
from recfx.table import functions as table_module
from recfx.table import policies
from recfx.table.policies import Life
from recfx.types import pack
from tests.reference import EXTREMES, DictTable, positions, ragged, reading_of

NUM_SAMPLES, WIDTH, UNSEEN, EVERY = 4, 3, 3, 2
GRADIENT = (1.0, 1.0, 2.0)  # of the loss below by an occurrence's row: two columns of "emb/*", one of "bias/*"
IDS = st.sampled_from(EXTREMES) | st.integers(0, 12)
LISTS = st.lists(
    st.lists(st.lists(IDS, max_size=2), min_size=NUM_SAMPLES, max_size=NUM_SAMPLES), min_size=2, max_size=2
)


def build(max_rows):
    """Every occurrence of an id moves its row by its gradient / NUM_SAMPLES."""
    return train_step(
        features=dict,
        embeddings={
            "emb": [Embedding(f, dim=2, init=uniform(-1, 1)) for f in ("a", "b")],
            "bias": [Embedding(f, dim=1, init=uniform(-1, 1)) for f in ("a", "b")],
        },
        forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None] + 2 * emb["bias"].sum((1, 2))[:, None],
        loss=lambda logit, label: logit,
        sparse_optimizer=optim.sparse_sgd(1.0),
        dense_optimizer=optim.sgd(1.0),
        max_rows=max_rows,
        life=Life(expire=policies.unseen_for(UNSEEN), every=EVERY),
    )


class DictLife(DictTable):
    """Keys in their rows, with the vectors and the last step of each."""

    def __init__(self, max_rows):
        super().__init__(max_rows)
        self.step, self.last, self.vectors = 0, {}, {}

    def train(self, lists):
        """Returns the keys that got a row, and by how much each key's row moves."""
        reading, before, moves = reading_of(lists, [0, 1]), set(self.rows), {}
        row_P, _ = self.insert(reading)
        self.next_step()
        self.step += 1
        for _, l, p in positions(reading):
            if row_P[p] >= 0:
                key = l, int(reading.id[p])
                moves[key] = moves.get(key, 0) + 1
                self.last[key] = self.step
        return self.rows.keys() - before, moves

    def forget(self, keys):
        self.evict(keys)
        for key in keys:
            del self.last[key], self.vectors[key]


class Machine(RuleBasedStateMachine):
    """`oracle` is what `state` should be; `saved` the same for each checkpoint."""

    def __init__(self):
        super().__init__()
        self.steps = {max_rows: build(max_rows) for max_rows in (10, 40)}
        self.folder = tempfile.mkdtemp()
        self.initial, self.saved, self.saver = {}, {}, None

    @initialize(max_rows=st.sampled_from([10, 40]))
    def start(self, max_rows):
        self.begin(max_rows, DictLife(max_rows))

    def begin(self, max_rows, oracle):
        self.step, self.oracle = self.steps[max_rows], oracle
        self.oracle.max_rows = max_rows
        self.state = self.step.init({"w": torch.zeros(1)})
        if self.saver is not None:
            self.saver.close()
        self.saver = Saver(self.folder, self.step, max_to_keep=3, full_every=3)

    def teardown(self):
        if self.saver is not None:
            self.saver.close()
        shutil.rmtree(self.folder)

    @rule(lists=LISTS)
    def train(self, lists):
        lookups = {name: ragged(lookup) for name, lookup in zip("ab", lists, strict=True)}
        batch = pack({"label": torch.zeros(NUM_SAMPLES, 1), **lookups})
        self.state = self.step.grow_(self.state, self.step.ids_in(batch))
        self.state, _ = self.step.update_(self.state, batch)
        new, moves = self.oracle.train(lists)
        for key in new:
            self.oracle.vectors[key] = [self.initial_of(key, column, moves[key]) for column in range(WIDTH)]
        for key, times in moves.items():
            vector = self.oracle.vectors[key]
            self.oracle.vectors[key] = [x - times * g / NUM_SAMPLES for x, g in zip(vector, GRADIENT, strict=True)]
        self.state = self.step.sweep_(self.state, self.oracle.step)
        if self.oracle.step % EVERY == 0:
            self.oracle.forget([key for key, last in self.oracle.last.items() if self.oracle.step - last >= UNSEEN])

    def initial_of(self, key, column, times):
        """Taken from the table, `times` occurrences later, when the key first gets a row; the same ever after."""
        weight = float(self.state.tables[0].rows[self.oracle.rows[key], 0, column])
        return self.initial.setdefault((key, column), weight + times * GRADIENT[column] / NUM_SAMPLES)

    @rule(vocabulary=st.integers(0, 1), ids=st.lists(IDS, max_size=5))
    def read(self, vocabulary, ids):
        got = rows.read(self.step, self.state, f"emb/{'ab'[vocabulary]}", torch.tensor(ids, dtype=torch.int64))
        keys = [(vocabulary, i) for i in ids]
        assert got.known.tolist() == [key in self.oracle.rows for key in keys]
        expected = [self.oracle.vectors.get(key, [0.0] * WIDTH)[:2] for key in keys]
        assert got.weight.flatten().tolist() == pytest.approx([x for v in expected for x in v], abs=1e-5)

    @rule(vocabulary=st.integers(0, 1), ids=st.lists(IDS, max_size=4, unique=True), value=st.integers(-9, 9))
    def write(self, vocabulary, ids, value):
        oracle, keys = self.oracle, [(vocabulary, i) for i in ids]
        new, room = [key for key in keys if key not in oracle.rows], oracle.max_rows - len(oracle.rows)
        weight = torch.full((len(ids), 2), float(value))
        arguments = f"emb/{'ab'[vocabulary]}", torch.tensor(ids, dtype=torch.int64), weight
        if len(new) > room:
            with pytest.raises(ValueError, match=f"got {len(new)} new ids, expected at most {room}"):
                rows.write_(self.step, self.state, *arguments)
            return
        self.state = rows.write_(self.step, self.state, *arguments)
        with self.uncounted():
            oracle.insert(reading_of([[[i] for i in ids]], [vocabulary]))
        oracle.next_step()
        for key in keys:
            bias = self.initial_of(key, 2, 0) if key in new else oracle.vectors[key][2]
            oracle.vectors[key], oracle.last[key] = [float(value), float(value), bias], oracle.step

    @rule(vocabulary=st.integers(0, 1), ids=st.lists(IDS, max_size=4))
    def delete(self, vocabulary, ids):
        table, deleted = f"bias/{'ab'[vocabulary]}", torch.tensor(ids, dtype=torch.int64)
        self.state = rows.delete_(self.step, self.state, table, deleted)
        with self.uncounted():
            self.oracle.forget({(vocabulary, i) for i in ids} & self.oracle.rows.keys())

    @contextmanager
    def uncounted(self):
        """The counters are of training and its sweeps."""
        oracle, names = self.oracle, ("num_looked_up", "num_created", "num_evicted")
        before = {name: getattr(oracle, name) for name in names}
        yield
        vars(oracle).update(before)

    @rule(num=st.integers(0, 200))
    def grow(self, num):
        self.state = self.step.grow_(self.state, [num])

    @rule()
    def save(self):
        path = self.saver.save(self.state, number=self.oracle.step, loop={"step": self.oracle.step})
        self.saved[path] = copy.deepcopy(self.oracle)

    @rule()
    def save_in_background(self):
        path = self.saver.save_in_background(self.state, number=self.oracle.step, loop={})
        self.saved[path] = copy.deepcopy(self.oracle)

    def kept(self):
        self.saver.finish()
        return sorted(path for path in self.saved if path.exists())

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), max_rows=st.sampled_from([10, 40]))
    def load(self, data, max_rows):
        path = data.draw(st.sampled_from(self.kept()))
        oracle = copy.deepcopy(self.saved[path])
        needed = len(oracle.rows) + len(oracle.freed)
        self.begin(max_rows if needed <= max_rows else 40, oracle)
        self.state, loop = load(path, self.step, self.state)
        assert loop["step"] == oracle.step

    @invariant()
    def is_the_dict(self):
        if not hasattr(self, "oracle"):
            return
        t, oracle = self.state.tables[0], self.oracle
        n = int(t.num_rows)
        held = zip(t.vocabularies[:n].tolist(), t.ids[:n].tolist(), strict=True)
        assert [key if key[0] >= 0 else None for key in held] == oracle.keys()
        assert t.free_rows[: int(t.num_free)].tolist() == sorted(oracle.freed, reverse=True)
        assert (t.tally.tolist(), int(t.num_refused)) == (oracle.tally(), oracle.num_refused)
        assert int(t.step) == oracle.step
        for key, row in oracle.rows.items():
            assert t.rows[row, 0].tolist() == pytest.approx(oracle.vectors[key], abs=1e-5)
            assert int(t.seen[row] >> 32) == oracle.last[key]
        for row in oracle.freed:
            assert not t.rows[row].any()


def run(monkeypatch, examples, length):
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 8)
    how = settings(
        max_examples=examples, stateful_step_count=length, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Machine, settings=how)


def test_nothing_is_lost_or_invented(monkeypatch):
    run(monkeypatch, 25, 40)


@pytest.mark.slow
def test_nothing_is_lost_or_invented_in_thousands_of_steps(monkeypatch):
    run(monkeypatch, 100, 80)
