"""Time by part: each second belongs to one part, and a step has the parts that are timed."""

import json

import pytest

from bench.dist_parts import EXCHANGES, PARTS, REST, WAITING, Stopwatch
from recfx.examples.criteo_synthetic import generate
from tests.dist.launching import launch


def test_a_second_belongs_to_the_innermost_part():
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    watch = Stopwatch(lambda: next(times))
    with watch.part("outer"), watch.part("inner"):
        pass
    assert watch.seconds == {"outer": (3.0 - 1.0) + (15.0 - 7.0), "inner": 7.0 - 3.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "log"
    generate(folder, rows_per_file=1300, train_files=1, eval_files=1, seed=1)
    return str(folder / "train")


def test_two_ranks_have_all_parts(files):
    ranks = launch("bench.dist_parts", [files, "64"], timeout=100)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    assert ranks[1].stdout == ""
    found = json.loads(ranks[0].stdout)
    of_ranks = {name for _, _, name in PARTS} | set(EXCHANGES.values()) | {REST, WAITING}
    assert set(found) == of_ranks | {"the step"}
    assert all(ms > 0 for ms in found.values())
    assert found["the step"] == pytest.approx(sum(ms for name, ms in found.items() if name != "the step"))
