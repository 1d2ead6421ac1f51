"""For pytest: the operators on CPU tensors are the GPU's kernels, run on the machine.

`RECFX_ORDER=threads-0 python -m pytest -p tests.machine.plugin tests/test_step.py`: mode and seed of the order. The run
fails if a kernel raced, whatever its tests say.
"""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

import recfx.layers
import recfx.step
from bench.triton_sm90 import calls
from recfx.kernels import order_ids
from recfx.kernels.op import library
from tests.kernels.gpu.cases import unmeant
from tests.machine.machine import Report, running


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """The operators on CPU tensors are the GPU's kernels, and steps and tables choose what they choose on CUDA: to be
    called while the machine is `running`."""
    library()  # registers what is replaced here
    kernels = torch.library.Library("recfx", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Warning only once for all operators", UserWarning
        )  # torch says what it replaces
        for module, name in calls((8, 1)):
            function = getattr(importlib.import_module(f"recfx.kernels.gpu.{module}"), name)
            kernels.impl(name, function, "CPU", allow_override=True)
    with (
        mock.patch.object(recfx.step, "FUSED_ON", ("cpu", "cuda")),
        mock.patch.object(recfx.layers, "LOOPS_ON", ("cpu", "cuda")),
        mock.patch.object(order_ids, "uses_ends", return_value=True),
    ):
        yield
    kernels._destroy()


_stack, _reports = ExitStack(), list[Report]()


def pytest_configure(config: pytest.Config) -> None:
    mode, seed = os.environ.get("RECFX_ORDER", "threads-0").split("-")
    _stack.enter_context(kernels_on_cpu())
    _reports.append(_stack.enter_context(running(mode=mode, seed=int(seed))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    (report,) = _reports
    launches = sum(c.launches for c in report.kernels.values())
    terminalreporter.write_line(f"{launches} launches of {len(report.kernels)} kernels")
    for race in unmeant(report.races):
        terminalreporter.write_line(race)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unmeant(_reports[0].races):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()
