"""PR-AUC, entropy, calibration per bin, slices and AUC by group beside loops over the samples."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx import metrics
from recfx.capture import capture, capture_evaluation
from recfx.embeddings import Embedding, normal
from recfx.losses import bce_with_logits
from recfx.metrics import GroupedAuc, binary_metrics, gauc, sliced_metrics
from recfx.optim import adamw, sparse_adamw
from recfx.step import Task, train_step
from recfx.train import check_labels, evaluate
from recfx.train.grouped import gauc_values
from recfx.types import Ragged, pack

BINS = 2**16


def drawn(num, *, rate=0.2, spread=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logit = torch.randn(num, generator=g) * spread + math.log(rate / (1 - rate))
    return logit, (torch.rand(num, generator=g) < logit.sigmoid()).float()


def counts_of(logit, label, *more, metric=None, counts=None):
    metric = metric or binary_metrics()
    column = [t.reshape(-1, 1) for t in (logit, label, bce_with_logits(logit, label), torch.ones(len(logit)).bool())]
    return metric.update_(metric.init() if counts is None else counts, *column, *more)


def average_precision(score, label):
    """Over thresholds, from the highest score: the gain of recall times precision, as scikit-learn defines it."""
    total = recall = 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        said = score >= threshold
        new = float((said & (label > 0)).sum() / label.sum())
        total, recall = total + (new - recall) * float((said & (label > 0)).sum() / said.sum()), new
    return total


@given(pairs=st.lists(st.tuples(st.integers(-12, 12), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_pr_auc_is_average_precision(pairs):
    logit, label = (torch.tensor([float(pair[i]) for pair in pairs]) for i in (0, 1))
    got = metrics.pr_auc(counts_of(logit, label))
    assert got == pytest.approx(average_precision(logit, label) if label.any() else math.nan, nan_ok=True, rel=1e-6)


def test_pr_auc_of_random_scores_is_the_click_rate():
    logit, label = drawn(50_000)
    logit = logit[torch.randperm(len(logit), generator=torch.Generator().manual_seed(1))]
    assert metrics.pr_auc(counts_of(logit, label)) == pytest.approx(float(label.mean()), abs=0.01)


def test_normalised_entropy_is_a_ratio_of_two_losses():
    logit, label = drawn(3000)
    constant = torch.logit(label.double().mean()).expand(len(label))
    expected = bce_with_logits(logit, label).double().mean() / bce_with_logits(constant, label.double()).mean()
    assert metrics.normalised_entropy(counts_of(logit, label)) == pytest.approx(float(expected), rel=1e-6)
    assert metrics.normalised_entropy(counts_of(constant.float(), label)) == pytest.approx(1.0, rel=1e-6)
    assert math.isnan(metrics.normalised_entropy(counts_of(logit, torch.zeros(3000))))
    assert math.isnan(metrics.normalised_entropy(binary_metrics().init()))


def bins_by_hand(logit, label, num_bins):
    """Samples in order, each in the bin of its place; no two of these logits share a histogram bin."""
    found = []
    order = logit.argsort().tolist()
    for k in range(num_bins):
        own = [i for place, i in enumerate(order) if math.floor((place + 0.5) * num_bins / len(order)) == k]
        if own:
            p = [1 / (1 + math.exp(-float(logit[i]))) for i in own]
            found.append((len(own), sum(p) / len(own), sum(float(label[i]) for i in own) / len(own)))
    return found


@pytest.mark.parametrize("num_bins", [1, 7, 20, 500])
def test_calibration_bins_hold_equal_numbers_of_samples(num_bins):
    g = torch.Generator().manual_seed(2)
    logit = torch.linspace(-6, 4, 333)[torch.randperm(333, generator=g)]
    label = (torch.rand(333, generator=g) < logit.sigmoid()).float()
    counts, expected = counts_of(logit, label), bins_by_hand(logit, label, num_bins)
    found = metrics.calibration_bins(counts, num_bins)
    assert [b.num_samples for b in found] == [n for n, _, _ in expected]
    assert [b.predicted for b in found] == pytest.approx([p for _, p, _ in expected], abs=1e-4)
    assert [b.observed for b in found] == pytest.approx([y for _, _, y in expected])
    total = sum(n * abs(p - y) for n, p, y in expected) / 333
    assert metrics.ece(counts, num_bins) == pytest.approx(total, abs=1e-4)
    if num_bins <= 20:
        assert max(b.num_samples for b in found) - min(b.num_samples for b in found) <= 1


def test_ece_sees_what_calibration_does_not():
    logit, label = drawn(40_000, rate=0.3, spread=1.5)
    overconfident = 2 * logit - float((2 * logit - logit).mean())
    right, wrong = (counts_of(x, label) for x in (logit, overconfident))
    assert metrics.ece(right) < 0.02
    assert metrics.ece(wrong) > 0.05
    assert metrics.ece(counts_of(torch.full((4,), -50.0), torch.ones(4))) == pytest.approx(1.0)
    assert math.isnan(metrics.ece(binary_metrics().init()))
    with pytest.raises(ValueError, match="num_bins: got 0, expected at least 1"):
        metrics.ece(right, 0)


def test_counts_of_batches_and_ranks_add_up():
    logit, label = drawn(2000, seed=3)
    metric = binary_metrics()
    parts = [counts_of(logit[i::3], label[i::3]) for i in range(3)]
    total = type(parts[0])(*(sum(fields) for fields in zip(*parts, strict=True)))
    assert metric.read(total) == pytest.approx(metric.read(counts_of(logit, label)))


def test_one_logit_that_is_not_finite_makes_them_nan():
    logit, label = torch.tensor([0.1, math.nan, 2.0]), torch.tensor([0.0, 1.0, 1.0])
    values = binary_metrics().read(counts_of(logit, label))
    assert values.pop("num_samples") == 3
    assert values.pop("num_nonfinite") == 1
    assert all(math.isnan(value) for value in values.values())


def sliced_values(logit, label, hour, *, known, chunks=1):
    metric = sliced_metrics(by="hour", values=known, slice_bins=BINS)
    counts = metric.init()
    for part in torch.arange(len(logit)).chunk(chunks):
        counts = counts_of(logit[part], label[part], hour[part], metric=metric, counts=counts)
    return metric.read(counts)


def test_slices_are_the_metrics_of_their_samples():
    logit, label = drawn(4000, seed=4)
    hour = torch.randint(-1, 6, (4000,), generator=torch.Generator().manual_seed(5))
    values = sliced_values(logit, label, hour, known=(3, -1, 2**40, 0), chunks=3)
    whole = binary_metrics().read(counts_of(logit, label))
    assert {name: values[name] for name in whole} == pytest.approx(whole)
    slices = {3: hour == 3, -1: hour == -1, 0: hour == 0, "other": ~torch.isin(hour, torch.tensor([3, -1, 0]))}
    for of, mine in slices.items():
        own = binary_metrics().read(counts_of(logit[mine], label[mine]))
        for name in ("auc", "log_loss", "calibration", "num_samples"):
            assert values[f"{name}@hour={of}"] == pytest.approx(own[name], rel=1e-6)
    assert len(values) == len(whole) + 4 * len(slices)  # none of a slice without samples


def test_what_is_not_finite_stays_in_its_slice():
    logit, label = torch.tensor([0.5, math.nan, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    values = sliced_values(logit, label, torch.tensor([0, 0, 1, 1]), known=(0, 1))
    assert math.isnan(values["auc"])
    assert math.isnan(values["log_loss@hour=0"])
    assert (values["auc@hour=1"], values["num_samples@hour=0"]) == (1.0, 2.0)


@pytest.mark.parametrize("known", [(), tuple(range(65)), (1, 1)])
def test_slices_that_cannot_be(known):
    with pytest.raises(ValueError, match=f"values: got {len(known)} of feature 'hour', .*expected 1 to 64, each once"):
        sliced_metrics(by="hour", values=known)


def test_grouped_auc_is_that_of_all_samples_at_once():
    g = torch.Generator().manual_seed(6)
    user, score = torch.randint(-3, 9, (500,), generator=g) * 2**40, torch.randint(0, 9, (500,), generator=g) / 9
    label = torch.randint(0, 2, (500,), generator=g).float()
    parts = [GroupedAuc(), GroupedAuc()]
    for i, part in enumerate(torch.randperm(500, generator=g).split(97)):
        logit = score[part].clone()
        parts[i % 2].add(user[part][:, None], logit[:, None], label[part][:, None])
        logit.zero_()  # it keeps copies
    parts[0].merge(parts[1])
    assert parts[0].num_samples == 500
    assert parts[0].value() == pytest.approx(gauc(user, score, label))
    assert math.isnan(GroupedAuc().value())


@pytest.mark.parametrize(
    ("group", "score", "error", "message"),
    [
        ([1, 1], [0.1], ValueError, r"group, score, label: got \[2, 1, 2\] elements"),
        ([1.0, 1.0], [0.1, 0.2], TypeError, r"group: got torch.float32, expected integers"),
    ],
)
def test_grouped_auc_of_what_it_cannot_be(group, score, error, message):
    with pytest.raises(error, match=message):
        GroupedAuc().add(torch.tensor(group), torch.tensor(score), torch.tensor([0, 1]))


# In a step.


def step_of(**options):
    def forward(params, emb, feats):
        logit = emb["emb"].sum(1) @ params["w"]
        return {"click": logit, "buy": logit - 1} if "tasks" in options else logit

    return train_step(
        features=dict,
        embeddings={"emb": [Embedding("user", dim=2, init=normal(0.5)), Embedding("item", dim=2, init=normal(0.5))]},
        forward=forward,
        sparse_optimizer=sparse_adamw(5e-2),
        dense_optimizer=adamw(5e-2),
        max_rows=256,
        **options,
    )


def batches(num=3, *, ragged=False, size=16, real=13):
    made = []
    for seed in range(num):
        g = torch.Generator().manual_seed(seed)
        user, item = (torch.randint(0, n, (size, 1), generator=g) for n in (4, 20))
        label, buy = (torch.randint(0, 2, (size, 1), generator=g).float() for _ in range(2))
        made.append(
            pack(
                {
                    "user": Ragged.from_lists(user.tolist()) if ragged else user,
                    "item": item,
                    "hour": user % 2,
                    "label": label,
                    "buy": buy,
                    "shown": (item > 5).float(),
                    "num_samples": torch.tensor(real, dtype=torch.int32),
                }
            )
        )
    return made


def trained(step):
    state = step.init({"w": torch.ones(2, 1)})
    for batch in batches():
        state, _ = step.update_(state, batch)
    return state


def predictions(step, state, read):
    """User, logit and columns of all real samples."""
    found = []
    for batch in batches():
        logit = step.predict(state, batch)
        real = {name: batch[name][:13, 0] for name in ("user", "label", "buy", "shown")}
        found.append({**real, "logit": read(logit)[:13, 0]})
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


@pytest.mark.parametrize("ragged", [False, True])
def test_evaluation_gives_gauc(ragged):
    step = step_of()
    state = trained(step)
    p = predictions(step, state, lambda logit: logit)
    values = evaluate(step.evaluate_, state, batches(ragged=ragged), gauc_by="user")
    assert values["gauc"] == pytest.approx(gauc(p["user"], p["logit"], p["label"]))
    plain = evaluate(step.evaluate_, state, batches(ragged=ragged))
    assert {name: value for name, value in values.items() if name != "gauc"} == plain


def test_evaluation_gives_gauc_of_each_task_and_leaves_out_what_has_no_label():
    step = step_of(tasks={"click": Task(label="label"), "buy": Task(label="buy", mask="shown")})
    state = trained(step)
    values = evaluate(step.evaluate_, state, batches(), gauc_by="user")
    p = predictions(step, state, lambda logit: logit["click"])
    assert values["click/gauc"] == pytest.approx(gauc(p["user"], p["logit"], p["label"]))
    p = {name: t[p["shown"] > 0] for name, t in p.items()}
    assert values["buy/gauc"] == pytest.approx(gauc(p["user"], p["logit"], p["buy"]))


def test_gauc_is_over_the_samples_of_all_ranks():
    class Two:
        def gather(self, own):
            return [own, pickle.loads(pickle.dumps(other))]

    g = torch.Generator().manual_seed(7)
    user, score, label = torch.randint(0, 4, (40,), generator=g), torch.rand(40, generator=g), torch.arange(40) % 2
    own, other = GroupedAuc(), GroupedAuc()
    for part, of_rank in ((slice(0, 25), own), (slice(25, 40), other)):
        of_rank.add(user[part], score[part], label[part])
    values = gauc_values(step_of().tasks, {"": own}, Two())
    assert values == {"gauc": pytest.approx(gauc(user, score, label))}
    assert own.num_samples == 25


def test_gauc_by_what_is_not_there():
    step = step_of()
    state = trained(step)
    with pytest.raises(ValueError, match="feature 'session': missing, expected the group of each sample"):
        evaluate(step.evaluate_, state, batches(), gauc_by="session")
    with pytest.raises(TypeError, match="run: got one without `read`"):
        evaluate(lambda state, batch: step.evaluate_(state, batch), state, batches(), gauc_by="user")


def test_a_step_counts_slices():
    step = step_of(metrics=sliced_metrics(by="hour", values=[0, 1]))
    state = trained(step)
    p = predictions(step, state, lambda logit: logit)
    values = evaluate(step.evaluate_, state, batches())
    for hour in (0, 1):
        mine = p["user"] % 2 == hour
        assert values[f"num_samples@hour={hour}"] == int(mine.sum())
        expected = float(bce_with_logits(p["logit"][mine], p["label"][mine]).mean())
        assert values[f"log_loss@hour={hour}"] == pytest.approx(expected, rel=1e-5)
    assert int(state.metrics.slice_sums[:, 0].sum()) == int(state.metrics.sums[0]) == 39


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_captured_step_counts_the_same_slices(backend):
    step = step_of(metrics=sliced_metrics(by="hour", values=[0, 1]))
    expected, state = trained(step), step.init({"w": torch.ones(2, 1)})
    run = capture(step, state, batches(1)[0], backend=backend)
    for batch in batches():
        state, _ = run(state, batch)
    assert torch.equal(state.metrics.slice_histogram.sum((1, 2)), expected.metrics.slice_histogram.sum((1, 2)))
    torch.testing.assert_close(state.metrics.slice_sums, expected.metrics.slice_sums, rtol=1e-4, atol=1e-6)
    evaluate_ = capture_evaluation(step, state, batches(1)[0], backend=backend)
    one, other = (evaluate(run, state, batches(), gauc_by="user") for run in (evaluate_, step.evaluate_))
    assert one == pytest.approx(other, rel=1e-4)


def test_labels_of_a_step_that_counts_slices_are_checked():
    step = step_of(metrics=sliced_metrics(by="hour", values=[0, 1]))
    state = trained(step)
    check_labels(step, state)
    bad = dict(batches(1)[0])
    bad["label"] = bad["label"].clone()
    bad["label"][0] = 2.0
    state, _ = step.update_(state, pack(bad))
    with pytest.raises(ValueError, match="feature 'label': got 1 label outside"):
        check_labels(step, state)


@pytest.mark.parametrize(
    ("feature", "error", "message"),
    [
        (None, ValueError, "feature 'hour': missing, expected the slice of each sample"),
        (torch.ones(16, 1), TypeError, "feature 'hour': got torch.float32, expected integers"),
    ],
)
def test_a_feature_that_has_no_slices(feature, error, message):
    step = step_of(metrics=sliced_metrics(by="hour", values=[0, 1]))
    batch = dict(batches(1)[0])
    batch = {name: t for name, t in batch.items() if name != "hour"} | ({} if feature is None else {"hour": feature})
    with pytest.raises(error, match=message):
        step.update_(step.init({"w": torch.ones(2, 1)}), pack(batch))
