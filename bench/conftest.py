"""The claims of a benchmark session: tests add to them, the end of the session prints and writes them."""

from __future__ import annotations

import pytest

from bench.harness import NUM_THREADS, Claims, use_threads
from recfx.environment import wait_briefly

CLAIMS = pytest.StashKey[Claims]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CLAIMS] = Claims()
    wait_briefly()  # as the programs do, before torch is imported


@pytest.fixture(scope="session")
def claims(request: pytest.FixtureRequest) -> Claims:
    return request.config.stash[CLAIMS]


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    import torch
    from torch._inductor import config as inductor

    inductor.cpp.enable_kernel_profile = True  # loops by their names in a profile; without one some 20 ns each
    use_threads(NUM_THREADS)
    torch.set_num_threads(NUM_THREADS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    claims = config.stash[CLAIMS]
    if claims.claims or claims.notes:
        terminalreporter.section("claims (ratio > 1: recfx ahead)")
        terminalreporter.write_line(claims.table())
    if claims.claims:
        claims.write()
