"""The eager step: pure = in place = a plain nn.Module with a leaf tensor per row."""

import random
import re

import pytest
import torch
from torch._dynamo.exc import Unsupported

from recfx.capture import capture
from recfx.embeddings import Embedding, truncated_normal
from recfx.metrics import binary_metrics
from recfx.models import deepfm
from recfx.optim import adamw, sparse_adamw
from recfx.table import TableState
from recfx.types import pack
from tests.conftest import (
    BATCH_SIZE,
    CAPACITY,
    DIM,
    FEATURES,
    NUM_NUMERIC,
    SMALL_IDS,
    deepfm_batches,
    deepfm_groups,
    deepfm_params,
    deepfm_step,
)
from tests.reference import (
    NaiveTrainer,
    Sample,
    assert_same_table,
    is_close,
    pack_samples,
    random_samples,
)

INIT = truncated_normal(0.3)
COMBINED = {  # one name read by two features, a mean, and widths that make two physical tables
    "emb": [
        Embedding("a", dim=DIM, shared_name="ab", init=INIT),
        Embedding("b", dim=DIM, shared_name="ab", init=INIT, combiner="mean"),
        Embedding("c", dim=DIM, init=INIT, combiner="mean"),
        Embedding("d", dim=DIM, init=INIT),
    ],
    "bias": [
        Embedding("a", dim=1, init=INIT),
        Embedding("b", dim=1, init=INIT),
        Embedding("c", dim=1, init=INIT, combiner="mean"),
        Embedding("d", dim=1, init=INIT),
    ],
}


def fresh(step, params=None):
    return step.init({name: p.clone() for name, p in (params or deepfm_params()).items()})


def samples_of(num, *, seed, features=FEATURES, ids=SMALL_IDS, longest=3):
    return random_samples(
        random.Random(seed), num, features=features, num_numeric=NUM_NUMERIC, ids=ids, longest=longest
    )


def batch_of(samples, batch_size=BATCH_SIZE):
    return pack_samples(samples, batch_size, capacity=3 * batch_size)


def rows_by_name(step, state) -> dict[tuple[str, int], torch.Tensor]:
    """Every logical row: weight, m and v, f32 [3, dim]."""
    out = {}
    for plan, s in zip(step.plan.tables, state.tables, strict=True):
        for row in range(int(s.num_rows)):
            for column in plan.vocabularies[int(s.vocabularies[row])]:
                out[column.name, int(s.ids[row])] = s.rows[row, :, column.first : column.first + column.dim]
    return out


def assert_same_state(a, b, *, exact=False):
    rtol, atol = (0, 0) if exact else (1e-5, 1e-6)
    for x, y in zip(a.tables, b.tables, strict=True):
        assert_same_table(x, y, exact_rows=exact)
    for left, right in (
        (a.params, b.params),
        (a.dense.m, b.dense.m),
        (a.dense.v, b.dense.v),
        (a.window.grads, b.window.grads),
    ):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol)
    assert torch.equal(a.dense.step, b.dense.step)
    assert [int(t) for t in a.window[1:]] == [int(t) for t in b.window[1:]]
    assert torch.equal(a.metrics.histogram.sum(1), b.metrics.histogram.sum(1))
    torch.testing.assert_close(a.metrics.sums, b.metrics.sums, rtol=max(rtol, 1e-12), atol=atol)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_update_is_update_(accumulation):
    step = deepfm_step(accumulation=accumulation)
    a, b = fresh(step), fresh(step)
    for batch in deepfm_batches(7, short_last=True):
        before = a
        a, aux_a = step.update(a, batch)
        assert a is not before
        b, aux_b = step.update_(b, batch)
        assert_same_state(a, b)
        torch.testing.assert_close(aux_a.logit, aux_b.logit)
        torch.testing.assert_close(aux_a.loss, aux_b.loss)
        assert int(aux_a.num_samples) == int(batch["num_samples"])


def test_update_changes_no_byte_of_its_input():
    step = deepfm_step(accumulation=2)
    state = fresh(step)
    batches = deepfm_batches(4)
    for batch in batches[:3]:
        state, _ = step.update_(state, batch)
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(state)]
    buffer = batches[3].buffer.clone()
    step.update(state, batches[3])
    assert all(torch.equal(a, b) for a, b in zip(before, torch.utils._pytree.tree_leaves(state), strict=True))
    assert torch.equal(buffer, batches[3].buffer)


