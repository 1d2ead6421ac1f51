"""What a person sees while a program runs: on terminals of any width, and in a file."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from recfx.program import bar as module
from recfx.program.bar import Bar
from recfx.train import Progress


def progress(**values) -> Progress:
    known = {"epoch": 1, "epoch_number": 2, "num_epochs": 3, "step": 1200, "num_samples": 1_200_000}
    return Progress(**known | {"timed_samples": 1000, "seconds": 2.0, "loss": 0.45031, "auc": 0.748} | values)


LOG = "epoch 2 of 3, step 1,200: loss 0.4503, AUC 0.7480, 500 samples/s, 1,200,000 samples"
VALUES = {"auc": 0.7, "log_loss": 0.5, "calibration": 1.0, "num_samples": 9.0, "num_nonfinite": 0.0}
HELD_OUT = "epoch 2 of 3, step 1,200, held out: AUC 0.7000, log loss 0.5000, calibration 1.0000"


def run(bar: Bar, phase_s: float = 0.0) -> None:
    """The events of a small run."""
    with bar:
        with bar.phase("compiling"):
            time.sleep(phase_s)
        for event in ("before_epoch", "before_step", "log", "after_step", "after_epoch", "before_evaluation"):
            bar.on_event(event, progress())
        bar.on_event("after_evaluation", progress(evaluation=VALUES))
        bar.on_event("before_save", progress())
        bar.on_event("after_save", progress())


@pytest.mark.parametrize(("left", "text"), [(84, "42 s"), (370, "3:05 min"), (14768, "2:03:04 h")])
def test_the_time_that_is_left(left, text):
    file = io.StringIO()
    known = progress(num_steps=1, num_samples=1, timed_samples=2, seconds=1.0, steps_left=left)
    Bar(file=file).on_event("log", known)
    assert file.getvalue().endswith(f"1 samples, {text} left\n")


def without_seconds(text: str) -> str:
    return re.sub(r"\d+\.\d s", "N s", text)


def test_in_a_file_it_is_a_line_for_each_phase_and_log_event(tmp_path, capsys):
    with open(tmp_path / "log", "w") as file:
        run(Bar(file=file))
        text = (tmp_path / "log").read_text()  # written already
    assert without_seconds(text) == f"compiling ... N s\nreading ... N s\n{LOG}\nevaluating ... N s\nsaving ... N s\n"
    assert capsys.readouterr().out == HELD_OUT + "\n"


def test_a_step_that_compiles_again_is_a_phase_too():
    class Step:
        def while_compiling(self, phase):
            self.phase = phase

    file, step = io.StringIO(), Step()
    with Bar(file=file) as bar:
        bar.watch(step)
        bar.watch(run)  # not a captured one
        bar.on_event("log", progress())
        with step.phase():
            pass
        bar.on_event("log", progress())
    assert without_seconds(file.getvalue()) == f"{LOG}\ncompiling ... N s\n{LOG}\n"


def test_a_phase_is_in_the_file_while_it_lasts():
    file = io.StringIO()
    with Bar(file=file) as bar, bar.phase("compiling"):
        assert file.getvalue() == "compiling ..."
    assert threading.active_count() == len(threading.enumerate())


def test_a_background_save_is_told_when_it_is_done():
    file = io.StringIO()
    with Bar(file=file, saves_in_background=True) as bar:
        bar.on_event("before_save", progress())
        bar.on_event("log", progress())
        bar.on_event("after_save", progress())
    assert without_seconds(file.getvalue()) == f"{LOG}\nsaved in the background: N s\n"


def test_the_first_log_has_no_rate_and_batches_left_out_are_counted():
    file = io.StringIO()
    with Bar(file=file) as bar:
        bar.on_event("log", progress(timed_samples=0, seconds=0.0, num_nonfinite=1300))
    assert file.getvalue() == f"{LOG.replace('500 samples/s, ', '')}, 1,300 batches with NaN or infinity\n"


class Terminal:
    """A terminal of that many columns, and what it was sent."""

    def __init__(self, columns: int) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        self.file: TextIO = os.fdopen(theirs, "w")

    def text(self) -> str:
        said = b""
        while select.select([self._ours], [], [], 0.2)[0]:
            said += os.read(self._ours, 2**20)
        return said.decode()

    def close(self) -> None:
        self.file.close()
        os.close(self._ours)


@pytest.fixture(params=[0, 40, 200])
def terminal(request, monkeypatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal(request.param)
    made.columns = request.param
    yield made
    made.close()


def test_on_a_terminal_the_seconds_pass_in_one_line(terminal, monkeypatch):
    monkeypatch.setattr(module, "TICK_S", 0.1)
    run(Bar(file=terminal.file), phase_s=0.55)
    lines = [line.strip() for line in terminal.text().replace("\n", "\r").split("\r")]
    seconds = [float(line.split()[1]) for line in lines if re.fullmatch(r"compiling \d+\.\d s", line)]
    assert len(set(seconds)) >= 3
    assert seconds == sorted(seconds)
    width = terminal.columns or 80
    assert all(len(line) < width for line in lines)
    assert LOG[: width - 1].strip() in lines
    for phase in ("evaluating", "saving"):
        shown = [re.sub(r"\d+\.\d s", "0.0 s", line, count=1) for line in lines if line.startswith(phase)]
        assert f"{phase} 0.0 s | {LOG}"[: width - 1].strip() in shown


def test_no_thread_is_there_between_phases(terminal):
    before = set(threading.enumerate())
    with Bar(file=terminal.file) as bar:
        with bar.phase("compiling"):
            assert len(set(threading.enumerate()) - before) == 1
        bar.on_event("log", progress())
        assert set(threading.enumerate()) == before
        bar.on_event("before_evaluation", progress())
    assert set(threading.enumerate()) == before


def test_a_terminal_that_cannot_go_back_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    run(Bar(file=terminal.file))
    lines = without_seconds(terminal.text()).replace("\r\n", "\n")
    assert lines == f"compiling ... N s\nreading ... N s\n{LOG}\nevaluating ... N s\nsaving ... N s\n"


LOST = "What was trained since the last checkpoint is lost"


@pytest.mark.parametrize(("before", "lost"), [([], "Nothing was trained"), (["before_step"], LOST)])
def test_ctrl_c_in_a_phase_says_in_which(before, lost):
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt) as stop, Bar(file=file) as bar:  # noqa: PT012
        for event in before:
            bar.on_event(event, progress())
        with bar.phase("compiling"):
            raise KeyboardInterrupt
    assert without_seconds(str(stop.value)) == f"interrupted while compiling, after N s. {lost}."
    assert without_seconds(file.getvalue()) == "compiling ... stopped after N s\n"
