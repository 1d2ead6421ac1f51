import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx import metrics
from recfx.losses import bce_with_logits
from recfx.metrics import auc, binary_metrics, calibration, gauc, log_loss
from recfx.recis import auc_200, threshold_auc
from tests.by_definition import by_definition
from tests.reference import exact_auc

LABELS = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 1, 1]).float()
PREDICTIONS = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


def counts_of(logit, label, *, valid=None, state=None, metrics=None, spelling="update_"):
    metrics = metrics or binary_metrics()
    valid = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
    column = [t.reshape(-1, 1) for t in (logit, label, bce_with_logits(logit, label), valid)]
    update = metrics.update_ if spelling == "update_" else pure(metrics)
    return update(metrics.init() if state is None else state, *column)


def pure(metrics):
    return lambda counts, *columns: by_definition(metrics.update_, counts, *columns)[0]


def clicks(num, *, rate, spread, seed=0):
    """Logits around a click rate, and labels drawn from them."""
    g = torch.Generator().manual_seed(seed)
    logit = torch.randn(num, generator=g) * spread + math.log(rate / (1 - rate)) - spread**2 / 2
    return logit, (torch.rand(num, generator=g) < logit.sigmoid()).float()


@given(
    rows=st.lists(st.tuples(st.sampled_from([-(2**63), 3, 2**62 + 1]), st.integers(0, 3), st.booleans()), max_size=40)
)
@settings(max_examples=100, deadline=None)
def test_gauc_is_the_mean_of_exact_aucs(rows):
    total = num = 0.0
    for group in {g for g, _, _ in rows}:
        score = torch.tensor([s for g, s, _ in rows if g == group]).float()
        label = torch.tensor([y for g, _, y in rows if g == group]).float()
        if 0 < label.sum() < len(label):
            total, num = total + len(label) * exact_auc(score, label), num + len(label)
    group = torch.tensor([g for g, _, _ in rows], dtype=torch.int64)
    score, label = (torch.tensor([row[i] for row in rows]).float() for i in (1, 2))
    assert gauc(group, score, label) == pytest.approx(total / num if num else math.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("group", "score", "label", "error", "message"),
    [
        ([1, 1], [0.1], [0, 1], ValueError, r"group, score, label: got \[2, 1, 2\] elements, expected as many"),
        ([1, 1], [0.1, 0.2], [0, 1, 1], ValueError, r"got \[2, 2, 3\] elements"),
        ([1.0, 1.0], [0.1, 0.2], [0, 1], TypeError, r"group: got torch.float32, expected integers"),
    ],
)
def test_gauc_of_what_it_cannot_be(group, score, label, error, message):
    with pytest.raises(error, match=message):
        gauc(torch.tensor(group), torch.tensor(score), torch.tensor(label))


def test_auc_is_exact_at_a_click_rate_of_a_tenth_of_a_percent():
    logit, label = clicks(1_000_000, rate=1e-3, spread=0.55)
    exact = exact_auc(logit, label)
    assert 8e-4 < label.mean() < 1.2e-3
    assert 0.6 < exact < 0.7
    assert abs(auc(counts_of(logit, label)) - exact) < 1e-3

    init, update = threshold_auc()
    counts = init()
    for chunk in range(0, len(logit), 100_000):
        part = slice(chunk, chunk + 100_000)
        counts = update(counts, logit[part].sigmoid(), label[part])
    assert auc_200(counts) < exact - 0.05  # why the other one is the default


@pytest.mark.parametrize(("rate", "spread"), [(0.03, 1.0), (0.5, 3.0), (1e-3, 0.1)])
def test_auc_over_many_batches(rate, spread):
    logit, label = clicks(100_000, rate=rate, spread=spread)
    state = None
    for part in torch.arange(100_000).split(7919):
        state = counts_of(logit[part], label[part], state=state)
    assert abs(auc(state) - exact_auc(logit, label)) < 1e-3