def train_against_oracle(step, groups, features, *, steps=6, micro_batches=1, sizes=(BATCH_SIZE,)) -> None:
    """Losses and every logical row of `step` against the oracle's, over several steps."""
    params = deepfm_params(len(groups["emb"]))
    state, oracle = fresh(step, params), NaiveTrainer(params, groups, seed=3, lr=1e-2)
    rng = random.Random(5)
    for _ in range(steps):
        parts = [
            random_samples(
                rng, sizes[i % len(sizes)], features=features, num_numeric=NUM_NUMERIC, ids=SMALL_IDS, longest=3
            )
            for i in range(micro_batches)
        ]
        total = 0.0
        for part in parts:
            state, aux = step.update_(state, batch_of(part))
            total += float(aux.loss) * len(part)
        everything = [s for part in parts for s in part]
        assert total / len(everything) == pytest.approx(oracle.train(everything), rel=5e-6)
    rows = rows_by_name(step, state)
    assert rows.keys() == oracle.weights.keys()
    for key, weight in oracle.weights.items():
        assert is_close(rows[key][0], weight.detach(), atol=2e-6), key
        for slot, moment in enumerate(oracle.moments[key], start=1):
            assert is_close(rows[key][slot], moment), (key, slot)
    moments = oracle.dense_moments()
    for name, p in oracle.model.params().items():
        assert is_close(state.params[name], p.detach(), atol=2e-6), name
        assert is_close(state.dense.m[name], moments[name][0]), name
        assert is_close(state.dense.v[name], moments[name][1]), name
    assert all(int(s.step) == steps for s in state.tables)


def test_step_is_a_plain_module_with_adamw_per_row():
    train_against_oracle(deepfm_step(), deepfm_groups(), FEATURES)


def test_shared_names_means_and_several_tables_in_one_step():
    step = deepfm_step(embeddings=COMBINED)
    assert len(step.plan.tables) > 1
    train_against_oracle(step, COMBINED, ("a", "b", "c", "d"))


def test_accumulation_is_the_concatenated_batch_with_unequal_counts():
    step = deepfm_step(accumulation=4)
    train_against_oracle(step, deepfm_groups(), FEATURES, steps=3, micro_batches=4, sizes=(8, 3, 5, 1))


def test_accumulation_is_one_step_on_a_batch_four_times_as_large():
    four, one = deepfm_step(accumulation=4), deepfm_step()
    a, b = fresh(four), fresh(one)
    for seed in range(3):
        parts = [samples_of(n, seed=10 * seed + n) for n in (8, 3, 5, 1)]
        for part in parts:
            a, _ = four.update_(a, batch_of(part))
        b, _ = one.update_(b, batch_of([s for part in parts for s in part], 4 * BATCH_SIZE))
        assert_same_state(a._replace(window=b.window), b)


def test_oracle_sees_a_dropped_decay():
    with pytest.raises(AssertionError):
        train_against_oracle(
            deepfm_step(sparse_optimizer=sparse_adamw(1e-2, weight_decay=0.0)), deepfm_groups(), FEATURES
        )


def test_oracle_sees_one_row_update_in_ten_skipped():
    optimizer = sparse_adamw(1e-2)

    def apply_(state: TableState, scale, due, columns, most_rows):
        skipped = state.unique_rows[: int(state.num_unique)][9::10].long()
        kept = state.rows[skipped].clone()
        state = optimizer.apply_(state, scale, due, columns, most_rows)
        state.rows[skipped] = kept
        return state

    with pytest.raises(AssertionError):
        train_against_oracle(deepfm_step(sparse_optimizer=optimizer._replace(apply_=apply_)), deepfm_groups(), FEATURES)


@pytest.mark.parametrize(("kwargs", "most"), [({}, 3 * CAPACITY), ({"max_unique": 5}, 5), ({"accumulation": 2}, 7)])
def test_the_row_optimiser_is_given_a_bound_on_the_rows_of_a_step(kwargs, most):
    """The positions of the batch where it is the whole step; otherwise what the state has room for."""
    optimizer, given = sparse_adamw(1e-2), []

    def apply_(state: TableState, scale, due, columns, most_rows):
        given.append(most_rows)
        return optimizer.apply_(state, scale, due, columns, most_rows)

    step = deepfm_step(
        sparse_optimizer=optimizer._replace(apply_=apply_),
        **{"max_unique": 7 if "accumulation" in kwargs else 500} | kwargs,
    )
    state, _ = step.update_(fresh(step), deepfm_batches(1)[0])
    step.flush_(state)
    assert given == [most] * len(given)
    assert given


