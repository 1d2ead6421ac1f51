"""`recfx train` and `recfx evaluate`, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recfx.cli import main
from recfx.program import read_run, running
from tests.program.programs import PROGRAM, write_data, write_program


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(running, "capture", lambda step, state, batch, *, backend: step.update_)
    monkeypatch.setattr(running, "capture_evaluation", lambda step, state, batch, *, backend: step.evaluate_)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Without a module next to it, as the tests share a process."""
    return write_program(tmp_path / "code", program=PROGRAM.replace("from helpers import features", "features = dict"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def line_of(capsys: pytest.CaptureFixture) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_train_then_evaluate(program, data, tmp_path, capsys):
    held_out, run = write_data(tmp_path / "data", rows=30, seed=9), tmp_path / "run"
    command = ["train", str(data), f"--program={program}", f"--eval_paths={held_out}", f"--output_dir={run}"]
    assert main([*command, "--set", "lr=0.1", "--set=dims=[2]", "--set", "name=plain text", "--train_epoch=2"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads((run / "summary.json").read_text())
    assert [summary[name] for name in ("steps", "stopped")] == [24, "end of data"]
    assert f"AUC  {summary['auc']:.4f}" in out
    assert "epoch 2 of 2, step 24, held out: AUC" in out
    assert [line.split(" ... ")[0] for line in err.splitlines() if " ... " in line][:2] == ["reading", "compiling"]
    assert read_run(run)["arguments"] == {"lr": 0.1, "batch_size": 8, "dims": [2], "name": "plain text"}

    assert main(["evaluate", str(run), str(held_out)]) == 0
    values = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines())
    values = {name.strip(): value for name, value in values.items()}
    assert values["AUC"] == f"{summary['auc']:.4f}"
    assert values["num samples"] == "30"

    program.write_text(program.read_text() + "\n")
    assert main(["evaluate", str(run), str(held_out)]) == 2
    assert "program.py' (changed), expected the files that were trained" in line_of(capsys)
    assert main(["evaluate", str(run), str(held_out), "--allow_changes", "--eval_steps=1"]) == 0
    assert "num samples  8" in capsys.readouterr().out
    checkpoint = str(run / "step-000000024")
    assert main(["evaluate", str(run), str(held_out), "--allow_changes", f"--checkpoint={checkpoint}"]) == 0


def test_several_paths_are_one_training_set(program, data, tmp_path):
    more, run = write_data(tmp_path / "data", rows=12, seed=8), tmp_path / "run"
    assert main(["train", str(data), str(more), f"--program={program}", f"--output_dir={run}", "--log_steps=1"]) == 0
    assert read_run(run)["paths"] == {"train": [str(data), str(more)], "evaluate": None}
    assert json.loads((run / "summary.json").read_text())["steps"] == 14


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "rate=1"], "error: arguments: got 'rate', expected some of ['lr'"),
        (["--set", "lr=high"], "error: arguments: got lr='high', expected one of type float"),
        (["--program=nowhere.py"], "error: program: got 'nowhere.py', expected the path of a .py file"),
        (["--program=no_such_module"], "error: program: got 'no_such_module', expected a module"),
        (["--train_steps=0"], "error: train_steps: got 0, expected at least 1"),
        (["--eval_steps=0"], "error: eval_steps: got 0, expected at least 1"),
        (["--eval_paths=nowhere"], "error: paths: got 'nowhere', which matches no file"),
    ],
)
def test_errors_are_one_line(program, data, tmp_path, capsys, more, message):
    assert main(["train", str(data), f"--program={program}", f"--output_dir={tmp_path}/run", *more]) == 2
    assert line_of(capsys).startswith(message)


def test_errors_of_evaluate_are_one_line(data, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), str(data)]) == 2
    assert line_of(capsys).startswith(f"error: run: got '{tmp_path}', which contains no run.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--program=x.py"], "the following arguments are required: paths"),
        (["train", "x", "--program=x.py", "--set", "lr"], "--set: got 'lr', expected NAME=VALUE"),
        (["train", "x", "--program=x.py", "--set", "=1"], "--set: got '=1', expected NAME=VALUE"),
        (["evaluate", "x"], "the following arguments are required: paths"),
    ],
)
def test_arguments_that_cannot_be_read(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_while_it_compiles_is_one_line_and_130(program, data, tmp_path, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "capture", interrupted)
    assert main(["train", str(data), f"--program={program}", f"--output_dir={tmp_path}/run"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted while compiling, after ")


def test_as_a_process_with_a_module_next_to_the_program(data, tmp_path):
    """Captured, by the backend that needs no compiler; the environment is set before torch is imported."""
    program, run = write_program(tmp_path / "code"), tmp_path / "run"
    command = [sys.executable, "-m", "recfx", "train", str(data), "--program", str(program), "--backend=eager"]
    done = subprocess.run([*command, f"--output_dir={run}"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert list(read_run(run)["sources"]) == ["helpers.py", "program.py"]
    assert "steps  12\n" in done.stdout
