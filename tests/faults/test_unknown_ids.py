"""An id without a row has one value in training, evaluation and prediction, for whatever reason it has no row."""

import random

import pytest
import torch
from torch import Tensor

from recfx.embeddings import Embedding, plan_tables, tile
from recfx.optim import sparse_sgd
from recfx.table.policies import Life, at_least
from tests.reference import is_close
from tests.table.test_combiners import INIT, Oracle, batch_of, logit, step_of

REASONS = {
    "refused by a full table": {"max_rows": 3},
    "not admitted": {"life": Life(admit=at_least(99), candidates=40)},
    "refused and not admitted": {"max_rows": 3, "life": Life(admit=at_least(2), candidates=40)},
}


class OracleWithout(Oracle):
    """Rows of `known` alone; others are as their embedding says."""

    known: set[int]

    def row(self, name: str, id: int, e: Embedding) -> Tensor:
        row = super().row(name, id, e)
        return row if id in self.known or e.unknown == "initial" else torch.zeros_like(row)


def groups(unknown, combiner, **kwargs):
    """Embedding and bias of one column, of policies that may differ, and a second column over the same rows."""
    x = {"dim": 4, "init": INIT, "combiner": combiner, "shared_name": "x", "unknown": unknown[0]}
    bias = {"dim": 1, "init": INIT, "combiner": combiner, "shared_name": "bias", "unknown": unknown[1]}
    return {
        "emb": [Embedding("a", **x), Embedding("b", **x, **kwargs)],
        "bias": [Embedding("a", **bias), Embedding("b", **bias, **kwargs)],
    }


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
@pytest.mark.parametrize(
    ("combiner", "unknown"),
    [
        ("sum", ("zeros", "zeros")),
        ("mean", ("zeros", "initial")),
        ("sqrtn", ("initial", "zeros")),
        (tile(2), ("initial", "initial")),
    ],
    ids=str,
)
def test_training_evaluation_and_prediction_give_one_logit(reason, combiner, unknown):
    step = step_of(groups(unknown, combiner), sparse_optimizer=sparse_sgd(0.0), **reason)
    state, rng = step.init({"w": torch.ones(1)}), random.Random(3)
    for _ in range(3):
        state, _ = step.update_(state, batch_of(rng, ("b",)))
    table, batch = state.tables[0], batch_of(rng, ("b",))
    oracle, num_rows = OracleWithout(groups(unknown, combiner)), int(table.num_rows)
    oracle.known = set(table.ids[:num_rows].tolist())
    state, aux = step.update_(state, batch)
    assert int(table.num_rows) == num_rows < 6
    expected = logit({"w": torch.ones(1)}, oracle.emb(batch), None).detach()
    for got in (aux.logit, step.evaluate_(state, batch)[1].logit, step.predict(state, batch)):
        assert is_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unknown", ["zeros", "initial"])
def test_an_id_never_seen_has_the_value_that_training_would_refuse_it_with(unknown):
    full, empty = (step_of(groups((unknown, unknown), "mean"), max_rows=n) for n in (1, 64))
    first, batch = batch_of(random.Random(5), ()), batch_of(random.Random(6), ("a",))
    ids = [first[f].values for f in "ab"]
    for values in ids:
        values.fill_(100)  # the one row there is room for
    trained, _ = full.update_(full.init({"w": torch.ones(1)}), first)
    _, aux = full.update_(trained, batch)
    assert int(trained.tables[0].num_rows) == 1
    torch.testing.assert_close(empty.predict(empty.init({"w": torch.ones(1)}), batch), aux.logit)


@pytest.mark.parametrize("unknown", ["zeros", "initial"])
def test_read_only_lookups_follow_the_same_rule(unknown):
    step = step_of(groups((unknown, unknown), "sum", read_only=True))
    state = step.init({"w": torch.ones(1)})
    batch = batch_of(random.Random(3), ())
    batch["b"].values.add_(1000)  # which no feature inserts
    state, aux = step.update_(state, batch)
    oracle = OracleWithout(groups((unknown, unknown), "sum"))
    oracle.known = set(range(6))
    expected = logit({"w": torch.ones(1)}, oracle.emb(batch), None).detach()
    assert is_close(aux.logit, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_an_id_without_a_row_and_none_is_inserted_later_with_one():
    """The value is a function of the id: what a refused id adds to the loss moves no row."""
    for unknown in ("zeros", "initial"):
        step = step_of(groups((unknown, unknown), "sum"), max_rows=1)
        state = step.init({"w": torch.ones(1)})
        for seed in range(3):
            state, _ = step.update_(state, batch_of(random.Random(seed), ()))
        assert int(state.tables[0].num_rows) == 1
        assert not state.tables[0].rows[1:].any()
        assert not state.tables[0].grads.any()


def test_policies_are_checked():
    with pytest.raises(ValueError, match="feature 'a': got unknown 'nan', expected 'zeros' or 'initial'"):
        Embedding("a", dim=2, unknown="nan")
    both = [Embedding("a", dim=2, shared_name="x"), Embedding("b", dim=2, shared_name="x", unknown="initial")]
    with pytest.raises(ValueError, match=r"table 'x': .* frozen and unknown per name"):
        plan_tables({"emb": both})
