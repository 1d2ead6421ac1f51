"""Every combiner, weighted and not, against autograd over a leaf tensor per logical row in float64."""

import math
import random

import pytest
import torch
from torch import Tensor

from recfx.embeddings import Embedding, Tile, normal, plan_tables, tile
from recfx.optim import sgd, sparse_sgd
from recfx.step import train_step
from recfx.types import Ragged, pack
from tests.reference import initial_value, is_close, ragged

INIT, SEED, BATCH, LR = normal(1.0), 3, 5, 0.5
FEATURES = ("a", "b", "c")


def random_feature(rng: random.Random, weighted: bool, num_samples: int) -> Ragged:
    lists = [rng.choices(range(6), k=rng.randint(0, 4)) for _ in range(num_samples)]
    lists += [[]] * (BATCH - num_samples)
    f = ragged(lists, spare=30 - sum(map(len, lists)))
    if not weighted:
        return f
    weights = torch.tensor([rng.choice([-0.5, 0.25, 1.0, 2.0]) for _ in range(int(f.offsets[-1]))])
    return f._replace(weights=torch.cat([weights, torch.full((30 - len(weights),), math.nan)]))


class Oracle:
    """Rows as leaves; `emb` gives what the groups of a step should be."""

    def __init__(self, groups: dict[str, list[Embedding]]) -> None:
        self.groups, self.rows = groups, {}

    def row(self, name: str, id: int, e: Embedding) -> Tensor:
        if (name, id) not in self.rows:
            values = [initial_value(SEED, name, id, c, e.init) for c in range(e.dim)]
            self.rows[name, id] = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        return self.rows[name, id]

    def cells(self, name: str, e: Embedding, f: Ragged, sample: int) -> list[Tensor]:
        places = range(int(f.offsets[sample]), int(f.offsets[sample + 1]))
        weights = [1.0 if f.weights is None else float(f.weights[p]) for p in places]
        if isinstance(e.combiner, Tile):
            n = e.combiner.length
            kept = [w * self.row(name, int(f.values[p]), e) for p, w in list(zip(places, weights, strict=True))[:n]]
            return kept + [torch.zeros(e.dim, dtype=torch.float64)] * (n - len(kept))
        rows = [w * self.row(name, int(f.values[p]), e) for p, w in zip(places, weights, strict=True)]
        total = sum(rows, torch.zeros(e.dim, dtype=torch.float64))
        divisor = {"sum": 1, "mean": sum(weights), "sqrtn": math.sqrt(sum(w * w for w in weights))}[e.combiner]
        return [total / divisor if divisor else total]

    def emb(self, batch: dict[str, Ragged]) -> dict[str, Tensor]:
        out = {}
        for group, embeddings in self.groups.items():
            samples = []
            for b in range(BATCH):
                cells = [
                    self.cells(e.shared_name or f"{group}/{e.feature}", e, batch[e.feature], b) for e in embeddings
                ]
                flat = [cell for of_embedding in cells for cell in of_embedding]
                same = len({e.dim for e in embeddings}) == 1
                samples.append(torch.stack(flat) if same else torch.cat(flat))
            out[group] = torch.stack(samples)
        return out


def logit(params, emb, feats):
    """A function in which every item of every cell has a slope of its own, which depends on the others."""
    total = 0
    for name, x in emb.items():
        flat = x.flatten(1)
        factor = torch.arange(1, flat.shape[1] + 1, dtype=x.dtype) * 0.1
        total = total + (torch.sin(flat + len(name)) * factor).sum(1, keepdim=True)
    return total * params["w"].to(total.dtype)


def step_of(groups, **kwargs):
    optimizers = {"sparse_optimizer": sparse_sgd(LR), "dense_optimizer": sgd(0.0)}
    return train_step(
        features=dict, embeddings=groups, forward=logit, seed=SEED, **{"max_rows": 64} | optimizers | kwargs
    )


def batch_of(rng, weighted, num_samples=BATCH):
    columns = {f: random_feature(rng, f in weighted, num_samples) for f in FEATURES}
    samples = {"num_samples": torch.tensor(num_samples, dtype=torch.int32)}
    return pack({"label": torch.tensor([[float(i % 2)] for i in range(BATCH)])} | columns | samples)


def check(groups, weighted, *, accumulation=1, steps=3):
    step, oracle, rng = step_of(groups, accumulation=accumulation), Oracle(groups), random.Random(0)
    state = step.init({"w": torch.ones(1)})
    for i in range(steps):
        total, count = 0.0, 0
        for j in range(accumulation):
            num_samples = BATCH - (i + j) % 2
            batch = batch_of(rng, weighted, num_samples)
            expected = logit({"w": torch.ones(1)}, oracle.emb(batch), None)[:num_samples]
            state, aux = step.update_(state, batch)
            assert is_close(aux.logit[:num_samples], expected.detach(), rtol=1e-4, atol=1e-5)
            label = batch["label"][:num_samples].double()
            total += torch.nn.functional.binary_cross_entropy_with_logits(expected, label, reduction="sum")
            count += num_samples
        (total / count).backward()
        for key, row in oracle.rows.items():
            grad = torch.zeros_like(row) if row.grad is None else row.grad
            oracle.rows[key] = (row - LR * grad).detach().requires_grad_()
    rows = rows_of(step, state)
    assert rows.keys() == oracle.rows.keys()
    for key, row in oracle.rows.items():
        assert is_close(rows[key], row.detach(), rtol=1e-4, atol=1e-5), key
    return step, state


