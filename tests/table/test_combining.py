"""A user's own combiner: max-pooling and attention against plain loops and an nn.Embedding, uncompiled and captured."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch

from recfx.capture import capture, capture_evaluation, capture_prediction
from recfx.embeddings import Combiner, Embedding, combine, tile
from recfx.table import combining
from recfx.types import Ragged, pack
from tests.embeddings.test_padding_id import PaddedOracle, check
from tests.reference import ragged
from tests.table.test_combiners import BATCH, FEATURES, INIT, LR, batch_of, rows_of, step_of

PARAMS = {"w": torch.ones(1)}


def max_pool(rows, is_there):
    largest = rows.masked_fill(~is_there[:, :, None], -torch.inf).amax(dim=1)
    return torch.where(is_there.any(dim=1, keepdim=True), largest, 0.0)


def attention(rows, is_there):
    """Weights are the softmax of each row's product with the first place's."""
    scores = (rows * rows[:, :1]).sum(dim=2).masked_fill(~is_there, -1e9)
    return (torch.softmax(scores, dim=1)[:, :, None] * rows).sum(dim=1)


def in_loops(combiner, rows, is_there):
    """The same for one list: rows and flags one by one."""
    zeros = torch.zeros_like(rows[0])
    kept = [row for row, there in zip(rows, is_there, strict=True) if there]
    if not kept:
        return zeros
    if combiner.function is max_pool:
        return torch.stack([max(column, key=lambda x: float(x.detach())) for column in zip(*kept, strict=True)])
    exps = [torch.exp(sum(a * b for a, b in zip(row, rows[0], strict=True))) for row in kept]
    return sum((e / sum(exps) * row for e, row in zip(exps, kept, strict=True)), zeros)


class OwnOracle(PaddedOracle):
    def cells(self, name, e, f, sample):
        if not isinstance(e.combiner, Combiner):
            return super().cells(name, e, f, sample)
        n = e.combiner.length
        tiled = SimpleNamespace(combiner=tile(n), padding_id=e.padding_id, dim=e.dim, init=e.init)
        ids = f.values[int(f.offsets[sample]) : int(f.offsets[sample + 1])][:n].tolist()
        is_there = [id != e.padding_id for id in ids] + [False] * (n - len(ids))
        return [in_loops(e.combiner, super().cells(name, tiled, f, sample), is_there)]


def groups_of(function, *, padding_id=None):
    """Next to each other in one row, over a shared table, next to other combiners and in a group of several dims."""
    own = {"init": INIT, "padding_id": padding_id}
    return {
        "emb": [
            Embedding("a", dim=4, combiner=combine(function, 3), **own),
            Embedding("b", dim=4, combiner=combine(function, 2), shared_name="x", **own),
            Embedding("c", dim=4, combiner="mean", shared_name="x", **own),
        ],
        "bias": [Embedding("a", dim=1, combiner=combine(function, 3), **own), Embedding("b", dim=1, **own)],
        "several": [
            Embedding("c", dim=2, combiner=combine(function, 9), **own),
            Embedding("a", dim=3, combiner=tile(3), **own),
        ],
    }


@pytest.mark.parametrize("function", [max_pool, attention])
@pytest.mark.parametrize("weighted", [(), FEATURES], ids=str)
@pytest.mark.parametrize("padding_id", [None, 0])
def test_a_combiner_is_its_loop_and_gradients_reach_the_rows(function, weighted, padding_id):
    check(groups_of(function, padding_id=padding_id), weighted, oracle=OwnOracle)


def test_a_mask_that_is_dropped_is_seen(monkeypatch):
    monkeypatch.setattr(
        combining, "_is_there", lambda ids, length, padding_id: torch.ones(BATCH, length, dtype=torch.bool)
    )
    with pytest.raises(AssertionError):
        check(groups_of(max_pool), (), oracle=OwnOracle)


def test_a_combiner_may_write_into_what_it_is_given():
    batch, logits = batch_of(random.Random(0), ()), []
    for function in (lambda rows, is_there: (rows * 2).sum(1), lambda rows, is_there: rows.mul_(2).sum(1)):
        step = step_of({"emb": [Embedding("a", dim=2, combiner=combine(function, 3), init=INIT)]})
        state, _ = step.update_(step.init(PARAMS), batch)
        logits.append(step.predict(state, batch))
    assert torch.equal(*logits)


def test_gradients_are_those_of_an_nn_embedding():
    """Rows, outputs and one step of plain gradient descent."""
    ids = [[3, 1, 4], [1], [5, 5], [], [2, 1]]
    groups = {"emb": [Embedding("a", dim=4, init=INIT, combiner=combine(attention, 3))]}
    step = step_of(groups)
    batch = pack({"a": ragged(ids, spare=2), "label": torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]])})
    state, _ = step.update_(step.init(PARAMS), batch)  # every id has a row
    module = torch.nn.Embedding(6, 4)
    with torch.no_grad():
        for (_, id), row in rows_of(step, state).items():
            module.weight[id] = row
    padded = torch.tensor([[*i, 0, 0, 0][:3] for i in ids])
    is_there = torch.arange(3) < torch.tensor([len(i) for i in ids])[:, None]
    pooled = attention(torch.where(is_there[:, :, None], module(padded), 0), is_there)
    x = (torch.sin(pooled + 3) * torch.arange(1, 5) * 0.1).sum(1, keepdim=True)  # `logit` of the tests next to this
    torch.nn.functional.binary_cross_entropy_with_logits(x, batch["label"]).backward()
    state, aux = step.update_(state, batch)
    torch.testing.assert_close(aux.logit, x.detach(), rtol=1e-5, atol=1e-6)
    for (_, id), row in rows_of(step, state).items():
        torch.testing.assert_close(row, (module.weight - LR * module.weight.grad)[id].detach(), rtol=1e-5, atol=1e-6)


def test_read_only_and_frozen_lookups_and_evaluation():
    own = {"dim": 4, "init": INIT, "shared_name": "x"}
    step = step_of(
        {
            "emb": [
                Embedding("a", **own),
                Embedding("b", combiner=combine(max_pool, 3), read_only=True, **own),
                Embedding("c", combiner=combine(max_pool, 3), trainable=False, **own),
            ]
        }
    )
    state, rng = step.init(PARAMS), random.Random(1)
    for _ in range(3):
        state, _ = step.update_(state, batch_of(rng, ("b",)))
    batch = batch_of(rng, ("b",))
    _, expected = step.evaluate_(copy.deepcopy(state), batch)
    torch.testing.assert_close(step.predict(state, batch), expected.logit)
    captured = capture_evaluation(step, state, batch, backend="eager")
    torch.testing.assert_close(captured(state, batch)[1].logit, expected.logit)
    torch.testing.assert_close(capture_prediction(step, state, batch, backend="eager")(state, batch), expected.logit)
    known = {id: row for (_, id), row in rows_of(step, state).items()}
    f = batch["b"]
    kept = range(int(f.offsets[0]), min(int(f.offsets[1]), int(f.offsets[0]) + 3))
    rows = [float(f.weights[p]) * known.get(int(f.values[p]), torch.zeros(4)) for p in kept]
    largest = torch.stack(rows).amax(0) if rows else torch.zeros(4)
    seen = []
    step = step_of({"emb": list(embeddings_of(seen, own))})
    step.predict(state, batch)
    torch.testing.assert_close(seen[0][0], largest)


def embeddings_of(seen, own):
    """The same, where what the combiner of "b" makes is kept."""

    def watched(rows, is_there):
        seen.append(max_pool(rows, is_there))
        return seen[-1]

    yield Embedding("a", **own)
    yield Embedding("b", combiner=combine(watched, 3), read_only=True, **own)
    yield Embedding("c", combiner=combine(max_pool, 3), trainable=False, **own)


def test_captured():
    step = step_of(groups_of(attention, padding_id=0), accumulation=2)
    a, b, rng = step.init(PARAMS), step.init(PARAMS), random.Random(2)
    batches = [batch_of(rng, FEATURES) for _ in range(6)]
    run = capture(step, a, batches[0], backend="eager")
    for batch in batches:
        a, aux = run(a, batch)
        b, expected = step.update_(b, batch)
        torch.testing.assert_close(aux.logit, expected.logit, rtol=1e-5, atol=1e-6)
    for key, row in rows_of(step, a).items():
        torch.testing.assert_close(row, rows_of(step, b)[key], rtol=1e-5, atol=1e-6)


def test_it_is_itself_and_names_itself():
    one, other = combine(max_pool, 3), combine(max_pool, 3)
    assert one != other
    assert one == one
    assert len({one, other, one}) == 2
    assert repr(one) == "combine(max_pool, 3)"
    assert "combiner=combine(max_pool, 3)" in repr(Embedding("a", dim=2, combiner=one))
    assert "<lambda>" in repr(combine(lambda rows, is_there: rows[:, 0], 1))


def test_a_column_without_ids():
    step = step_of({"emb": [Embedding("a", dim=2, combiner=combine(max_pool, 2), padding_id=0)]})
    none = Ragged(torch.zeros(0, dtype=torch.int64), torch.zeros(BATCH + 1, dtype=torch.int32))
    state, aux = step.update_(step.init(PARAMS), pack({"a": none, "label": torch.zeros(BATCH, 1)}))
    assert (aux.logit == aux.logit[0]).all()
    assert int(state.tables[0].num_rows) == 0


def test_errors():
    with pytest.raises(ValueError, match=r"length: got 0, expected at least 1"):
        combine(max_pool, 0)
    with pytest.raises(TypeError, match=r"length: got 2.0, expected an int"):
        combine(max_pool, 2.0)
    with pytest.raises(
        TypeError, match=r"function: got 'max', expected a function \(rows, is_there\) -> f32 \[B, dim\]"
    ):
        combine("max", 2)
    with pytest.raises(ValueError, match=r"feature 'a': got combiner the function max_pool, expected .*combine\(func"):
        Embedding("a", dim=2, combiner=max_pool)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda rows, is_there: rows,
            ValueError,
            r"got .*Tensor torch.float32 \[5, 3, 2\] returned, expected a tensor",
        ),
        (lambda rows, is_there: rows.sum(1).double(), ValueError, r"got .*Tensor torch.float64 \[5, 2\] returned"),
        (lambda rows, is_there: rows.sum(), ValueError, r"got .*Tensor torch.float32 \[\] returned"),
        (lambda rows, is_there: None, TypeError, r"got None returned, expected a tensor torch.float32 \[5, 2\]"),
    ],
)
def test_errors_when_traced(function, error, message):
    step = step_of({"emb": [Embedding("a", dim=2, combiner=combine(function, 3))]})
    batch = batch_of(random.Random(0), ())
    with pytest.raises(error, match=r"feature 'a', combine\(<lambda>, 3\): " + message):
        step.update_(step.init(PARAMS), batch)
    with pytest.raises(error, match=message):
        capture(step, step.init(PARAMS), batch, backend="eager")
