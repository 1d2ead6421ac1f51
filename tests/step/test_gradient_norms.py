"""Norms of a batch's gradients by parameter and feature, beside autograd."""

import math

import pytest
import torch

from recfx.embeddings import Embedding, normal
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.types import Ragged, pack

B, DIM = 5, 3


def batch_of(x=1.0):
    g = torch.Generator().manual_seed(0)
    ids = {name: Ragged.from_lists([[int(i)] for i in torch.randint(0, 9, (B,), generator=g)]) for name in ("a", "b")}
    history = Ragged.from_lists([[1, 2], [], [3], [1], [4, 5, 6]])
    numbers = torch.full((B, 1), x)
    return pack({"label": torch.ones(B, 1), "x": numbers, **ids, "history": history})


def step_of(**options):
    def forward(params, emb, feats):
        rows = emb["kept"].values.square().sum() * params["k"]
        return (emb["emb"][:, 0] * emb["emb"][:, 1]).sum(1, keepdim=True) + feats["x"] * params["w"] + rows

    return train_step(
        features=dict,
        embeddings={
            "emb": [Embedding("a", dim=DIM, init=normal(0.5)), Embedding("b", dim=DIM, init=normal(0.5))],
            "kept": [Embedding("history", dim=DIM, init=normal(0.5), combiner=None)],
        },
        forward=forward,
        sparse_optimizer=sparse_adamw(1e-2),
        dense_optimizer=adamw(1e-2),
        max_rows=64,
        **options,
    )


def test_norms_are_those_of_autograd():
    step, batch = step_of(), batch_of()
    state, _ = step.update_(step.init({"w": torch.tensor([0.3]), "k": torch.tensor([0.1])}), batch)
    before = [t.clone() for t in (*state.params.values(), state.tables[0].rows[:20])]
    norms = step.gradient_norms(state, batch)
    assert [*norms] == ["parameter 'w'", "parameter 'k'", "feature 'a'", "feature 'b'", "feature 'history'"]
    rows = {}
    for plan, table in zip(step.plan.tables, state.tables, strict=True):
        n = int(table.num_rows)
        for lookup in plan.lookups:
            of = {int(i): r for i, v, r in zip(table.ids[:n], table.vocabularies[:n], table.rows[:n, 0], strict=True)
                  if int(v) == lookup.vocabulary}  # fmt: skip
            num = int(batch[lookup.feature].offsets[-1])
            rows[lookup.feature] = torch.stack([of[int(i)] for i in batch[lookup.feature].values[:num]])
    leaves = {name: r.clone().requires_grad_() for name, r in rows.items()}
    params = {name: p.clone().requires_grad_() for name, p in state.params.items()}
    logit = (leaves["a"] * leaves["b"]).sum(1, keepdim=True) + batch["x"] * params["w"]
    logit = logit + leaves["history"].square().sum() * params["k"]
    torch.nn.functional.binary_cross_entropy_with_logits(logit, batch["label"]).backward()
    for name, leaf in params.items():
        assert norms[f"parameter '{name}'"] == pytest.approx(float(leaf.grad.norm()), rel=1e-4)
    for name, leaf in leaves.items():
        assert norms[f"feature '{name}'"] == pytest.approx(float(leaf.grad.norm()), rel=1e-4)
    after = (*state.params.values(), state.tables[0].rows[:20])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_is_not_finite_is_not_a_number():
    step = step_of(on_nonfinite="ignore")
    state, _ = step.update_(step.init({"w": torch.tensor([0.3]), "k": torch.tensor([0.1])}), batch_of())
    norms = step.gradient_norms(state, batch_of(x=torch.nan))
    assert not any(map(math.isfinite, norms.values()))
