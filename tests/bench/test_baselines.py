"""The opponents train the same DeepFM: otherwise a comparison means nothing."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from bench import baselines_torch
from bench.harness import call_in_child
from bench.workload import DenseBatch, init_weights

TABLE_ROWS, BATCH_SIZE, NUM_STEPS = 26 * 6, 32, 4
TABLES = ("embedding", "bias")


def small_weights():
    """Embeddings of order 0.1: the second-order term must matter."""
    return {name: 100 * w if name in TABLES else w for name, w in init_weights(TABLE_ROWS).items()}


def small_batches(num_ids: int, missing: float) -> list[DenseBatch]:
    """Ids are drawn from the first `num_ids` of 6 per column; all of those occur in every batch."""
    generator = torch.Generator().manual_seed(num_ids)
    batches = []
    for _ in range(NUM_STEPS):
        local = torch.stack([torch.randperm(BATCH_SIZE, generator=generator) % num_ids for _ in range(26)])
        index = 6 * torch.arange(26)[:, None] + local
        index[torch.rand(index.shape, generator=generator) < missing] = TABLE_ROWS
        label = (torch.rand(BATCH_SIZE, 1, generator=generator) < 0.3).float()
        batches.append(DenseBatch(index, torch.rand(BATCH_SIZE, 13, generator=generator) * 3, label))
    return batches


def reference(batches: list[DenseBatch]):
    """The plain module under torch.optim.AdamW; after each step every row the batch did not touch is put back."""
    model = baselines_torch.DeepFM(small_weights())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    tables = [table.weight for table in model.tables.values()]
    losses = []
    for batch in batches:
        untouched = torch.ones(TABLE_ROWS + 1, dtype=torch.bool)
        untouched[batch.row.flatten()] = False
        untouched[TABLE_ROWS] = True
        loss = F.binary_cross_entropy_with_logits(model(batch.row.t(), batch.num), batch.label)
        optimizer.zero_grad()
        loss.backward()
        before = [[x.detach().clone() for x in (w, *moments(optimizer, w))] for w in tables]
        optimizer.step()
        with torch.no_grad():
            for w, old in zip(tables, before, strict=True):
                for x, x_old in zip((w, *moments(optimizer, w)), old, strict=True):
                    x[untouched] = x_old[untouched]
        losses.append(loss.item())
    return losses, model.weights()


def moments(optimizer: torch.optim.Optimizer, w: torch.Tensor):
    state = optimizer.state[w]
    return (state["exp_avg"], state["exp_avg_sq"]) if state else (torch.zeros_like(w), torch.zeros_like(w))


def check_against(expected, losses, weights):
    expected_losses, expected_weights = expected
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=2e-6, atol=0)
    assert weights.keys() == expected_weights.keys()
    for name, w in expected_weights.items():
        # A decay left out would move a row of 0.1 by 4e-6. AdamW magnifies rounding where a dense gradient is near 0.
        rtol, atol = (5e-6, 5e-7) if name in TABLES else (1e-5, 5e-6)
        actual = torch.as_tensor(weights[name])
        torch.testing.assert_close(actual, w, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("build", [baselines_torch.functional_compiled, baselines_torch.functional_textbook])
def test_functional_is_the_module_with_adamw_on_touched_rows(build, missing):
    batches = small_batches(4, missing)
    baseline = build(small_weights(), max_distinct=26 * 4 + 1)
    losses = [baseline.step(batch).item() for batch in batches]
    check_against(reference(batches), losses, baseline.weights())


def test_eager_dense_is_the_same_where_all_rows_are_touched():
    batches = small_batches(6, 0.0)
    baseline = baselines_torch.eager_dense(small_weights())
    losses = [baseline.step(batch).item() for batch in batches]
    check_against(reference(batches), losses, baseline.weights())


def test_eager_sparse_starts_alike_and_moves_touched_rows_only():
    batches = small_batches(4, 0.4)
    before, baseline = small_weights(), baselines_torch.eager_sparse(small_weights())
    losses = [baseline.step(batch).item() for batch in batches]
    assert losses[0] == pytest.approx(reference(batches)[0][0], rel=1e-6)
    touched = torch.zeros(TABLE_ROWS + 1, dtype=torch.bool)
    touched[torch.cat([b.row.flatten() for b in batches])] = True
    touched[TABLE_ROWS] = False
    for name in TABLES:
        moved = (baseline.weights()[name] != before[name]).any(1)
        assert torch.equal(moved, touched)


def test_eager_unique_is_eager_sparse():
    batches = small_batches(4, 0.4)
    plain, unique = baselines_torch.eager_sparse(small_weights()), baselines_torch.eager_unique(small_weights())
    expected = [plain.step(batch).item() for batch in batches]
    check_against((expected, plain.weights()), [unique.step(batch).item() for batch in batches], unique.weights())


@pytest.mark.parametrize("variant", ["jax", "jax_textbook"])
def test_jax_is_the_module_with_adamw_on_touched_rows(variant):
    """In a separate process: JAX's threads are not safe in tests that fork."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    batches = small_batches(4, 0.4)
    weights = {name: w.numpy() for name, w in small_weights().items()}
    arrays = [(b.row.int().numpy(), b.num.numpy(), b.label.numpy()) for b in batches]
    losses, after, max_distinct = call_in_child(
        "bench.baselines_jax:child_losses", variant=variant, weights=weights, batches=arrays, max_distinct=26 * 4 + 1
    )
    check_against(reference(batches), losses, after)
    assert max_distinct == 26 * 4 + 1