def test_row_gradient_is_the_sum_over_occurrences():
    """With accumulation 2 the first micro-batch leaves its row gradients where they can be read."""
    step = deepfm_step(accumulation=2)
    state = fresh(step)
    samples = [
        Sample(1.0, [0.1, -0.2], {"a": [7, 7], "b": [7], "c": []}),
        Sample(0.0, [1.0, 0.3], {"a": [7], "b": [], "c": [8]}),
    ]
    state, _ = step.update_(state, batch_of(samples))
    oracle = NaiveTrainer(deepfm_params(), deepfm_groups(), seed=3, lr=1e-2)
    loss, _ = oracle.loss_of(samples, set())
    (loss * len(samples)).backward()
    for u in range(int(state.tables[0].num_unique)):
        row = int(state.tables[0].unique_rows[u])
        for column in step.plan.tables[0].vocabularies[int(state.tables[0].vocabularies[row])]:
            got = state.tables[0].grads[u, column.first : column.first + column.dim]
            assert is_close(got, oracle.weights[column.name, int(state.tables[0].ids[row])].grad, atol=1e-6)
    assert int(state.tables[0].num_unique) == 3


def test_flush_applies_an_incomplete_window_with_its_true_count():
    four, one = deepfm_step(accumulation=4), deepfm_step()
    a, b = fresh(four), fresh(one)
    parts = [samples_of(n, seed=n) for n in (8, 3)]
    for part in parts:
        a, _ = four.update_(a, batch_of(part))
    assert [int(s.step) for s in a.tables] == [0]
    a = four.flush_(a)
    b, _ = one.update_(b, batch_of([s for part in parts for s in part], 2 * BATCH_SIZE))
    assert not any(g.any() for g in a.window.grads.values())
    assert_same_state(a._replace(window=b.window), b)
    # An empty window, or accumulation 1, has nothing to flush.
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(a)]
    a = four.flush_(a)
    assert all(torch.equal(x, y) for x, y in zip(before, torch.utils._pytree.tree_leaves(a), strict=True))
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(b)]
    b = one.flush_(b)
    assert all(torch.equal(x, y) for x, y in zip(before, torch.utils._pytree.tree_leaves(b), strict=True))
    # The next window starts from nothing.
    more = [samples_of(n, seed=20 + n) for n in (8, 2, 8, 5)]
    for part in more:
        a, _ = four.update_(a, batch_of(part))
    b, _ = one.update_(b, batch_of([s for part in more for s in part], 4 * BATCH_SIZE))
    assert_same_state(a._replace(window=b.window), b)


def test_padding_is_not_seen():
    step = deepfm_step()
    a, b = fresh(step), fresh(step)
    for seed in range(3):
        samples = samples_of(5, seed=seed)
        a, aux_a = step.update_(a, batch_of(samples))
        b, aux_b = step.update_(b, batch_of(samples, len(samples)))
        assert_same_state(a, b)
        torch.testing.assert_close(aux_a.logit[:5], aux_b.logit)
        torch.testing.assert_close(aux_a.loss, aux_b.loss)
    assert a.metrics.sums[0] == 15


def test_prediction_is_the_logit_of_evaluation_and_changes_nothing():
    step = deepfm_step(accumulation=2)
    state = fresh(step)
    for batch in deepfm_batches(3):
        state, _ = step.update_(state, batch)
    batch = batch_of(samples_of(6, seed=1, ids=(*SMALL_IDS, 10**6)))
    request = pack({name: column for name, column in batch.items() if name != "label"})
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(state)]
    logit = step.predict(state, batch)
    without_label = step.predict(state, request)
    assert all(map(torch.equal, before, torch.utils._pytree.tree_leaves(state)))
    assert torch.equal(without_label, logit)
    assert logit.std() > 0
    assert torch.equal(logit, step.evaluate_(state, batch)[1].logit)
    message = r"feature 'label': missing, got .*, expected it"  # zeros are no labels to learn from
    with pytest.raises(ValueError, match=message):
        step.update_(state, request)


