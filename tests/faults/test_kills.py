"""kill -9 at random moments of saving and of training."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("num_kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_is_never_killed(num_kills, capsys):
    command = [sys.executable, "-m", "tests.faults.kills", str(num_kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{counts}")
    assert counts["kills"] >= num_kills
    assert counts["runs"] == counts["equal"] >= 2
    assert 0 < counts["while_saving"] < counts["kills"]
