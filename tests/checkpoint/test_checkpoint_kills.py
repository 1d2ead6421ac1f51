"""Two real ranks of which one is killed in a save: what was saved before is whole, and the next run goes on from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recfx.checkpoint import Saver, diff, latest, load, save
from recfx.step import Step
from tests.checkpoint.rank_saves import KILLS, change
from tests.checkpoint.rank_training import LIFE
from tests.checkpoint.test_checkpoint import fresh, some_state, steps
from tests.checkpoint.test_checkpoint_load import content
from tests.checkpoint.test_checkpoint_ranks import all_bytes
from tests.conftest import deepfm_step
from tests.dist.launching import launch

ROOT = Path(__file__).parents[2]
QUICK = [
    "a file of rank 1",
    "before the rename",
    "a file of the child of rank 1",
    "rank 1 while its child writes",
    "rank 0 while its child waits",
    "rank 1 and its child",
]


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step()


def check(step: Step, folder: Path, names: list[str]) -> None:
    base = save(folder / "one", step, some_state(step), number=8, loop={})
    state, _ = load(base, step, fresh(step))
    change(state)
    after = save(folder / "after", step, state, number=9, loop={})
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.rank_saves", str(folder), str(base), *names]
    done = subprocess.run(command, timeout=200, check=True, capture_output=True, text=True, cwd=ROOT)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [said["name"] for said in found] == names
    for said in found:
        rank, _, where, _, processes = KILLS[said["name"]]
        in_child = KILLS[said["name"]][1] and processes == "self"
        assert said["statuses"][rank] == (1 if in_child else -9), said
        assert said["statuses"][1 - rank] == 1, said
        other = said["said"][1 - rank].splitlines()[0]
        if in_child:
            assert all("ended by signal 9. The checkpoint is not there" in text for text in said["said"]), said
            assert f"rank {rank}: " in other, said
        else:
            assert other.startswith("RankError: "), said
        assert said["seconds"] < 30, said
        run = folder / said["name"].replace(" ", "-")
        is_there = where == "delete_older"
        with Saver(run, step):  # as the next run does
            left = [path.name for path in steps(run)]
        found_at = latest(run)
        assert found_at is not None, said
        if is_there:
            assert left == ["step-000000008", "step-000000009"], said
        else:
            assert left[0] == "step-000000008", (left, said)
            assert left[1:] in ([], ["step-000000009"]), (left, said)
        assert diff(run / "step-000000008", base) == [], said
        if len(left) == 2:
            assert diff(found_at, after) == [], said


def test_a_rank_that_is_killed_in_a_save_loses_only_that_save(step, tmp_path):
    check(step, tmp_path, QUICK)


@pytest.mark.slow
def test_killed_at_every_point_of_a_save(step, tmp_path):
    check(step, tmp_path, list(KILLS))


def test_ranks_that_train_save_and_go_on(tmp_path):
    """Real steps, admission and eviction included: stopped and resumed, the same bytes; any number of ranks loads."""
    ranks = launch(Path(__file__).with_name("rank_training.py"), [str(tmp_path)], timeout=120)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    names = ["step-000000004", "step-000000008", "step-000000012"]
    assert [path.name for path in steps(whole)] == [path.name for path in steps(stopped)] == names
    first, middle, last = (diff(whole / name, stopped / name) for name in names)
    assert first == last == []
    assert [line.partition(":")[0] for line in middle] == ["loop"]  # where the stopped run ended
    assert all_bytes(whole / names[0]) == all_bytes(stopped / names[0])
    step = deepfm_step(life=LIFE)
    one, _ = load(whole / names[2], step, fresh(step))
    merged: dict = {}
    for rank in range(3):
        part, _ = load(whole / names[2], step, fresh(step), rank=rank, world_size=3)
        merged |= content(step, part)
    assert merged == content(step, one)
    again = save(tmp_path / "one", step, one, number=12, loop=loop_of(whole / names[2]))
    assert diff(again, whole / names[2]) == []


def loop_of(path: Path) -> dict:
    loop = json.loads((path / "manifest.json").read_text())["loop"]
    return {name: value for name, value in loop.items() if name != "step"}
