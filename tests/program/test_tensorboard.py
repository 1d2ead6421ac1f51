"""The curves of a run for TensorBoard."""

from __future__ import annotations

import sys

import pytest

from recfx.program.tensorboard import TensorBoard
from tests.loop import go, reader_of


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_curves_are_in_the_event_file(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    _, progress = go(
        tmp_path,
        reader_of(4),
        log_steps=2,
        listener=board.on_event,
        evaluate_with=lambda _: {"auc": 0.7, "num_samples": 9},
    )
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/auc", "train/log_loss", "eval/auc", "rows/0"} <= set(events.Tags()["scalars"])
    assert not [tag for tag in events.Tags()["scalars"] if "num_samples" in tag]
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(progress.loss)
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("eval/auc")] == [(4, 0.7)]
