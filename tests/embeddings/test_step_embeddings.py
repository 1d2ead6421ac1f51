"""The step follows the options of embeddings: separate rates, dense ids, several widths, read_only."""

import pytest
import torch

from recfx.capture import trace
from recfx.embeddings import Embedding, tile, truncated_normal
from recfx.models import deepfm
from recfx.optim import sgd, sparse_adagrad, sparse_adamw, sparse_sgd
from recfx.table import copy_of
from recfx.types import Ragged
from tests.conftest import (
    BATCH_SIZE,
    DIM,
    FEATURES,
    NUM_NUMERIC,
    deepfm_batches,
    deepfm_groups,
    deepfm_step,
)
from tests.reference import (
    Sample,
    initial_value,
    is_close,
)
from tests.step.test_step import INIT, assert_same_state, batch_of, fresh, rows_by_name


def test_learning_rate_and_decay_per_table():
    """Each table is trained as by an optimiser with its rates: the gradients are the same for one step."""
    groups = {
        "emb": [
            Embedding("a", dim=DIM, init=INIT, lr_scale=0.5),
            Embedding("b", dim=DIM, init=INIT, weight_decay=0.9),
            Embedding("c", dim=DIM, init=INIT, frozen=True),
        ],
        "bias": [Embedding("a", dim=1, init=INIT), *(Embedding(f, dim=1, init=INIT, lr_scale=3.0) for f in "bc")],
    }
    rates = {f"{group}/{e.feature}": e.rates for group, embeddings in groups.items() for e in embeddings}
    batches, lr, decay = deepfm_batches(2), 1e-2, 0.1
    for build in (sparse_adamw, sparse_adagrad):
        step = deepfm_step(embeddings=groups, sparse_optimizer=build(lr, weight_decay=decay))
        assert len(step.plan.tables) == 1
        plain = deepfm_step(sparse_optimizer=build(lr, weight_decay=decay))
        start, _ = plain.update_(fresh(plain), batches[0])
        state = start._replace(tables=tuple(copy_of(t) for t in start.tables), params=dict(start.params))
        state, _ = step.update(state, batches[1])
        got = rows_by_name(step, state)
        for name, (lr_scale, own_decay) in rates.items():
            own = build(lr * lr_scale, weight_decay=decay if own_decay is None else own_decay)
            alone = deepfm_step(sparse_optimizer=own)
            expected, _ = alone.update(start, batches[1])
            expected, before = rows_by_name(alone, expected), rows_by_name(plain, start)
            mine = [key for key in expected if key[0] == name]
            assert mine
            for key in mine:
                if lr_scale == 0:
                    weight = before[key][0] if key in before else initial_row(*key)
                    assert torch.equal(got[key][0], weight) or (key not in before and is_close(got[key][0], weight))
                    assert key in before or not got[key][1:].any()
                else:
                    assert is_close(got[key], expected[key], atol=1e-6), key


def initial_row(name, id):
    return torch.tensor([initial_value(3, name, id, c, INIT) for c in range(DIM)])


def test_equal_rates_cost_nothing_in_the_graph():
    assert deepfm_step().plan == deepfm_step(embeddings=deepfm_groups(lr_scale=1.0)).plan
    batch = deepfm_batches(1)[0]
    steps = deepfm_step(), deepfm_step(embeddings=deepfm_groups(lr_scale=0.5))
    plain, scaled = ([n.target for n in trace(s.in_graph_, fresh(s), batch).graph.nodes] for s in steps)
    assert sum("adamw_rows_by_column" in str(t) for t in scaled) == 1
    assert sum("adamw_rows_by_column" in str(t) for t in plain) == 0


