"""What a program reads of torchrun's environment: restarted workers, streams of a checkpoint, who prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recfx.dist import current
from recfx.program import ranks


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def write_checkpoint(folder: Path, *, by_ranks: bool = False, **loop: object) -> None:
    inner = folder / "step-000000004" / ("rank-00000" if by_ranks else "")
    inner.mkdir(parents=True)
    (folder / "step-000000004" / "manifest.json").write_text("{}")
    (inner / "manifest.json").write_text(json.dumps({"loop": {"step": 4, **loop}}))


@pytest.mark.parametrize("by_ranks", [False, True])
def test_a_run_that_goes_on_keeps_its_streams(tmp_path, by_ranks):
    write_checkpoint(tmp_path, by_ranks=by_ranks, streams=4)
    assert ranks.join_ranks(tmp_path, resume=True).streams == 4
    assert ranks.join_ranks(tmp_path, resume=True, streams=4).streams == 4
    assert ranks.join_ranks(tmp_path).streams == 1
    assert current() is None


def test_other_streams_than_the_checkpoints_are_an_error(tmp_path):
    write_checkpoint(tmp_path, streams=4)
    with pytest.raises(ValueError, match=r"^streams: got 3, expected 4 as in the checkpoint"):
        ranks.join_ranks(tmp_path, resume=True, streams=3)
    with pytest.raises(ValueError, match=r"^deterministic: got True, expected False as in the checkpoint"):
        ranks.join_ranks(tmp_path, resume=True, deterministic=True)


def test_a_run_that_has_ended_leaves_the_streams_free(tmp_path):
    write_checkpoint(tmp_path, streams=4, ended=True)
    assert ranks.join_ranks(tmp_path, resume=True, streams=3).streams == 3


def test_a_worker_is_restarted_where_its_launch_has_trained(tmp_path, monkeypatch):
    ranks.mark_launch(tmp_path)
    assert not list(tmp_path.iterdir())  # without torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ranks.mark_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not ranks.is_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.is_restarted(tmp_path)
    assert not ranks.is_restarted(tmp_path / "other")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    assert not ranks.is_restarted(tmp_path)


def test_errors_name_the_rank_where_there_are_several(monkeypatch):
    assert (ranks.rank_prefix(), ranks.is_first_process()) == ("", True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (ranks.rank_prefix(), ranks.is_first_process()) == ("rank 1: ", False)
