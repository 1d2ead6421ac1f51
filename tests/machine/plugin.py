"""For pytest: the operators on CPU tensors are the GPU's kernels, run on the machine.

`RECFX_ORDER=threads-0 python -m pytest -p tests.machine.plugin tests/test_step.py`: mode and seed of the order. A
test after which a kernel has raced fails, whatever it says itself. It may be run by several processes (`-n 2`).
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import recfx.layers.products
import recfx.step.update
from bench.triton_sm90 import calls
from recfx.kernels.lists import order_ids
from recfx.kernels.op import gpu_function, library
from tests.kernels.gpu.cases import unmeant
from tests.machine.machine import Report, running


def uses_ends(device: torch.device) -> bool:
    """`order_ids.uses_ends` on CUDA; a function, which Dynamo can read."""
    return True


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """The operators on CPU tensors are the GPU's kernels, and steps and tables choose what they choose on CUDA: to be
    called while the machine is `running`."""
    library()  # registers what is replaced here
    kernels = torch.library.Library("recfx", "IMPL")
    with warnings.catch_warnings():
        # torch says what it replaces.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for _module, name in calls((8, 1)):
            function = gpu_function(name)
            kernels.impl(name, function, "CPU", allow_override=True)
    with (
        mock.patch.object(recfx.step.update, "FUSED_ON", ("cpu", "cuda")),
        mock.patch.object(recfx.layers.products, "LOOPS_ON", ("cpu", "cuda")),
        mock.patch.object(order_ids, "uses_ends", uses_ends),
    ):
        yield
    kernels._destroy()


_stack, _reports, _launches = ExitStack(), list[Report](), Counter[str]()


def pytest_configure(config: pytest.Config) -> None:
    mode, seed = os.environ.get("RECFX_ORDER", "threads-0").split("-")
    _stack.enter_context(kernels_on_cpu())
    _reports.append(_stack.enter_context(running(mode=mode, seed=int(seed))))


def pytest_runtest_teardown() -> None:
    """Here and not at the end of the run: what a worker says then, pytest-xdist does not hear."""
    races = unmeant(_reports[0].races)
    _reports[0].races.clear()
    assert not races, "\n".join(races)


def pytest_sessionfinish(session: pytest.Session) -> None:
    _launches.update({name: c.launches for name, c in _reports[0].kernels.items()})
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = dict(_launches)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _launches.update(getattr(node, "workeroutput", {}).get("launches", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{_launches.total()} launches of {len(_launches)} kernels")
    terminalreporter.write_line(", ".join(f"{name} {n}" for name, n in sorted(_launches.items())))


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()
