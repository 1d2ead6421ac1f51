"""A table read by features that train it and by features that only insert: a dict, autograd with detach, and AdamW in
plain loops over the rows that a training feature touched."""

import random

import pytest
import torch

from recfx.embeddings import Embedding, normal, plan_tables, tile
from recfx.kernels.counters import new_counters
from recfx.kernels.index import keep_trained
from recfx.optim import sgd, sparse_adamw
from recfx.table.policies import Life, at_least
from recfx.types import pack
from tests.reference import is_close, ragged
from tests.table.test_combiners import BATCH, Oracle, logit, step_of

LR, DECAY, EPS = 0.05, 0.1, 1e-8
PARAMS = {"w": torch.ones(1)}


def groups(combiner="sum", **kwargs):
    x = {"dim": 4, "init": normal(1.0), "shared_name": "x"}
    return {
        "emb": [
            Embedding("a", **x, trainable=False, combiner=combiner),
            Embedding("b", **x),
            Embedding("c", **x, trainable=False, **kwargs),
        ]
    }


def batch_of(rng, num_samples, ids):
    columns = {}
    for f, of_feature in ids.items():
        lists = [rng.choices(of_feature, k=rng.randint(0, 3)) for _ in range(num_samples)]
        columns[f] = ragged(lists + [[]] * (BATCH - num_samples), spare=20 - sum(map(len, lists)))
    labels = torch.tensor([[float(i % 2)] for i in range(BATCH)])
    return pack({"label": labels, "num_samples": torch.tensor(num_samples, dtype=torch.int32), **columns})


class DetachedOracle(Oracle):
    """Rows in dict order, those of features that do not train detached."""

    def __init__(self, groups):
        super().__init__(groups)
        self.seen, self.trained, self.moments, self.step = {}, set(), {}, 0

    def cells(self, name, e, f, sample):
        return [cell if e.trainable else cell.detach() for cell in super().cells(name, e, f, sample)]

    def touch(self, batch, num_samples):
        """In the table's order: sample, feature, place in the list."""
        for b in range(num_samples):
            for e in self.groups["emb"]:
                f, n = batch[e.feature], getattr(e.combiner, "length", 99)
                for id in f.values[f.offsets[b] : f.offsets[b + 1]].tolist()[:n]:
                    self.row("x", id, e)
                    self.seen[id] = self.step + 1
                    if e.trainable:
                        self.trained.add(id)

    def update(self):
        self.step += 1
        for id in self.trained:
            row = self.rows["x", id]
            g = torch.zeros_like(row) if row.grad is None else row.grad
            m, v = self.moments.get(id, (torch.zeros_like(row), torch.zeros_like(row)))
            self.moments[id] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            m, v = m / (1 - 0.9**self.step), v / (1 - 0.999**self.step)
            new = (1 - LR * DECAY) * row - LR * m / (v.sqrt() + EPS)
            self.rows["x", id] = new.detach().requires_grad_()
        self.trained.clear()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("combiner", ["sum", tile(2)], ids=str)
def test_rows_are_the_dict_s_and_only_training_features_move_them(combiner, accumulation):
    settings = {"accumulation": accumulation, "sparse_optimizer": sparse_adamw(LR, weight_decay=DECAY, eps=EPS)}
    step, oracle = step_of(groups(combiner), **settings), DetachedOracle(groups(combiner))
    state, rng = step.init(PARAMS), random.Random(0)
    ids = {"a": range(9), "b": range(6, 16), "c": range(3, 30)}  # of one, of two, and of all three
    for _ in range(5):
        total, count = 0.0, 0
        for _ in range(accumulation):
            num_samples = rng.randint(2, BATCH)
            batch = batch_of(rng, num_samples, ids)
            oracle.touch(batch, num_samples)
            expected = logit(PARAMS, oracle.emb(batch), None)[:num_samples]
            if accumulation == 1:
                pure, _ = step.update(state, batch)
            state, aux = step.update_(state, batch)
            assert is_close(aux.logit[:num_samples], expected.detach(), rtol=1e-4, atol=1e-5)
            label = batch["label"][:num_samples].double()
            total += torch.nn.functional.binary_cross_entropy_with_logits(expected, label, reduction="sum")
            count += num_samples
        if total.requires_grad:  # a training feature has an id
            (total / count).backward()
        oracle.update()
        for s in (state, pure) if accumulation == 1 else (state,):
            table, num = s.tables[0], int(s.tables[0].num_rows)
            assert table.ids[:num].tolist() == [id for _, id in oracle.rows]
            assert (table.seen[:num] >> 32).tolist() == [oracle.seen[id] for _, id in oracle.rows]
            assert not int(table.num_unique)
            assert not table.grads.any()
            for row, (key, weight) in enumerate(oracle.rows.items()):
                assert is_close(table.rows[row, 0], weight.detach(), rtol=1e-4, atol=1e-5), key
                m = oracle.moments.get(key[1], (torch.zeros(4), None))[0]
                assert is_close(table.rows[row, 1], m, rtol=1e-4, atol=1e-6), key
    assert set(oracle.seen) > set(oracle.moments)