def test_the_label_is_a_feature():
    """It may be made of columns of other names."""
    steps = [deepfm_step(), deepfm_step(label="bought", features=lambda b: {**b, "bought": 1.0 - b["label"]})]
    batches = deepfm_batches(3, short_last=True)
    flipped = [pack({**batch, "label": 1.0 - batch["label"]}) for batch in batches]
    states = [fresh(step) for step in steps]
    for mine, batch in zip(flipped, batches, strict=True):
        a, _ = steps[0].update_(states[0], mine)
        b, _ = steps[1].update_(states[1], batch)
        states = [a, b]
    assert_same_state(*states, exact=True)


def test_a_sample_of_weight_two_is_two_samples():
    """With its own weight the other one's gradient is halved too: the mean is over samples."""
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0])
    samples = samples_of(4, seed=1)
    repeated = [samples[i] for i, n in enumerate(weights.int().tolist()) for _ in range(n)]
    weighted, plain = deepfm_step(sample_weight="w"), deepfm_step()
    a, b = fresh(weighted), fresh(plain)
    batch = batch_of(samples, 4)
    for _ in range(2):
        a, aux_a = weighted.update_(a, pack({**batch, "w": weights[:, None]}))
        b, aux_b = plain.update_(b, batch_of(repeated, 4))
        torch.testing.assert_close(aux_a.loss, aux_b.loss)
    for name, p in b.params.items():
        torch.testing.assert_close(a.params[name], p, rtol=1e-5, atol=1e-6)
    assert aux_a.logit[1] != 0
    without = pack({name: column for name, column in batch.items() if name != "label"})
    assert torch.equal(
        weighted.predict(a, without), weighted.evaluate_(a, pack({**batch, "w": weights[:, None]}))[1].logit
    )


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ({"forward": lambda p, e, f: e["bias"].sum((1, 2))}, {"logit": [BATCH_SIZE], "label": [BATCH_SIZE, 1]}),
        (
            {
                "forward": lambda p, e, f: e["bias"].sum((1, 2)),
                "features": lambda b: {**b, "label": b["label"].squeeze(1)},
            },
            {"logit": [BATCH_SIZE], "label": [BATCH_SIZE]},
        ),
        (
            {"sample_weight": "w", "features": lambda b: {**b, "w": b["label"].squeeze(1)}},
            {"logit": [BATCH_SIZE, 1], "label": [BATCH_SIZE, 1], "w": [BATCH_SIZE]},
        ),
    ],
)
def test_shapes_that_would_be_broadcast_are_an_error(arguments, shapes, captured):
    step, batch = deepfm_step(**arguments), deepfm_batches(1)[0]
    state = fresh(step)
    with pytest.raises((ValueError, Unsupported), match=re.escape(f"forward: got {shapes}, expected [B, 1] for each.")):
        (capture(step, state, batch) if captured else step.update_)(state, batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float64])
def test_labels_of_any_type(dtype):
    step, batch = deepfm_step(), deepfm_batches(1)[0]
    cast = pack({**batch, "label": (batch["label"] > 0).to(dtype)})
    expected = pack({**batch, "label": (batch["label"] > 0).float()})
    (_, a), (_, b) = step.update_(fresh(step), cast), step.update_(fresh(step), expected)
    assert torch.equal(a.loss, b.loss)


def test_evaluation_changes_metrics_alone_and_gives_zeros_for_unknown_ids():
    step = deepfm_step()
    state = fresh(step)
    for batch in deepfm_batches(3):
        state, _ = step.update_(state, batch)
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(state._replace(metrics=()))]
    samples = samples_of(6, seed=1, ids=(*SMALL_IDS, 10**6, 10**7))
    state = state._replace(metrics=binary_metrics().init())
    state, aux = step.evaluate_(state, batch_of(samples))
    after = torch.utils._pytree.tree_leaves(state._replace(metrics=()))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert state.metrics.histogram.sum() == 6

    rows = rows_by_name(step, state)
    pooled = {
        group: torch.stack(
            [
                torch.stack(
                    [
                        sum((rows.get((f"{group}/{f}", i), torch.zeros(3, dim))[0] for i in s.ids[f]), torch.zeros(dim))
                        for f in FEATURES
                    ]
                )
                for s in samples
            ]
        )
        for group, dim in (("emb", DIM), ("bias", 1))
    }
    logit = deepfm.forward(state.params, pooled, {"numeric": torch.tensor([s.numeric for s in samples])})
    torch.testing.assert_close(aux.logit[:6], logit, rtol=1e-5, atol=1e-6)
    label = torch.tensor([[s.label] for s in samples])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
    torch.testing.assert_close(aux.loss, loss, rtol=1e-5, atol=1e-6)