def test_dense_ids_are_lists_of_equal_length():
    """[B, n] next to the same ids as lists, with padding samples behind the real ones."""
    g, num_samples = torch.Generator().manual_seed(0), torch.tensor(5, dtype=torch.int32)
    ids = {f: torch.randint(0, 6, (BATCH_SIZE, 2), generator=g) for f in FEATURES}
    offsets = (torch.arange(BATCH_SIZE + 1).clamp(max=5) * 2).int()
    rest = {"label": torch.ones(BATCH_SIZE, 1), "numeric": torch.ones(BATCH_SIZE, NUM_NUMERIC)}
    rest["num_samples"] = num_samples
    step = deepfm_step(embeddings=deepfm_groups(combiner="mean"))
    a, b = fresh(step), fresh(step)
    for _ in range(2):
        a, aux_a = step.update_(a, rest | ids)
        b, aux_b = step.update_(b, rest | {f: Ragged(v.flatten(), offsets) for f, v in ids.items()})
        assert torch.equal(aux_a.logit[:5], aux_b.logit[:5])
    assert_same_state(a, b, exact=True)
    assert step.ids_in(rest | ids) == (len(FEATURES) * 2 * BATCH_SIZE,)
    with pytest.raises(TypeError, match=r"feature 'b': got Tensor of shape \[8, 2, 1\], expected Ragged i64 ids, or a"):
        step.update_(a, rest | ids | {"b": ids["b"][:, :, None]})


@pytest.mark.parametrize("combiner", ["sum", "mean", tile(2)])
def test_nested_lists_are_an_error(combiner):
    step = deepfm_step(embeddings=deepfm_groups(combiner=combiner))
    nested = dict(deepfm_batches(1)[0]) | {"b": Ragged.from_lists([[[1, 2], [3]]] * BATCH_SIZE)}
    with pytest.raises(ValueError, match=r"feature 'b': got lists nested 2 levels, expected one list .*flatten"):
        step.update_(fresh(step), nested)


@pytest.mark.parametrize("dim", [DIM, DIM + 1])
def test_features_with_other_numbers_of_samples_are_named(dim):
    """In one physical table, and in two."""
    embeddings = [Embedding("a", dim=DIM), Embedding("b", dim=dim)]
    step = deepfm_step(embeddings={"emb": embeddings}, forward=lambda params, emb, feats: emb["emb"])
    state = fresh(step)
    batch = dict(deepfm_batches(1)[0]) | {"b": Ragged.from_lists([[1]] * (BATCH_SIZE + 1))}
    message = rf"feature 'b': got {BATCH_SIZE + 1} samples, expected {BATCH_SIZE}, as many as feature 'a' has"
    for call in (step.update_, step.evaluate_, step.predict):
        with pytest.raises(ValueError, match=message):
            call(state, batch)
    assert not state.tables[0].num_rows


def test_a_group_of_several_dims_is_their_concatenation():
    groups = {"wide": [Embedding("a", dim=3, init=INIT), Embedding("b", dim=1, init=INIT), Embedding("c", dim=2)]}
    params = {"w": torch.tensor([[1.0], [2.0], [-1.0], [0.5], [3.0], [1.5]])}

    def forward(params, emb, feats):
        assert emb["wide"].shape == (BATCH_SIZE, 6)
        return emb["wide"] @ params["w"]

    step = deepfm_step(embeddings=groups, forward=forward, sparse_optimizer=sparse_sgd(1.0), dense_optimizer=sgd(0.0))
    state = step.init(params)
    sample = Sample(1.0, [0.0] * NUM_NUMERIC, {"a": [1], "b": [2], "c": [3]})
    state, aux = step.update_(state, batch_of([sample]))
    rows = rows_by_name(step, state)
    start = [initial_value(3, f"wide/{f}", id, c, i) for f, id, d, i in FIELDS for c in range(d)]
    logit = sum(x * float(w) for x, w in zip(start, params["w"], strict=True))
    assert float(aux.logit[0]) == pytest.approx(logit, rel=1e-5)
    slope = torch.sigmoid(aux.logit[0, 0]) - 1
    after = torch.cat([rows[f"wide/{f}", id][0] for f, id, _, _ in FIELDS])
    assert is_close(after, torch.tensor(start) - slope * params["w"][:, 0], atol=1e-6)


