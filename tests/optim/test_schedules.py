"""Learning rates: closed forms, and torch's own schedulers."""

import math

import pytest
import torch

from recfx import optim
from recfx.optim import schedules
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step

STEPS = torch.arange(40, dtype=torch.float64)


def values(schedule) -> list[float]:
    """Step by step, as an optimiser asks."""
    out = [schedule(step) for step in STEPS]
    assert all(v.shape == () and v.dtype == torch.float64 for v in out)
    return [float(v) for v in out]


def of_torch(build, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, out = build(optimizer), []
    for _ in STEPS:
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_schedules_are_torch_s():
    lr_scheduler = torch.optim.lr_scheduler
    linear = of_torch(lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=15), 0.5)
    assert values(schedules.linear(0.5, 0.1, 15)) == pytest.approx(linear, rel=1e-9)
    cosine = of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=39, eta_min=0.1), 0.5)
    assert values(schedules.cosine(0.5, 39, 0.1)) == pytest.approx(cosine, rel=1e-9)
    exponential = of_torch(lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9 ** (1 / 7)), 0.5)
    assert values(schedules.exponential(0.5, 0.9, 7)) == pytest.approx(exponential, rel=1e-9)
    steps = of_torch(lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 20], gamma=0.1), 0.5)
    assert values(schedules.piecewise([0.5, 0.05, 0.005], [3, 20])) == pytest.approx(steps, rel=1e-9)
    assert values(schedules.constant(0.5)) == [0.5] * len(STEPS)


def test_ends():
    cosine = values(schedules.cosine(1.0, 10, 0.25))
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.625)
    assert cosine[10:] == pytest.approx([0.25] * 30)


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5), schedules.cosine(0.5, 20)], ids=["float", "tensor", "schedule"])
def test_warm_up_then_what_follows(lr):
    got = values(schedules.warm_up(lr, 4))
    assert got[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    after = values(lr)[: len(STEPS) - 4] if callable(lr) else [0.5] * 36
    assert got[4:] == pytest.approx(after)


@pytest.mark.parametrize("sparse", [optim.sparse_adamw, optim.sparse_sgd, optim.sparse_rowwise_adagrad])
def test_a_schedule_is_a_tensor_set_by_hand(sparse):
    """The step's number, not the call's: both micro-batches of a window see the same rate."""
    schedule, lr = schedules.warm_up(schedules.linear(0.1, 0.0, 3), 2), torch.tensor(0.0).double()
    one = deepfm_step(sparse_optimizer=sparse(schedule), dense_optimizer=optim.sgd(schedule), accumulation=2)
    other = deepfm_step(sparse_optimizer=sparse(lr), dense_optimizer=optim.sgd(lr), accumulation=2)
    a, b = one.init(deepfm_params()), other.init(deepfm_params())
    for i, batch in enumerate(deepfm_batches(8)):
        lr.fill_(schedule(torch.tensor(float(i // 2), dtype=torch.float64)))
        a, _ = one.update_(a, batch)
        b, _ = other.update_(b, batch)
    assert torch.equal(a.tables[0].rows[:, 0], b.tables[0].rows[:, 0])
    assert torch.equal(a.params["numeric_emb"], b.params["numeric_emb"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.constant(-1.0), "lr: got -1.0, expected 0 <= lr < inf"),
        (lambda: schedules.linear(1.0, math.nan, 3), "end: got nan, expected 0 <= end < inf"),
        (lambda: schedules.cosine(1.0, 0), "num_steps: got 0, expected 1 <= num_steps < inf"),
        (lambda: schedules.exponential(1.0, -0.5, 2), "factor: got -0.5, expected 0 <= factor < inf"),
        (lambda: schedules.warm_up(0.1, 0), "num_steps: got 0, expected 1 <= num_steps"),
        (lambda: schedules.piecewise([1.0, 0.5], [3, 5]), r"boundaries: got \[3, 5\], expected 1 rising ones"),
        (lambda: schedules.piecewise([1.0, 0.5, 0.1], [5, 3]), r"boundaries: got \[5, 3\], expected 2 rising ones"),
        (lambda: schedules.piecewise([1.0, -0.5], [3]), r"values\[1\]: got -0.5, expected 0 <="),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
