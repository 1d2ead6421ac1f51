"""Training that continues with the next day's data, in the same folder, after the process ended in any way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from recfx import checkpoint
from recfx.data import fixedlen, reader, varlen
from recfx.train import TrainConfig, train
from recfx.train import loop as train_module
from tests.conftest import deepfm_batches, deepfm_step
from tests.loop import Log, MemoryReader, fresh, go, interrupt, last_bytes, reader_of, saved


class Day(MemoryReader):
    """Data with a name, as the reader of files has."""

    def __init__(self, name, num=6):
        super().__init__(deepfm_batches(num, seed=sum(map(ord, name)), ids=tuple(range(150))))
        self.identity = name


class Killed(BaseException):
    """Ends a run where it is, as SIGKILL does but for closing files."""


def kill():
    raise Killed


def day(folder, name, *, kill_at=None, **config):
    """What a supervisor starts, again and again: the same command, with the files of that day."""
    listener = Log() if kill_at is None else Log(kill_at, kill)
    return go(folder, Day(name), resume=True, listener=listener, save_steps=4, train_epoch=2, **config)


@pytest.fixture(scope="module")
def two_days(tmp_path_factory):
    """The bytes of two days that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    _, first = day(folder, "monday")
    _, second = day(folder, "tuesday")
    assert (first.step, second.step) == (12, 24)
    return last_bytes(folder)


@pytest.mark.parametrize(
    "kill_at",
    [
        ("before_epoch", 12), ("after_step", 13), ("after_save", 16), ("after_epoch", 18), ("after_save", 24),
        *(
            pytest.param(moment, marks=pytest.mark.slow)
            for moment in (
                ("before_step", 12), ("before_save", 16), ("after_step", 17), ("before_epoch", 18), ("after_step", 23),
                ("before_save", 24),
            )
        ),
    ],
)  # fmt: skip
def test_a_kill_at_any_moment_of_the_second_day_changes_no_byte(two_days, tmp_path, kill_at):
    day(tmp_path, "monday")
    with pytest.raises(Killed):
        day(tmp_path, "tuesday", kill_at=kill_at)
    if kill_at == ("after_save", 24):
        with pytest.warns(match="nothing is left to train"):
            _, progress = day(tmp_path, "tuesday")
    else:
        _, progress = day(tmp_path, "tuesday")
    assert (progress.step, progress.stopped) == (24, "")
    assert last_bytes(tmp_path) == two_days


def test_train_steps_count_from_the_load_and_under_resume_from_the_interrupted_call(tmp_path):
    day(tmp_path, "monday", train_steps=5)
    with pytest.raises(Killed):
        day(tmp_path, "tuesday", train_steps=7, kill_at=("after_step", 10))
    assert saved(tmp_path) == [4, 5, 8]
    _, progress = day(tmp_path, "tuesday", train_steps=7)
    assert (progress.step, progress.stopped) == (12, "train_steps")


def test_other_data_is_an_error_while_a_day_is_unfinished(tmp_path):
    with pytest.raises(Killed):
        day(tmp_path, "monday", kill_at=("after_step", 6))
    with pytest.raises(ValueError, match=r"reader: got one of tuesday, expected one of monday: .*step-000000004"):
        day(tmp_path, "tuesday")
    day(tmp_path, "monday")
    _, progress = day(tmp_path, "tuesday")
    assert progress.step == 24


def test_a_loaded_state_goes_on_in_its_own_folder_and_in_another(tmp_path):
    go(tmp_path / "a", reader_of(6))
    for folder in ("a", "b"):
        step = deepfm_step()
        state, _ = checkpoint.load(checkpoint.latest(tmp_path / "a"), step, fresh(step))
        assert int(state.step) == 6
        config = TrainConfig(output_dir=str(tmp_path / folder), train_steps=2)
        state, progress = train(step, step.update_, state, reader_of(4), config)
        assert (progress.step, int(state.step), saved(tmp_path / folder)[-1]) == (8, 8, 8)
        if folder == "a":
            checkpoint_of_a = last_bytes(tmp_path / "a")
            (tmp_path / "a" / "step-000000008" / "manifest.json").unlink()
    assert last_bytes(tmp_path / "b") == checkpoint_of_a


# A folder that holds checkpoints.


