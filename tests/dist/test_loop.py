"""The loop of many ranks: all stop after the same step, count all rows, and raise together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recfx import metrics
from recfx.step import TrainState
from recfx.train import evaluate
from tests.conftest import BATCH_SIZE, linear_params, linear_step
from tests.dist.launching import launch
from tests.dist.loop_of_ranks import NUM, batches_of
from tests.program.programs import PROGRAM, write_program

SCRIPT = Path(__file__).with_name("loop_of_ranks.py")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    ranks = launch(SCRIPT, ["facts", str(tmp_path_factory.mktemp("ranks"))], timeout=120)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    return [json.loads(rank.stdout) for rank in ranks]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("step", [4, "interrupted", [4], [2, 4]]),  # known with the next batch, which is trained on
        ("before", [1, "interrupted", [1], []]),
        ("end", [NUM, "interrupted", [4, 8, NUM], [2, 4, 6, 8, 10, NUM]]),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(facts, when, expected):
    assert [of_rank[when] for of_rank in facts] == [expected, expected]


def test_rows_samples_and_losses_are_those_of_all_ranks(facts):
    first, second = facts
    assert first["samples"] == second["samples"] == 2 * NUM * BATCH_SIZE
    assert first["loss"] == second["loss"]
    assert first["summary_rows"] == second["summary_rows"] == first["own_rows"] + second["own_rows"]
    assert min(first["own_rows"], second["own_rows"]) > 0


def test_an_evaluation_counts_the_rows_of_all_ranks(facts):
    assert facts[0]["evaluation"] == facts[1]["evaluation"]
    assert facts[0]["evaluation"]["num_samples"] == 2 * 3 * BATCH_SIZE


def test_ranks_decide_the_same_from_their_evaluations(facts):
    """The best one is saved; two that are worse lower the rates twice and end the run. Rank 0 writes each line once."""
    assert [of_rank["early"] for of_rank in facts] == [[9, "stop_after", 0.25, [3, 9]]] * 2
    expected = [["start", 0], ["evaluation", 3], ["evaluation", 6], ["evaluation", 9], ["end", 9]]
    assert [line for line in facts[0]["lines"] if line[0] != "log"] == expected
    assert facts[0]["line_rows"] == facts[0]["early_rows"] + facts[1]["early_rows"]


def test_a_listener_of_one_rank_stops_all(facts):
    assert [of_rank["heard"] for of_rank in facts] == [[4, "listener"]] * 2


def test_errors_on_batches_name_their_rank_on_all_ranks(facts):
    for name, place in (
        ("label", "the batch of rank 1 that follows position {'batch': 6}"),
        ("nan", "rank 1's feature"),
    ):
        assert facts[0][name] == facts[1][name]
        assert place in facts[0][name]


def test_ranks_that_differ_or_would_read_everything_are_an_error_on_all(facts):
    for of_rank in facts:
        assert of_rank["differs"].startswith("ValueError: log_steps: got 5 on rank 1, expected 4 as on rank 0.")
        assert "Use recfx.dist.streams.deal(reader, group)" in of_rank["whole"]


def test_a_rank_that_fails_before_the_first_step_ends_the_others(facts):
    assert facts[1]["fails"] == "FileNotFoundError: no file on 1"
    assert facts[0]["fails"].startswith("RankError: rank 1: got an error (no file on 1)")


def test_a_killed_rank_ends_the_other_with_one_line(tmp_path):
    first, second = launch(SCRIPT, ["die", str(tmp_path)], timeout=30)
    assert second.returncode == -9
    assert (tmp_path / "dies").exists()
    assert first.returncode == 1
    assert first.stderr.startswith("error: group: got an error")
    assert "Traceback" not in first.stderr
    assert first.stderr.count("\n") == 1


def test_one_process_counts_its_own(tmp_path):
    """The sums over ranks of a group of one are its own counts."""
    step = linear_step()
    state: TrainState = step.init(linear_params())
    batches = batches_of(0, num=3)
    values = evaluate(step.evaluate_, state, batches)
    for batch in batches:
        state, _ = step.evaluate_(state, batch)
    assert values["auc"] == metrics.auc(state.metrics)
    assert values["num_samples"] == 3 * BATCH_SIZE


def test_a_bad_argument_under_torchrun_is_one_line_a_rank(tmp_path):
    """No rank waits for another, and each line names its rank."""
    program = write_program(tmp_path, program=PROGRAM.replace("from helpers import features", "features = dict"))
    args = ["train", str(tmp_path / "nowhere"), "--program", str(program), "--output_dir", str(tmp_path / "run")]
    for number, rank in enumerate(launch("recfx", args, timeout=60)):
        assert rank.returncode == 2
        assert rank.stdout == ""
        assert rank.stderr.startswith(f"rank {number}: error: paths: got ")
        assert rank.stderr.count("\n") == 1
