"""Lists filled up with an id that means nothing: the same as lists without it, and a tile's places stay."""

import random

import pytest
import torch

from recfx.capture import capture
from recfx.embeddings import Embedding, Tile, plan_tables, tile
from recfx.table.policies import Life, at_least
from recfx.types import Ragged, pack
from tests.reference import is_close
from tests.table.test_combiners import BATCH, FEATURES, INIT, LR, Oracle, batch_of, logit, rows_of, step_of

PARAMS = {"w": torch.ones(1)}


class PaddedOracle(Oracle):
    """Lists without the id; where they are tiled, zeros in its places."""

    def cells(self, name, e, f, sample):
        if e.padding_id is None:
            return super().cells(name, e, f, sample)
        places = torch.arange(int(f.offsets[sample]), int(f.offsets[sample + 1]))
        if isinstance(e.combiner, Tile):
            n, zeros = e.combiner.length, torch.zeros(e.dim, dtype=torch.float64)
            ids = [int(f.values[p]) for p in places[:n]]
            weights = [1.0 if f.weights is None else float(f.weights[p]) for p in places[:n]]
            kept = [
                zeros if id == e.padding_id else w * self.row(name, id, e) for id, w in zip(ids, weights, strict=True)
            ]
            return kept + [zeros] * (n - len(kept))
        places = places[f.values[places] != e.padding_id]
        offsets = torch.zeros_like(f.offsets)
        offsets[sample + 1 :] = len(places)
        weights = None if f.weights is None else f.weights[places]
        return super().cells(name, e, f._replace(values=f.values[places], offsets=offsets, weights=weights), sample)


def check(groups, weighted, oracle=PaddedOracle, **kwargs):
    step, oracle, rng = step_of(groups, **kwargs), oracle(groups), random.Random(0)
    state = step.init(PARAMS)
    for i in range(3):
        num_samples = BATCH - i % 2
        batch = batch_of(rng, weighted, num_samples)
        expected = logit(PARAMS, oracle.emb(batch), None)[:num_samples]
        pure, _ = step.update(state, batch)
        state, aux = step.update_(state, batch)
        assert is_close(aux.logit[:num_samples], expected.detach(), rtol=1e-4, atol=1e-5)
        for key, row in rows_of(step, pure).items():
            torch.testing.assert_close(row, rows_of(step, state)[key])
        label = batch["label"][:num_samples].double()
        torch.nn.functional.binary_cross_entropy_with_logits(expected, label).backward()
        for key, row in oracle.rows.items():
            grad = torch.zeros_like(row) if row.grad is None else row.grad
            oracle.rows[key] = (row - LR * grad).detach().requires_grad_()
    rows = rows_of(step, state)
    assert rows.keys() == oracle.rows.keys()
    for key, row in rows.items():
        assert is_close(row, oracle.rows[key].detach(), rtol=1e-4, atol=1e-5), key
    batch = batch_of(rng, weighted)
    _, evaluated = step.evaluate_(state, batch)
    assert torch.equal(step.predict(state, batch), evaluated.logit)
    assert is_close(evaluated.logit, logit(PARAMS, oracle.emb(batch), None).detach(), rtol=1e-4, atol=1e-5)
    return step, state, rows


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", tile(3)], ids=str)
@pytest.mark.parametrize("weighted", [(), ("a",), FEATURES], ids=str)
def test_it_is_absent_from_combiner_divisor_gradient_and_table(combiner, weighted):
    groups = {"emb": [Embedding(f, dim=4, init=INIT, combiner=combiner, padding_id=0) for f in FEATURES]}
    _, _, rows = check(groups, weighted)
    assert not [id for _, id in rows if id == 0]


def test_only_the_features_that_ask_for_it():
    x = {"dim": 4, "init": INIT, "shared_name": "x"}
    groups = {
        "emb": [
            Embedding("a", **x, combiner="mean", padding_id=0),
            Embedding("b", **x, combiner="mean"),
            Embedding("c", **x, combiner=tile(2), padding_id=3),
        ],
        "bias": [Embedding("a", dim=1, init=INIT, padding_id=0), Embedding("a", dim=1, init=INIT, combiner="sqrtn")],
    }
    groups["bias"][1] = Embedding("b", dim=1, init=INIT, combiner="sqrtn", padding_id=5)
    _, _, rows = check(groups, ("b", "c"))
    assert ("x", 0) in rows
    assert ("bias/a", 0) not in rows
    assert ("bias/b", 0) in rows
    assert ("bias/b", 5) not in rows


def test_one_feature_with_and_without_it_is_two_lookups():
    groups = {"emb": [Embedding("a", dim=2, shared_name="x", padding_id=p) for p in (None, 0, -1)]}
    (table,) = plan_tables(groups).tables
    assert [l.padding_id for l in table.lookups] == [None, -1, 0]
    assert len(table.vocabularies) == 1


def test_it_waits_for_no_admission_and_counts_as_nothing():
    embedding = Embedding("a", dim=2, init=INIT, padding_id=0)
    step = step_of({"emb": [embedding]}, life=Life(admit=at_least(2), candidates=64))
    a = torch.tensor([[0, 7], [0, 0], [0, 0], [0, 0], [0, 0]])
    state = step.init(PARAMS)
    for _ in range(3):
        state, _ = step.update_(state, pack({"label": torch.zeros(BATCH, 1), "a": a}))
    assert rows_of(step, state).keys() == {("emb/a", 7)}
    assert int(state.tables[0].num_candidates) <= 1


def test_dense_ids_are_lists_without_it():
    ids = torch.tensor([[0, 7, 8], [0, 0, 0], [9, 0, 9], [1, 2, 3], [0, 0, 4]])
    groups = {"emb": [Embedding("a", dim=2, init=INIT, combiner="mean", padding_id=0)]}
    lists = [row[row != 0] for row in ids]
    ends = torch.tensor([0, *map(len, lists)]).cumsum(0).int()
    ragged = Ragged(torch.cat(lists), ends)
    results = []
    for a in (ids, ragged):
        step = step_of(groups)
        state = step.init(PARAMS)
        for _ in range(2):
            state, aux = step.update_(state, pack({"label": torch.ones(BATCH, 1), "a": a}))
        results.append((aux.logit, rows_of(step, state)))
    assert results[0][1].keys() == results[1][1].keys()
    torch.testing.assert_close(results[0], results[1])


def test_captured_as_it_is_written():
    groups = {"emb": [Embedding("a", dim=2, init=INIT, combiner="mean", padding_id=0), Embedding("b", dim=2)]}
    step, rng = step_of(groups), random.Random(3)
    batches = [batch_of(rng, ("a",)) for _ in range(3)]
    states = [step.init(PARAMS), step.init(PARAMS)]
    runs = [step.update_, capture(step, states[1], batches[0], backend="eager")]
    for batch in batches:
        logits = []
        for k, run in enumerate(runs):
            states[k], aux = run(states[k], batch)
            logits.append(aux.logit.clone())
        assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("padding_id", "error", "message"),
    [
        (0.0, TypeError, "feature 'a': got padding_id 0.0.*expected an int"),
        (True, TypeError, "expected an int"),
        (2**63, ValueError, "feature 'a': got padding_id 9223372036854775808, expected -2\\*\\*63 to 2\\*\\*63 - 1"),
    ],
)
def test_what_it_may_be(padding_id, error, message):
    with pytest.raises(error, match=message):
        Embedding("a", dim=1, padding_id=padding_id)
