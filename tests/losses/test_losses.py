"""The losses beside loops that follow their formulas, and the frequencies beside a dict."""

import math

import pytest
import torch

from recfx.context import Context
from recfx.embeddings import Embedding, normal
from recfx.kernels.index.hashing import GOLDEN, mix
from recfx.losses import (
    bce_with_logits,
    bpr,
    focal,
    in_batch_softmax,
    init_frequencies,
    item_ids,
    poisson,
    squared_error,
    update_frequencies,
)
from recfx.metrics import metric_of
from recfx.optim import adamw, sgd, sparse_adamw, sparse_sgd
from recfx.step import Task, train_step
from recfx.train import evaluate
from recfx.types import Ragged, pack

B, REAL, D = 6, 5, 3


def numbers(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 1, generator=g) * 3, torch.randint(0, 2, (B, 1), generator=g).float()


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, None), (0.5, 0.25), (0.0, None)])
def test_focal_is_its_formula(gamma, alpha):
    logit, label = numbers()
    loss = focal(gamma, alpha)(logit, label)
    for x, y, got in zip(logit[:, 0].tolist(), label[:, 0].tolist(), loss[:, 0].tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        own, weight = (p, alpha) if y else (1 - p, None if alpha is None else 1 - alpha)
        assert got == pytest.approx(-(1 if weight is None else weight) * (1 - own) ** gamma * math.log(own), rel=1e-4)
    if gamma == 0:
        torch.testing.assert_close(loss, bce_with_logits(logit, label))


def test_focal_is_finite_far_out():
    logit = torch.tensor([[200.0], [-200.0], [200.0], [-200.0]])
    label = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    grad, loss = torch.func.grad_and_value(lambda x: focal()(x, label).sum())(logit)
    assert math.isfinite(loss)
    assert bool(grad.isfinite().all())


def test_numbers_have_squares_and_counts():
    logit, label = numbers(1)
    assert squared_error(logit, label).tolist() == [[(x - y) ** 2] for (x,), (y,) in zip(logit, label, strict=True)]
    expected = torch.nn.functional.poisson_nll_loss(logit, label * 3, log_input=True, reduction="none")
    torch.testing.assert_close(poisson(logit, label * 3), expected)


ITEMS = [4, 7, 4, 9, 7, 1]  # the last one is padding


def batch_case(seed=0, *, ragged=False):
    g = torch.Generator().manual_seed(seed)
    output = {name: torch.randn(B, D, generator=g) for name in ("query", "item")}
    output["log_q"] = -torch.rand(B, 1, generator=g)
    valid = torch.arange(B)[:, None] < REAL
    ids = torch.tensor(ITEMS)[:, None]
    feats = {"item": Ragged.from_lists(ids.tolist()) if ragged else ids}
    return output, feats, valid


def negatives(b):
    return [c for c in range(REAL) if ITEMS[c] != ITEMS[b]]


@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_in_batch_softmax_is_its_formula(ragged, log_q):
    output, feats, valid = batch_case(ragged=ragged)
    loss = in_batch_softmax(item="item", temperature=0.5, log_q=log_q)(output, feats, valid)
    assert loss.shape == (B, 1)
    for b in range(REAL):

        def score(c, b=b):
            s = float(output["query"][b] @ output["item"][c]) / 0.5
            return s - float(output["log_q"][c]) if log_q else s

        total = math.exp(score(b)) + sum(math.exp(score(c)) for c in negatives(b))
        assert float(loss[b]) == pytest.approx(math.log(total) - score(b), rel=1e-4)
    assert float(loss[REAL]) == 0


def test_bpr_is_its_formula():
    output, feats, valid = batch_case()
    loss = bpr(item="item")(output, feats, valid)
    for b in range(REAL):
        own = float(output["query"][b] @ output["item"][b])
        each = [math.log1p(math.exp(float(output["query"][b] @ output["item"][c]) - own)) for c in negatives(b)]
        assert float(loss[b]) == pytest.approx(sum(each) / len(each), rel=1e-4)
    alone = bpr(item="item")(output, {"item": torch.ones(B, 1, dtype=torch.int64)}, valid)
    assert alone.tolist() == [[0.0]] * B


@pytest.mark.parametrize("loss", [in_batch_softmax(item="item"), bpr(item="item")], ids=["softmax", "bpr"])
def test_padding_has_no_part(loss):
    def of_queries(query, item):
        _, feats, valid = batch_case()
        return loss({"query": query, "item": item}, feats, valid).sum()

    output, _, _ = batch_case()
    changed = {name: t.clone() for name, t in output.items()}
    changed["query"][REAL:], changed["item"][REAL:] = 50.0, -50.0
    grads = [torch.func.grad(of_queries, argnums=(0, 1))(o["query"], o["item"]) for o in (output, changed)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one[:REAL], other[:REAL])
        assert not bool(one[REAL:].any())


def towers(params, emb, feats):
    return {"query": feats["x"] @ params["q"], "item": emb["emb"].sum(1)}


def retrieval_step(loss, **options):
    return train_step(
        features=dict,
        embeddings={"emb": [Embedding("item", dim=D, init=normal(0.5))]},
        forward=options.pop("forward", towers),
        tasks=Task(batch_loss=loss),
        sparse_optimizer=options.pop("sparse", sparse_adamw(5e-2)),
        dense_optimizer=options.pop("dense", adamw(5e-2)),
        max_rows=64,
        **options,
    )


def retrieval_batch(seed=0, *, size=32, real=30):
    """Which item belongs to a query follows from the signs of its two numbers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, generator=g)
    item = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return pack({"x": x, "item": item[:, None], "num_samples": torch.tensor(real, dtype=torch.int32)})


@pytest.mark.parametrize("loss", [in_batch_softmax(item="item"), bpr(item="item")], ids=["softmax", "bpr"])
def test_a_step_learns_what_belongs_together(loss):
    step = retrieval_step(loss)
    state = step.init({"q": 0.1 * torch.randn(2, D, generator=torch.Generator().manual_seed(0))})
    held_out = [retrieval_batch(99)]
    before = evaluate(step.evaluate_, state, held_out)
    assert before["num_samples"] == 30
    for seed in range(60):
        state, aux = step.update_(state, retrieval_batch(seed))
    after = evaluate(step.evaluate_, state, held_out)
    assert set(aux.logit) == {"query", "item"}
    assert after["loss"] < before["loss"]
    assert after["hit_rate_1"] > 0.8
    assert after["hit_rate_10"] >= after["hit_rate_1"]


@pytest.mark.parametrize("loss", [in_batch_softmax(item="item"), bpr(item="item")], ids=["softmax", "bpr"])
def test_nan_in_padding_reaches_nothing(loss):
    step = retrieval_step(loss)
    start = {"q": torch.randn(2, D, generator=torch.Generator().manual_seed(0))}
    states = []
    for fill in (0.0, math.nan):
        batch = dict(retrieval_batch())
        batch["x"] = batch["x"].clone()
        batch["x"][30:] = fill
        state, aux = step.update_(step.init({"q": start["q"].clone()}), pack(batch))
        states.append((aux.loss, state.params["q"], state.tables[0].rows, *state.metrics))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert bool(states[1][0].isfinite())


def test_hit_rates_are_nan_as_soon_as_a_loss_is():
    output, feats, valid = batch_case()
    metric = metric_of(bpr(item="item"))
    bad = torch.ones(B, 1)
    bad[REAL] = math.nan  # of padding
    counts = metric.update_(metric.init(), output, feats, bad, valid)
    assert metric.read(counts)["hit_rate_10"] == 1.0
    bad[0] = math.nan
    values = metric.read(metric.update_(counts, output, feats, bad, valid))
    assert values["num_nonfinite"] == 1
    assert math.isnan(values["hit_rate_10"])


def test_under_accumulation_losses_of_micro_batches_are_added():
    start = {"q": torch.randn(2, D, generator=torch.Generator().manual_seed(2))}
    loss = in_batch_softmax(item="item")
    how = {"sparse": sparse_sgd(0.0), "dense": sgd(1.0)}
    step = retrieval_step(loss, accumulation=2, **how)
    state = step.init({"q": start["q"].clone()})
    batches = [retrieval_batch(seed) for seed in (0, 1)]
    for batch in batches:
        state, _ = step.update_(state, batch)
    one = retrieval_step(loss, **how)
    moves = []
    for batch in batches:
        alone, _ = one.update_(one.init({"q": start["q"].clone()}), batch)
        moves.append(alone.params["q"] - start["q"])
    torch.testing.assert_close(state.params["q"], start["q"] + (moves[0] + moves[1]) / 2)


def test_hit_rates_are_those_of_a_loop():
    output, feats, valid = batch_case(3)
    metric = metric_of(in_batch_softmax(item="item"))
    counts = metric.update_(metric.init(), output, feats, torch.ones(B, 1), valid)
    ranks = [
        sum(
            float(output["query"][b] @ output["item"][c]) >= float(output["query"][b] @ output["item"][b])
            for c in negatives(b)
        )
        for b in range(REAL)
    ]
    values = metric.read(counts)
    assert values["hit_rate_1"] == pytest.approx(sum(r < 1 for r in ranks) / REAL)
    assert values["hit_rate_10"] == 1.0
    assert values["loss"] == 1.0


def context_of(stats, step, num, *, real=None, training=True):
    valid = torch.arange(num)[:, None] < (num if real is None else real)
    return Context(
        training=training, valid=valid, stats=stats, seed=0, step=torch.tensor(step), sample=torch.arange(num)
    )


def test_frequencies_are_those_of_a_dict():
    stats, rate, g = init_frequencies(1000), 0.1, torch.Generator().manual_seed(0)
    seen, gap = {}, {}
    for step in range(1, 40):
        ids = torch.randint(0, 12, (5,), generator=g) ** 2
        log_q, stats = update_frequencies(context_of(stats, step, 5, real=4), ids, rate=rate)
        for id in set(ids[:4].tolist()):
            passed = step - seen.get(id, 0)
            gap[id] = passed if id not in seen else (1 - rate) * gap[id] + rate * passed
            seen[id] = step
        expected = [-math.log(gap[id]) for id in ids[:4].tolist()]
        assert log_q[:4, 0].tolist() == pytest.approx(expected, abs=1e-4)
    bucket = mix(torch.tensor(max(seen, key=seen.get)) * GOLDEN) % 1000
    assert int(stats["frequencies.seen"][bucket]) == max(seen.values())


def test_frequencies_are_part_of_the_state():
    def forward(params, emb, feats, context):
        log_q, stats = update_frequencies(context, item_ids(feats, "item"))
        return {**towers(params, emb, feats), "log_q": log_q}, stats

    step = retrieval_step(in_batch_softmax(item="item", log_q=True), forward=forward)
    state = step.init({"q": torch.zeros(2, D)}, stats=init_frequencies(64))
    for seed in range(3):
        state, _ = step.update_(state, retrieval_batch(seed))
    assert int((state.stats["frequencies.seen"] == 3).sum()) in range(1, 5)
    step.evaluate_(state, retrieval_batch(9))
    assert int(state.stats["frequencies.seen"].max()) == 3


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: focal(-1.0), "gamma: got -1.0, expected 0 <= gamma < inf"),
        (lambda: focal(alpha=1.5), "alpha: got 1.5, expected 0 to 1"),
        (lambda: in_batch_softmax(item="item", temperature=0.0), "temperature: got 0.0, expected a number above 0"),
        (lambda: item_ids({"x": 1}, "item"), "feature 'item': missing, expected the item of each sample"),
        (lambda: Task(batch_loss=lambda o, f, v: v), "task: got a batch_loss without metrics, expected them"),
    ],
)
def test_errors(make, error):
    with pytest.raises(ValueError, match=error):
        make()
