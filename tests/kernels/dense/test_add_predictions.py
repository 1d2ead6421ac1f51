import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.dense import add_predictions
from tests.reference import on_threads

RANGE = 20.0
LABELS = st.sampled_from([0.0, 1.0, 0.25, 0.75, -0.0, -1e-7, 1.0001, 2.0, -1.0, math.nan, math.inf, -math.inf])
LOGITS = st.one_of(st.floats(-25, 25, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 20.0, -20.0, 0.0]))


def call(op, num_bins, logit, label, loss, valid, num_sums=6):
    histogram, sums = torch.zeros(2, num_bins, dtype=torch.int64), torch.ones(num_sums, dtype=torch.float64)
    op(histogram, sums, logit, label, loss, valid, RANGE)
    return histogram, sums


def loop(num_bins, logit, label, loss, valid):
    histogram, sums = torch.zeros(2, num_bins, dtype=torch.int64), [1.0] * 6
    for x, y, l, v in zip(*(t.flatten() for t in (logit, label, loss, valid)), strict=True):
        place = float((x + RANGE) / (2 * RANGE) * num_bins)
        bin = 0 if math.isnan(place) else int(min(max(place, 0), num_bins - 1))
        histogram[int(y > 0.5), bin] += int(v)
        both = x.isfinite() and l.isfinite()
        if v:
            sums = [a + float(b) for a, b in zip(sums, (1, y, l, x.sigmoid(), not both, not 0 <= y <= 1), strict=True)]
    return histogram, torch.tensor(sums, dtype=torch.float64)


@given(
    samples=st.lists(st.tuples(LOGITS, LABELS, st.booleans()), max_size=20),
    num_bins=st.sampled_from([1, 7, 64]),
    num_sums=st.sampled_from([5, 6]),
)
@settings(max_examples=100, deadline=None)
def test_kernel_is_definition_is_loop(samples, num_bins, num_sums):
    logit, label, valid = (torch.tensor([s[i] for s in samples]).reshape(-1, 1) for i in range(3))
    loss = torch.rand(logit.shape)
    loss[::7] = math.nan
    args = logit.float(), label.float(), loss, valid.bool()
    histogram, sums = loop(num_bins, *args)
    for op in (add_predictions.definition, add_predictions.add_predictions_):
        got = call(op, num_bins, *args, num_sums)
        assert torch.equal(got[0], histogram)
        torch.testing.assert_close(got[1], sums[:num_sums], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("batch_size", [511, 512, 513, 5000])
def test_threads_do_not_change_a_bit(batch_size):
    g = torch.Generator().manual_seed(0)
    logit, loss = (torch.randn(batch_size, 1, generator=g) for _ in range(2))
    args = 1024, logit, (logit > 1).float(), loss, loss < 1
    one, two = (on_threads(n, call, add_predictions.add_predictions_, *args) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert int(one[0].sum()) == int((loss < 1).sum())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("num_sums", [5, 6])
def test_opcheck(num_sums):
    logit = torch.randn(6, 1)
    args = (
        torch.zeros(2, 8, dtype=torch.int64),
        torch.zeros(num_sums, dtype=torch.float64),
        logit,
        logit,
        logit,
        logit > 0,
    )
    torch.library.opcheck(add_predictions.add_predictions_, (*args, RANGE))
