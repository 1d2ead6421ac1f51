"""Where the tests of the Triton kernels run: `cases.py`."""

import pytest
import torch

from tests.kernels.gpu import cases


@pytest.fixture(params=[*cases.ORDERS, pytest.param(cases.DEVICE, marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """Every launch of a test on the machine, or on a GPU. Fails at the end of a test whose kernels race."""
    if request.param == cases.DEVICE:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        monkeypatch.setattr(cases, "on_gpu", True)
        yield cases.DEVICE
        return
    from tests.machine import machine

    mode, seed = request.param
    with machine.running(seed=seed, mode=mode) as report:
        yield "cpu"
    assert not cases.unmeant(report.races)