def test_a_new_run_into_a_folder_with_checkpoints_is_an_error(tmp_path):
    go(tmp_path, reader_of(3))
    before = last_bytes(tmp_path)
    message = r"holds step-000000003, for a run that begins at step 0, .*\(--resume\).*\(--overwrite\)"
    with pytest.raises(ValueError, match=message):
        go(tmp_path, reader_of(3))
    step = deepfm_step()
    path = checkpoint.save(tmp_path / "other", step, fresh(step)._replace(step=torch.tensor(2)), number=2, loop={})
    state, _ = checkpoint.load(path, step, fresh(step))
    with pytest.raises(ValueError, match="holds step-000000003, for a run that begins at step 2"):
        train(step, step.update_, state, reader_of(3), TrainConfig(output_dir=str(tmp_path)))
    assert last_bytes(tmp_path) == before


def test_overwrite_deletes_what_is_there_and_nothing_else(tmp_path):
    go(tmp_path, reader_of(6), save_steps=2)
    (tmp_path / "step-best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    step = deepfm_step()
    config = TrainConfig(output_dir=str(tmp_path), train_steps=3)
    train(step, step.update_, fresh(step), reader_of(6), config, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "metrics.jsonl",
        "notes.txt",
        "step-000000003",
        "step-best",
    ]
    with pytest.raises(ValueError, match="overwrite: got True with resume=True, expected one of them"):
        train(step, step.update_, fresh(step), reader_of(6), config, overwrite=True, resume=True)


def test_data_that_cannot_be_read_costs_no_checkpoint(tmp_path):
    """Overwritten is what is there when there is something to train on."""
    go(tmp_path, reader_of(3))
    before = last_bytes(tmp_path)
    step, config = deepfm_step(), TrainConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="reader: got no batch"):
        train(step, step.update_, fresh(step), MemoryReader([]), config, overwrite=True)
    assert last_bytes(tmp_path) == before


def test_readers_of_files_have_an_identity(tmp_path):
    for name, text in (("monday", "label,c\n0,1\n1,2\n"), ("tuesday", "label,c\n0,1\n1,25\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    columns = [fixedlen("label", [0.0]), varlen("c", torch.int64)]
    monday, same, tuesday = (reader(str(tmp_path / f"{n}.csv"), columns, 2) for n in ("monday", "monday", "tuesday"))
    assert monday.identity == same.identity == monday.epoch(0).position["of"]
    assert monday.identity != tuesday.identity


def test_readers_are_named_by_what_they_have(tmp_path):
    """An identity, a description, or nothing."""
    go(tmp_path, Day("monday"), listener=Log(("after_step", 2), interrupt))
    with pytest.raises(ValueError, match="reader: got one without an identity, expected one of monday: "):
        go(tmp_path, reader_of(6), resume=True)
    go(tmp_path / "b", reader_of(6), listener=Log(("after_step", 2), interrupt))
    tuesday = Day("0123456789abcdef")
    tuesday.described = "tuesday's log"
    with pytest.raises(ValueError, match="reader: got one of tuesday's log, expected one without an identity: "):
        go(tmp_path / "b", tuesday, resume=True)


# Weights of another folder.


def test_a_warm_start_is_restarted_where_the_folder_holds_nothing(tmp_path):
    go(tmp_path / "a", reader_of(3))

    def warm(*, always=False, at=None):
        step, folder = deepfm_step(), tmp_path / "b"
        state = fresh(step)
        if always or checkpoint.latest(folder) is None:
            state, _ = checkpoint.load(checkpoint.latest(tmp_path / "a"), step, state)
        listener = Log(at, interrupt)
        config = TrainConfig(output_dir=str(folder))
        return train(step, step.update_, state, reader_of(6), config, resume=True, on_event=listener)[1]

    assert warm(at=("before_epoch", 3)).stopped == "interrupted"
    assert saved(tmp_path / "b") == [4]
    assert warm(at=("after_step", 6)).stopped == "interrupted"
    message = (
        r"state: got one of step 3 with \d+ rows, and resume=True, expected a new one. output_dir holds .*b/step-0"
    )
    with pytest.raises(ValueError, match=message):
        warm(always=True)
    assert warm().step == 9


# Signals.


def test_data_that_a_signal_found_trained_has_ended(tmp_path):
    """The last window is an incomplete one: the signal comes after all that there was."""
    _, progress = go(tmp_path, Day("monday", 3), accumulation=2, listener=Log(("after_step", 2), interrupt))
    assert (progress.step, progress.stopped) == (2, "interrupted")
    _, progress = go(tmp_path, Day("tuesday", 3), accumulation=2, resume=True)
    assert progress.step == 4


@pytest.mark.parametrize("num_trained", [0, 3, 6])
def test_a_signal_before_the_first_step_leaves_everything_as_it_was(tmp_path, monkeypatch, num_trained):
    if num_trained:
        go(tmp_path, reader_of(6), listener=Log(("after_step", num_trained), interrupt))
    before, latest, log = num_trained and last_bytes(tmp_path), checkpoint.latest, Log()
    monkeypatch.setattr(train_module.checkpoint, "latest", lambda folder: (interrupt(), latest(folder))[1])
    _, progress = go(tmp_path, reader_of(6), resume=True, listener=log)
    assert (progress.step, progress.stopped, log.events) == (num_trained, "interrupted", [])
    assert saved(tmp_path) == [num_trained] * bool(num_trained)
    monkeypatch.undo()
    assert (num_trained and last_bytes(tmp_path)) == before


@pytest.mark.usefixtures("_signals_of_a_shell")
def test_two_kinds_of_signals_at_once_save(tmp_path):
    """As a supervisor sends them."""

    def both():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, name))

    _, progress = go(tmp_path, reader_of(6), listener=Log(("after_step", 3), both))
    assert (progress.step, progress.stopped, saved(tmp_path)) == (3, "interrupted", [3])


