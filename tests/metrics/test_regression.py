"""The metrics of numbers beside numpy."""

import math

import numpy as np
import pytest
import torch

from recfx.losses import poisson, squared_error
from recfx.metrics import metric_of, regression_metrics


@pytest.mark.parametrize("loss", [squared_error, poisson])
def test_values_are_those_of_numpy(loss):
    rng = np.random.default_rng(0)
    metric, logits, labels = metric_of(loss), [], []
    counts = metric.init()
    for real in (5, 8):
        logit, label = (torch.tensor(rng.normal(size=(8, 1)), dtype=torch.float32) for _ in range(2))
        valid = torch.arange(8)[:, None] < real
        metric.update_(counts, logit, label, loss(logit, label), valid)
        logits.append(logit[:real, 0].double().numpy())
        labels.append(label[:real, 0].double().numpy())
    logit, label = np.concatenate(logits), np.concatenate(labels)
    prediction = np.exp(logit) if loss is poisson else logit
    values = metric.read(counts)
    assert values["num_samples"] == 13
    assert values["rmse"] == pytest.approx(math.sqrt(np.mean((prediction - label) ** 2)))
    assert values["r2"] == pytest.approx(1 - np.sum((prediction - label) ** 2) / np.sum((label - label.mean()) ** 2))
    assert values["calibration"] == pytest.approx(prediction.sum() / label.sum())
    each = prediction - label * logit if loss is poisson else (prediction - label) ** 2
    assert values["loss"] == pytest.approx(each.mean(), rel=1e-6)


def test_what_is_not_finite_is_counted():
    metric = regression_metrics()
    logit = torch.tensor([[1.0], [math.nan], [math.inf]])
    valid = torch.tensor([[True], [True], [False]])
    values = metric.read(metric.update_(metric.init(), logit, torch.zeros(3, 1), logit.square(), valid))
    assert (values["num_samples"], values["num_nonfinite"]) == (2, 1)
    assert math.isnan(values["loss"])
    assert math.isnan(metric.read(metric.init())["rmse"])