FIELDS = [("a", 1, 3, INIT), ("b", 2, 1, INIT), ("c", 3, 2, truncated_normal(0.001))]


@pytest.mark.parametrize("combiner", ["sum", "mean"])
def test_read_only_lookups_insert_nothing_and_leave_rows_alone(combiner):
    def groups(**kwargs):
        return {
            name: [
                Embedding("a", dim=dim, shared_name=f"{name}/x", init=INIT),
                Embedding("b", dim=dim, shared_name=f"{name}/x", init=INIT, combiner=combiner, **kwargs),
                Embedding("c", dim=dim, init=INIT),
            ]
            for name, dim in (("emb", DIM), ("bias", 1))
        }

    step, full = deepfm_step(embeddings=groups(read_only=True)), deepfm_step(embeddings=groups())
    state = fresh(step)
    known = [Sample(1.0, [0.1, 0.2], {"a": [1, 2], "b": [], "c": [5]})]
    state, _ = step.update_(state, batch_of(known))
    samples = [Sample(0.0, [0.3, 0.1], {"a": [7], "b": [2, 1, 9, 7], "c": [6]})]
    seen = {int(i): int(s) for i, s in zip(state.tables[0].ids[:3], state.tables[0].seen[:3], strict=True)}

    # What the model sees: rows of known ids, those inserted by this very batch among them, zeros for id 9.
    rows, per_list = rows_by_name(step, state), (4 if combiner == "mean" else 1)
    new = {name: initial_row(f"{name}/x", 7)[:dim] for name, dim in (("emb", DIM), ("bias", 1))}
    pooled = {
        name: torch.stack(
            [
                new[name],
                (rows[f"{name}/x", 1][0] + rows[f"{name}/x", 2][0] + new[name]) / per_list,
                torch.tensor([initial_value(3, f"{name}/c", 6, c, INIT) for c in range(len(new[name]))]),
            ]
        )[None]
        for name in ("emb", "bias")
    }
    expected = deepfm.forward(state.params, pooled, {"numeric": torch.tensor([[0.3, 0.1]])})
    pure, aux = step.update(state, batch_of(samples))
    before = copy_of(state.tables[0])
    state, aux_ = step.update_(state, batch_of(samples))
    torch.testing.assert_close(aux.logit[:1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux_.logit, aux.logit)
    assert_same_state(pure, state)

    # What it leaves behind: rows 1 and 2 as they were, 9 unknown, 7 trained through "a" alone.
    table = state.tables[0]
    ids = table.ids[: int(table.num_rows)].tolist()
    assert ids == [1, 2, 5, 7, 6]
    for id in (1, 2):
        row = ids.index(id)
        assert torch.equal(table.rows[row], before.rows[row])
        assert int(table.seen[row]) == seen[id]
    assert not is_close(table.rows[ids.index(7), 0], torch.cat([new["emb"], new["bias"]]))
    other, _ = full.update_(fresh(full), batch_of(samples))
    assert 9 in other.tables[0].ids[: int(other.tables[0].num_rows)]

    _, evaluated = step.evaluate_(state, batch_of(samples))
    assert torch.isfinite(evaluated.logit).all()


def test_a_table_that_is_only_read():
    step = deepfm_step(embeddings=deepfm_groups(read_only=True))
    state = fresh(step)
    state, aux = step.update_(state, deepfm_batches(1)[0])
    assert int(state.tables[0].num_rows) == int(state.tables[0].num_unique) == 0
    assert torch.isfinite(aux.logit).all()
    graph = trace(step.in_graph_, state, deepfm_batches(1)[0]).graph
    assert not [n for n in graph.nodes if "find_or_insert" in str(n.target)]