def test_a_handler_from_outside_python_is_left_alone(tmp_path, monkeypatch):
    found, put = signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGHUP else found(number))
    set_one = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: put.append(number) or set_one(number, handler))
    assert go(tmp_path, reader_of(2))[1].step == 2
    assert set(put) == {signal.SIGINT, signal.SIGTERM}


@pytest.fixture
def _signals_of_a_shell() -> Iterator[None]:
    """As a process has them that was not started to ignore some, as `nohup` and shells in the background do."""
    handlers = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_of_a_shell")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_saves_and_ends(tmp_path, name):
    listener = Log(("after_step", 3), lambda: os.kill(os.getpid(), getattr(signal, name)))
    before = [signal.getsignal(getattr(signal, n)) for n in ("SIGTERM", "SIGHUP", "SIGINT")]
    _, progress = go(tmp_path, reader_of(6), listener=listener)
    assert (progress.step, progress.stopped, saved(tmp_path)) == (3, "interrupted", [3])
    assert before == [signal.getsignal(getattr(signal, n)) for n in ("SIGTERM", "SIGHUP", "SIGINT")]
    go(tmp_path, reader_of(6), resume=True)
    go(tmp_path / "whole", reader_of(6))
    assert last_bytes(tmp_path) == last_bytes(tmp_path / "whole")


@pytest.mark.usefixtures("_signals_of_a_shell")
def test_a_second_signal_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        go(tmp_path, reader_of(6), listener=Log(("after_step", 3), twice))
    assert caught.value.code == 128 + signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, reader_of(6), listener=Log(("after_step", 3), lambda: (interrupt(), interrupt())))


def test_under_nohup_a_hangup_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = lambda: os.kill(os.getpid(), signal.SIGHUP)  # noqa: E731
        _, progress = go(tmp_path, reader_of(6), listener=Log(("after_step", 3), hang_up))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (progress.step, progress.stopped) == (6, "")


PROGRAM = """
import sys, time
from tests.loop import go, reader_of
from pathlib import Path
listener = lambda event, progress, state: (print(event, flush=True), time.sleep(0.01))
go(Path(sys.argv[1]), reader_of(400), listener=listener, save_in_background=True, save_steps=3)
"""


@pytest.mark.slow
def test_a_supervisor_that_signals_the_whole_group_loses_nothing(tmp_path):
    """The child that writes in the background is signalled too."""
    for k in range(6):
        folder = tmp_path / str(k)
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            while "after_step" not in child.stdout.readline():
                pass
            time.sleep(0.02 * k)
            os.killpg(child.pid, signal.SIGTERM)
            child.stdout.read()
            assert child.wait(60) == 0
        assert saved(folder)
        _, progress = go(folder, reader_of(400), resume=True, train_steps=saved(folder)[-1] + 2)
        assert progress.step == saved(folder)[-1]