def test_ids_beyond_max_rows_use_their_initial_value_where_asked_and_are_counted():
    step = deepfm_step(max_rows=4, embeddings=deepfm_groups(unknown="initial"))
    state = fresh(step)
    samples = [Sample(1.0, [0.0, 0.0], {"a": [i], "b": [], "c": []}) for i in range(BATCH_SIZE)]
    state, aux = step.update_(state, batch_of(samples))
    assert (int(state.tables[0].num_rows), int(state.tables[0].num_refused)) == (4, 4)
    oracle = NaiveTrainer(deepfm_params(), deepfm_groups(), seed=3, lr=1e-2)
    assert is_close(aux.logit, oracle.loss_of(samples, set())[1].detach(), atol=1e-6)


def test_empty_batches_and_lists():
    step = deepfm_step()
    state = fresh(step)
    nothing = [Sample(0.0, [0.5, 0.5], {f: [] for f in FEATURES})] * 2
    state, aux = step.update_(state, batch_of(nothing))
    assert int(state.tables[0].num_rows) == 0
    assert torch.isfinite(aux.loss)


def test_learning_rate_as_a_tensor_is_read_at_every_step():
    lr = torch.tensor(1e-2)
    a_step = deepfm_step(sparse_optimizer=sparse_adamw(lr), dense_optimizer=adamw(lr))
    b_step = deepfm_step()
    batches = deepfm_batches(3)
    a, b = fresh(a_step), fresh(b_step)
    for batch in batches[:2]:
        a, b = a_step.update_(a, batch)[0], b_step.update_(b, batch)[0]
    assert_same_state(a, b)
    lr.fill_(0)
    weights = [a.params["numeric_emb"].clone(), a.tables[0].rows[:, 0].clone()]
    num_rows = int(a.tables[0].num_rows)
    a, _ = a_step.update_(a, batches[2])
    assert torch.equal(weights[0], a.params["numeric_emb"])
    assert torch.equal(weights[1][:num_rows], a.tables[0].rows[:num_rows, 0])


def test_errors():
    with pytest.raises(ValueError, match="accumulation: got 0, expected at least 1"):
        deepfm_step(accumulation=0)
    step = deepfm_step()
    batch = dict(deepfm_batches(1)[0])
    with pytest.raises(TypeError, match=r"feature 'b': got torch.float32 ids, expected torch.int64"):
        step.update_(fresh(step), batch | {"b": batch["b"]._replace(values=batch["b"].values.float())})
    with pytest.raises(TypeError, match=r"feature 'b': got Tensor of shape .*, expected Ragged i64 ids"):
        step.update_(fresh(step), batch | {"b": batch["b"].values})
    del batch["b"]
    with pytest.raises(ValueError, match="feature 'b': missing, expected Ragged i64 ids"):
        step.update_(fresh(step), batch)


def test_ids_in_and_grow():
    step = deepfm_step()
    batch = deepfm_batches(1)[0]
    assert step.ids_in(batch) == (len(FEATURES) * CAPACITY,)
    state = fresh(step)
    state = step.grow_(state, step.ids_in(batch))
    assert int(state.tables[0].num_slots) * 3 // 4 >= len(FEATURES) * CAPACITY


def peak_bytes(function) -> int:
    """Most bytes allocated at once by torch while `function` runs, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_accumulation_takes_one_micro_batch_of_memory():
    """Four micro-batches at the activation memory of one; the same samples as one batch take about four times it."""
    rng = random.Random(0)
    samples = random_samples(rng, 4096, features=FEATURES, num_numeric=NUM_NUMERIC, ids=range(300))

    def peak(accumulation: int, batch_size: int) -> int:
        step = deepfm_step(accumulation=accumulation)
        state = step.init(deepfm_params())
        parts = [samples[i : i + batch_size] for i in range(0, batch_size * accumulation, batch_size)]
        batches = [pack_samples(part, batch_size, capacity=2 * batch_size) for part in parts]
        step.grow_(state, step.ids_in(batches[0]))

        def run() -> None:
            for batch in batches:
                step.update_(state, batch)

        run()
        return peak_bytes(run)

    one, accumulated, whole = peak(1, 1024), peak(4, 1024), peak(1, 4096)
    assert accumulated < 1.5 * one
    assert whole > 2.5 * one