@given(pairs=st.lists(st.tuples(st.integers(-10, 10), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
def test_auc_counts_ties_as_half(pairs):
    logit = torch.tensor([float(x) for x, _ in pairs])
    label = torch.tensor([float(y) for _, y in pairs])
    got = auc(counts_of(logit, label))
    assert math.isnan(got) if label.unique().numel() == 1 else got == pytest.approx(exact_auc(logit, label))


def test_auc_of_logits_out_of_range_keeps_the_order_of_its_ends():
    logit, label = torch.tensor([-1e6, -30.0, 30.0, 1e6]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert auc(counts_of(logit, label)) == 1
    assert auc(counts_of(-logit, label)) == 0


def test_200_thresholds_give_the_contract_number():
    """This value is also the exact AUC of these ten samples: 19 of 24 pairs."""
    init, update = threshold_auc()
    counts = update(init(), PREDICTIONS[:, None], LABELS[:, None])
    assert auc_200(counts) == pytest.approx(0.791667, abs=1e-6)
    assert exact_auc(PREDICTIONS, LABELS) == pytest.approx(19 / 24)
    assert auc(counts_of(PREDICTIONS.logit(), LABELS)) == pytest.approx(19 / 24)
    assert counts.dtype == torch.int64
    assert counts[:, 0].tolist() == [6, 4]
    assert counts[:, -1].tolist() == [0, 0]
    in_two = update(update(init(), PREDICTIONS[:3], LABELS[:3]), PREDICTIONS[3:], LABELS[3:])
    assert torch.equal(counts, in_two)


def test_a_prediction_at_a_threshold_is_not_above_it():
    """The ends are a little outside, so that 0 is above the first and 1 is not above the last."""
    init, update = threshold_auc()
    _, positives = update(init(), torch.tensor([0.0, 100 / 199, 1.0]), torch.ones(3))
    assert positives[[0, 1, 99, 100, 101, 198, 199]].tolist() == [3, 2, 2, 1, 1, 1, 0]


def test_200_thresholds_of_one_class_are_what_the_small_number_makes_of_them():
    """Without a click every true positive rate is 1e-6 / 1e-6, without a non-click every false one 0."""
    init, update = threshold_auc()
    predictions = torch.tensor([0.2, 0.7])
    assert auc_200(update(init(), predictions, torch.zeros(2))) == pytest.approx(1, abs=1e-6)
    assert auc_200(update(init(), predictions, torch.ones(2))) == 0


def test_200_thresholds_are_the_written_out_form():
    logit, label = clicks(2000, rate=0.2, spread=1.0)
    probability = logit.sigmoid()
    init, update = threshold_auc()
    points = []
    for t in [-1e-7, *(i / 199 for i in range(1, 199)), 1 + 1e-7]:
        above = probability.double() > t
        tp, fp = int((above & (label > 0)).sum()), int((above & (label == 0)).sum())
        num_clicks = int(label.sum())
        points.append((fp / (len(label) - num_clicks + 1e-6), (tp + 1e-6) / (num_clicks + 1e-6)))
    expected = sum((a[0] - b[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert auc_200(update(init(), probability, label)) == pytest.approx(expected, abs=1e-5)


def test_log_loss_and_calibration():
    logit, label = clicks(5000, rate=0.1, spread=1.0)
    state = counts_of(logit, label)
    assert log_loss(state) == pytest.approx(float(bce_with_logits(logit, label).double().mean()), rel=1e-6)
    assert calibration(state) == pytest.approx(float(logit.sigmoid().double().sum() / label.sum()), rel=1e-6)
    assert math.isnan(log_loss(binary_metrics().init()))
    assert math.isnan(calibration(binary_metrics().init()))


def test_counts_are_integers_and_do_not_saturate():
    state = counts_of(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert state.histogram.dtype == torch.int64
    state.histogram[:, 2**15] = 2**24
    state = counts_of(torch.zeros(2), torch.tensor([0.0, 1.0]), state=state)
    assert state.histogram[:, 2**15].tolist() == [2**24 + 1] * 2


@pytest.mark.parametrize("garbage", [1e30, math.nan])
def test_padding_is_ignored(garbage):
    logit, label = clicks(50, rate=0.3, spread=1.0)
    padded = [torch.cat([t, torch.full((14,), garbage)]) for t in (logit, label)]
    loss = torch.cat([bce_with_logits(logit, label), torch.full((14,), garbage)])
    valid = torch.arange(64)[:, None] < 50
    metrics = binary_metrics()
    a = pure(metrics)(metrics.init(), padded[0][:, None], padded[1][:, None], loss[:, None], valid)
    b = counts_of(logit, label)
    assert torch.equal(a.histogram, b.histogram)
    torch.testing.assert_close(a.sums, b.sums)


def test_update_is_update_and_leaves_its_input():
    pure = in_place = None
    for seed in range(3):
        logit, label = clicks(500, rate=0.3, spread=1.0, seed=seed)
        valid = torch.rand(500) < 0.8
        before = None if pure is None else [t.clone() for t in pure]
        new = counts_of(logit, label, valid=valid, state=pure, spelling="update")
        assert before is None or all(torch.equal(a, b) for a, b in zip(before, pure, strict=True))
        pure, in_place = new, counts_of(logit, label, valid=valid, state=in_place, spelling="update_")
        assert torch.equal(pure.histogram, in_place.histogram)
        torch.testing.assert_close(pure.sums, in_place.sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logit", "loss"])
def test_one_number_that_is_not_finite_makes_every_metric_nan_and_is_counted(bad, where):
    binary = metrics.binary_metrics()
    logit, label = torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([[1.0], [0.0], [1.0]])
    loss, valid = torch.full((3, 1), 0.5), torch.tensor([[True], [True], [False]])
    counts = binary.update_(binary.init(), logit, label, loss, valid)
    values = metrics.auc, metrics.log_loss, metrics.calibration
    assert [f(counts) for f in values[:2]] == [1.0, 0.5]
    {"logit": logit, "loss": loss}[where][2] = bad  # of padding
    counts = binary.update_(counts, logit, label, loss, valid)
    assert metrics.num_nonfinite(counts) == 0
    {"logit": logit, "loss": loss}[where][1] = bad
    for update in (pure(binary), binary.update_):
        after = update(counts, logit, label, loss, valid)
        assert metrics.num_nonfinite(after) == 1
        assert all(math.isnan(f(after)) for f in values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gauc_of_a_score_that_is_not_finite_is_nan(bad):
    group, label = torch.tensor([1, 1, 2, 2]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert metrics.gauc(group, torch.tensor([0.1, 0.2, 0.3, 0.4]), label) == 1.0
    assert math.isnan(metrics.gauc(group, torch.tensor([0.1, 0.2, bad, 0.4]), label))


def test_labels_outside_0_to_1_are_counted_unless_the_count_is_left_out():
    binary, ones = metrics.binary_metrics(), torch.ones(6, 1)
    label = torch.tensor([[0.0], [1.0], [0.5], [-0.5], [math.nan], [2.0]])
    valid = torch.tensor([[True]] * 5 + [[False]])
    for update in (pure(binary), binary.update_):
        counts = update(binary.init(), ones, label, ones, valid)
        assert metrics.num_bad_labels(counts) == 2
        counts = update(binary.init()._replace(sums=torch.zeros(5, dtype=torch.float64)), ones, label, ones, valid)
        assert (metrics.num_bad_labels(counts), float(counts.sums[0])) == (0, 5)
    with pytest.raises(TypeError, match=r"counts: got .*, expected .*BinaryCounts. Those of a training state"):
        metrics.num_bad_labels(ones)
