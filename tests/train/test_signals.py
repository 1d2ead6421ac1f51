"""What ctrl-C does to a run."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch

from recfx.step import TrainState
from recfx.train import TrainConfig, train
from recfx.types import Batch
from tests.conftest import deepfm_step
from tests.loop import Log, fresh, go, interrupt, reader_of, saved


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("event", ["before_step", "log", "after_step"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ctrl_c_finishes_the_step_saves_and_says_so(tmp_path, event, accumulation):
    log = Log((event, 3), interrupt)
    reader = reader_of(12)
    before = signal.getsignal(signal.SIGINT)
    state, progress = go(
        tmp_path, reader, accumulation=accumulation, listener=log, log_steps=1,
        evaluate_with=lambda state: pytest.fail("evaluated after ctrl-C"),
    )  # fmt: skip
    steps = 4 if event == "before_step" else 3
    assert (progress.step, progress.stopped) == (steps, "interrupted")
    assert int(state.dense.step) == steps
    assert saved(tmp_path) == [steps]
    assert log.names()[-2:] == ["before_save", "after_save"]
    assert "after_epoch" not in log.names()
    assert reader.closed == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_middle_of_a_window(tmp_path):
    calls = []
    step = deepfm_step(accumulation=3)

    def run(state: TrainState, batch: Batch) -> Any:
        calls.append(len(calls))
        if len(calls) == 5:
            interrupt()
        return step.update_(state, batch)

    config = TrainConfig(output_dir=str(tmp_path))
    state, progress = train(step, run, fresh(step), reader_of(12), config)
    assert (len(calls), progress.step, progress.stopped) == (6, 2, "interrupted")
    assert int(state.window.num_batches) == 0


def test_ctrl_c_between_epochs(tmp_path):
    """No step of the next epoch is run; without a next epoch, training is over."""
    for epochs, stopped in ((2, "interrupted"), (1, "")):
        log = Log(("before_evaluation", 3), interrupt)
        folder = tmp_path / str(epochs)
        _, progress = go(folder, reader_of(3), train_epoch=epochs, listener=log, evaluate_with=lambda state: {"auc": 1})
        assert (progress.step, progress.epoch, progress.stopped) == (3, 1, stopped)
        assert saved(folder) == [3]


def test_a_second_ctrl_c_raises(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, reader_of(5), listener=Log(("before_step", 2), lambda: (interrupt(), interrupt())))
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread(tmp_path):
    """Where Python delivers no signals, the loop runs without them."""
    out: list = []
    thread = threading.Thread(target=lambda: out.append(go(tmp_path, reader_of(3))[1].step))
    thread.start()
    thread.join()
    assert out == [3]