def rows_of(step, state):
    out = {}
    for plan, table in zip(step.plan.tables, state.tables, strict=True):
        for row in range(int(table.num_rows)):
            for c in plan.vocabularies[int(table.vocabularies[row])]:
                out[c.name, int(table.ids[row])] = table.rows[row, 0, c.first : c.first + c.dim]
    return out


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", tile(3)], ids=str)
@pytest.mark.parametrize("weighted", [(), ("a",), FEATURES], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_combiner_is_its_formula_and_gradients_reach_the_rows(combiner, weighted, accumulation):
    groups = {"emb": [Embedding(f, dim=4, init=INIT, combiner=combiner) for f in FEATURES]}
    check(groups, weighted, accumulation=accumulation)


@pytest.mark.parametrize("weighted", [(), ("a", "b")], ids=str)
def test_all_combiners_in_one_model(weighted):
    """Beside each other in one row, over shared tables, and in groups of several dims."""
    groups = {
        "emb": [
            Embedding("a", dim=4, init=INIT, combiner="mean"),
            Embedding("b", dim=4, init=INIT, combiner=tile(2), shared_name="x"),
            Embedding("c", dim=4, init=INIT, combiner="sqrtn", shared_name="x"),
        ],
        "bias": [Embedding("a", dim=1, init=INIT, combiner="sum"), Embedding("b", dim=1, init=INIT)],
        "several": [
            Embedding("c", dim=2, init=INIT, combiner=tile(3)),
            Embedding("a", dim=3, init=INIT, combiner="sqrtn"),
        ],
    }
    check(groups, weighted)


def test_tile_leaves_ids_behind_its_length_out_of_the_table():
    step, state = check({"emb": [Embedding("a", dim=2, init=INIT, combiner=tile(1))]}, ())
    batch = {"a": ragged([[50, 51], [], [52]] + [[]] * 2, spare=3), "label": torch.zeros(BATCH, 1)}
    state, _ = step.update_(state, pack(batch))
    ids = state.tables[0].ids[: int(state.tables[0].num_rows)].tolist()
    assert 50 in ids
    assert 52 in ids
    assert 51 not in ids


@pytest.mark.parametrize("combiner", ["sum", "mean", tile(2)], ids=str)
def test_pure_step_evaluation_and_read_only_lookups(combiner):
    def groups(read_only):
        tables = [Embedding("a", dim=4, init=INIT, shared_name="x")]
        return {
            "emb": [*tables, Embedding("b", dim=4, init=INIT, shared_name="x", combiner=combiner, read_only=read_only)]
        }

    step, rng = step_of(groups(True)), random.Random(1)
    state, oracle = step.init({"w": torch.ones(1)}), Oracle(groups(False))
    for i in range(3):
        batch = batch_of(rng, ("b",))
        pure, aux = step.update(state, batch)
        state, aux_ = step.update_(state, batch)
        torch.testing.assert_close(aux.logit, aux_.logit)
        num_rows = int(state.tables[0].num_rows)
        torch.testing.assert_close(pure.tables[0].rows[:num_rows], state.tables[0].rows[:num_rows])
        assert i < 2 or num_rows == 6  # every id is known: zeros and initial values are told apart no more
    oracle.rows = {key: row.double() for key, row in rows_of(step, state).items()}
    batch = batch_of(rng, ("b",))
    _, aux = step.evaluate_(state, batch)
    assert is_close(aux.logit, logit({"w": torch.ones(1)}, oracle.emb(batch), None), rtol=1e-4, atol=1e-5)


def test_refused_ids_are_weighted_too():
    groups = {"emb": [Embedding("a", dim=4, init=INIT, combiner="mean", unknown="initial")]}
    step, oracle, batch = step_of(groups, max_rows=1), Oracle(groups), batch_of(random.Random(2), ("a",))
    state, aux = step.update_(step.init({"w": torch.ones(1)}), batch)
    assert int(state.tables[0].num_refused) > 0
    assert is_close(aux.logit, logit({"w": torch.ones(1)}, oracle.emb(batch), None).detach(), rtol=1e-4, atol=1e-5)


def test_tiles_of_other_lengths_share_no_keys():
    plan = plan_tables(
        {
            "p": [Embedding("a", dim=2, combiner=tile(3)), Embedding("b", dim=2)],
            "q": [Embedding("a", dim=1, combiner=tile(3)), Embedding("b", dim=1, combiner=tile(2))],
        }
    )
    assert [(t.dims, t.cell_vocabularies) for t in plan.tables] == [((2, 1), (0, 0, 0)), ((2,), (0,)), ((1,), (0, 0))]


def test_errors():
    with pytest.raises(ValueError, match=r"length: got 0, expected at least 1"):
        tile(0)
    with pytest.raises(ValueError, match=r"feature 'a': got combiner 'tile', expected .* or tile\(n\)"):
        Embedding("a", dim=2, combiner="tile")
    step, batch = step_of({"emb": [Embedding("a", dim=2)]}), dict(batch_of(random.Random(0), ("a",)))
    batch["a"] = batch["a"]._replace(weights=batch["a"].weights.double())
    with pytest.raises(TypeError, match=r"feature 'a': got torch.float64 weights, expected torch.float32"):
        step.update_(step.init({"w": torch.ones(1)}), batch)