def test_admission_and_counters_are_those_of_the_same_table_with_all_features_training():
    """Which rows there are, in which order, and what was refused and not admitted does not depend on who trains."""
    ids = {"a": range(9), "b": range(6, 16), "c": range(3, 30)}
    tables = []
    for trainable in (False, True):
        x = {"dim": 2, "shared_name": "x"}
        features = {"emb": [Embedding("a", **x, trainable=trainable), Embedding("b", **x), Embedding("c", **x)]}
        step = step_of(features, max_rows=12, life=Life(admit=at_least(2), candidates=40), dense_optimizer=sgd(0.0))
        state, rng = step.init(PARAMS), random.Random(1)
        for _ in range(4):
            state, _ = step.update_(state, batch_of(rng, BATCH, ids))
        tables.append(state.tables[0])
    a, b = tables
    assert a.tally.tolist() == b.tally.tolist()
    assert int(a.num_refused) == int(b.num_refused) > 0
    for name in ("ids", "vocabularies", "born"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(a.seen >> 32, b.seen >> 32)


def test_a_feature_may_read_one_table_in_both_ways():
    x = {"dim": 2, "shared_name": "x"}
    plan = plan_tables({"p": [Embedding("a", **x)], "q": [Embedding("a", **x, trainable=False)]})
    assert [(l.feature, l.trainable) for l in plan.tables[0].lookups] == [("a", True), ("a", False)]
    assert [plan.learns(plan.groups[g][0]) for g in "pq"] == [True, False]


@pytest.mark.parametrize("num_before", [0, 3])
def test_rows_without_a_training_occurrence_lose_their_number(num_before):
    rng = random.Random(num_before)
    for _ in range(50):
        num_new, size = rng.randint(0, 6), 40
        numbers = list(range(num_before)) + list(range(num_before, num_before + num_new))
        inverse = [*numbers[num_before:], *rng.choices([*numbers, -1], k=6)] if numbers else []
        cell = [rng.choice((-1, k)) if i < 0 else k for k, i in enumerate(inverse)]
        trains = [True, rng.random() < 0.5, False]
        trained = [i for i, c in zip(inverse, cell, strict=True) if i >= 0 and c >= 0 and trains[c % 3]]
        unique_rows, seen = torch.randperm(size).int()[:20], torch.full((size,), -1)
        rows = unique_rows.tolist()
        for n in numbers:
            seen[rows[n]] = (7 << 32) | n
        kept = [n for n in numbers if n < num_before or n in trained]
        counters = new_counters(num_unique=len(numbers), step=6)
        out = keep_trained.keep_trained_(
            seen, unique_rows, counters, torch.tensor(num_before).int(), torch.tensor(inverse).int(),
            torch.tensor(cell).int(), torch.tensor(trains),
        )  # fmt: skip
        assert torch.equal(counters, new_counters(num_unique=len(kept), step=6))
        assert unique_rows[: len(kept)].tolist() == [rows[n] for n in kept]
        expected = [
            kept.index(i) if i >= 0 and c >= 0 and trains[c % 3] else -1 for i, c in zip(inverse, cell, strict=True)
        ]
        assert out.tolist() == expected
        number_of = {rows[n]: kept.index(n) if n in kept else 2**32 - 1 for n in numbers}
        assert seen.tolist() == [(7 << 32) | number_of[r] if r in number_of else -1 for r in range(size)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    ids = torch.tensor([0, 1, -1]).int(), torch.tensor([0, 1, -1]).int()
    arguments = (
        torch.zeros(9, dtype=torch.int64),
        torch.arange(4).int(),
        new_counters(num_unique=2),
        torch.tensor(0).int(),
    )
    torch.library.opcheck(keep_trained.keep_trained_, (*arguments, *ids, torch.tensor([True, False])))
