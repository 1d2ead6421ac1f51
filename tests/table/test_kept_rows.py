"""`combiner=None`: rows that stay lists, beside `tile`, the same numbers side by side, and torch's own embedding."""

import pytest
import torch

from recfx.capture import capture, capture_prediction
from recfx.embeddings import Embedding, normal, tile
from recfx.optim import adamw, sgd, sparse_adamw, sparse_sgd
from recfx.step import train_step
from recfx.table import stats
from recfx.table.policies import Life, at_least, unseen_for
from recfx.train import evaluate
from recfx.types import Ragged, pack
from tests.reference import assert_same_table, is_close

B, LONGEST, DIM, CAPACITY = 6, 4, 3, 30


def batch_of(seed, *, weighted=False, real=5):
    g = torch.Generator().manual_seed(seed)

    def lists():
        lengths = torch.randint(0, LONGEST + 1, (B,), generator=g)
        lengths[real:] = 0
        return [torch.randint(0, 7, (int(n),), generator=g).tolist() for n in lengths]

    history, tags = lists(), lists()
    weights = [[0.5 + i for i in range(len(ids))] for ids in history] if weighted else None
    return pack(
        {
            "label": torch.randint(0, 2, (B, 1), generator=g).float(),
            "item": Ragged.from_lists([[i % 7] for i in range(B)]),
            "history": Ragged.from_lists(history, torch.int64, weights=weights, capacity=CAPACITY),
            "tags": Ragged.from_lists(tags, torch.int64, capacity=CAPACITY),
            "num_samples": torch.tensor(real, dtype=torch.int32),
        }
    )


def padded(rows):
    """Ragged rows as [B, LONGEST, DIM], in plain torch."""
    at = rows.offsets[:-1, None].long() + torch.arange(LONGEST)
    there = torch.arange(LONGEST) < rows.offsets.diff()[:, None]
    return torch.where(there[:, :, None], rows.values[at.clamp(max=len(rows.values) - 1)], 0.0)


def forward(params, emb, feats):
    history = emb["history"] if isinstance(emb["history"], torch.Tensor) else padded(emb["history"])
    scores = torch.tanh(history @ params["w"]) * emb["emb"][:, :1]
    return scores.sum((1, 2))[:, None] + emb["emb"].sum((1, 2))[:, None] * 0.1 + params["b"]


def params():
    return {"w": torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)), "b": torch.zeros(1)}


def step_of(combiner, *, shared="items", history=None, sparse=None, **options):
    how = history or {}
    on = {"dim": DIM, "init": normal(0.5)}
    return train_step(
        features=dict,
        embeddings={
            "emb": [Embedding("item", shared_name=shared, **on), Embedding("tags", **on)],
            "history": [Embedding("history", shared_name=shared, combiner=combiner, **on, **how)],
        },
        forward=forward,
        sparse_optimizer=sparse or sparse_adamw(1e-2),
        dense_optimizer=adamw(1e-2),
        max_rows=64,
        **options,
    )


HOW = [
    {},
    {"shared": None},
    {"history": {"padding_id": 3}},
    {"history": {"read_only": True}},
    {"history": {"trainable": False}},
    {"history": {"unknown": "initial"}, "shared": None},
    {"history": {"frozen": True}, "shared": None},
    {"accumulation": 2},
    {"life": Life(admit=at_least(2), expire=unseen_for(1), every=1)},
    {"on_nonfinite": "skip"},
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", HOW, ids=lambda how: "life" if "life" in how else str(how))
def test_rows_are_those_of_tile(how, weighted):
    kept, tiled = step_of(None, **how), step_of(tile(LONGEST), **how)
    one, other = kept.init(params()), tiled.init(params())
    pure, captured = kept.init(params()), kept.init(params())
    run = capture(kept, captured, batch_of(0, weighted=weighted), backend="eager")
    for seed in range(4):
        batch = batch_of(seed, weighted=weighted, real=B if seed % 2 else 4)
        one, aux = kept.update_(one, batch)
        other, expected = tiled.update_(other, batch)
        assert is_close(aux.logit[: int(batch["num_samples"])], expected.logit[: int(batch["num_samples"])])
        pure, _ = kept.update(pure, batch)
        captured, of_graph = run(captured, batch)
        assert torch.equal(of_graph.logit, aux.logit)
        for step, state in ((kept, one), (tiled, other), (kept, pure), (kept, captured)):
            step.sweep_(state, seed + 1)
    if "life" in how:
        assert sum(stats(t).evicted for t in one.tables) > 0
    for name, p in one.params.items():
        assert is_close(p, other.params[name])
        assert is_close(p, pure.params[name])
        assert torch.equal(p, captured.params[name])
    for a, b, c, d in zip(one.tables, other.tables, pure.tables, captured.tables, strict=True):
        assert_same_table(a, b, exact_rows=False)
        assert_same_table(a, c, exact_rows=False)
        assert_same_table(a, d)
    batches = [batch_of(9, weighted=weighted)]
    found, expected = (evaluate(s.evaluate_, t, batches) for s, t in ((kept, one), (tiled, other)))
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)
    predict = capture_prediction(kept, one, batches[0], backend="eager")
    assert torch.equal(predict(one, batches[0]), kept.predict(one, batches[0]))


def test_gradients_are_those_of_torch():
    step = train_step(
        features=dict,
        embeddings={"history": [Embedding("history", dim=DIM, combiner=None, init=normal(0.5))]},
        forward=lambda p, emb, feats: torch.tanh(padded(emb["history"]) @ p["w"]).sum((1, 2))[:, None],
        sparse_optimizer=sparse_sgd(1.0),
        dense_optimizer=sgd(1.0),
        max_rows=64,
    )
    weights = {"w": params()["w"]}
    start = step.update(step.init({"w": weights["w"].clone()}), batch_of(1))[0]  # rows exist
    table, n = start.tables[0], int(start.tables[0].num_rows)
    rows = torch.zeros(7, DIM)
    rows[table.ids[:n]] = table.rows[:n, 0, :DIM]
    leaf, w, batch = rows.clone().requires_grad_(), start.params["w"].clone().requires_grad_(), batch_of(1)
    looked_up = torch.nn.functional.embedding(batch["history"].values, leaf)
    logit = torch.tanh(padded(Ragged(looked_up, batch["history"].offsets)) @ w).sum((1, 2))[:5, None]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, batch["label"][:5])
    loss.backward()
    after, aux = step.update_(start, batch)
    torch.testing.assert_close(aux.loss, loss.detach())
    torch.testing.assert_close(after.params["w"], w.detach() - w.grad)
    torch.testing.assert_close(after.tables[0].rows[:n, 0, :DIM], (rows - leaf.grad)[table.ids[:n]])


def test_values_have_the_capacity_of_the_column_and_end_in_zeros():
    seen = {}

    def look(p, emb, feats):
        seen.update(emb)
        return padded(emb["history"]).sum((1, 2))[:, None] + p["b"]

    step = train_step(
        features=dict,
        embeddings={"history": [Embedding("history", dim=DIM, combiner=None, init=normal(0.5))]},
        forward=look,
        sparse_optimizer=sparse_adamw(1e-2),
        dense_optimizer=adamw(1e-2),
    )
    batch = batch_of(2)
    step.predict(step.update_(step.init({"b": torch.zeros(1)}), batch)[0], batch)
    rows, num = seen["history"], int(batch["history"].offsets[-1])
    assert isinstance(rows, Ragged)
    assert list(rows.values.shape) == [CAPACITY, DIM]
    assert torch.equal(rows.offsets, batch["history"].offsets)
    assert bool((rows.values[:num] != 0).all())
    assert not bool(rows.values[num:].any())


def test_a_group_has_one_such_embedding():
    with pytest.raises(ValueError, match="group 'emb': got 2 embeddings, expected feature 'history' alone"):
        train_step(
            features=dict,
            embeddings={"emb": [Embedding("item", dim=2), Embedding("history", dim=2, combiner=None)]},
            forward=forward,
            sparse_optimizer=sparse_adamw(1e-2),
            dense_optimizer=adamw(1e-2),
        )
