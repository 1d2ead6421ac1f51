"""Programs and the record of their runs: what is trained is what is loaded, and nothing else."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import recfx
from recfx import checkpoint
from recfx import train as loop
from recfx.program import Program, build, differences, evaluate, load, read_run, restore, running, train
from recfx.program.modules import find, sources
from recfx.train import TrainConfig
from tests.loop import last_bytes, saved
from tests.program.programs import HELPERS, PROGRAM, write_data, write_program


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it is written; and no module next to a program stays imported after a test."""
    torch.set_num_threads(1)
    monkeypatch.setattr(running, "capture", lambda step, state, batch, *, backend: step.update_)
    monkeypatch.setattr(running, "capture_evaluation", lambda step, state, batch, *, backend: step.evaluate_)
    monkeypatch.delitem(sys.modules, "helpers", raising=False)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return write_program(tmp_path / "code")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def go(program: Any, data: Path, folder: Path, *, config: dict | None = None, **how: Any) -> Any:
    return train(program, str(data), TrainConfig(output_dir=str(folder), **config or {}), **how)


@pytest.fixture
def run(program: Path, data: Path, tmp_path: Path) -> Path:
    """The output folder of a run of 12 steps."""
    go(program, data, tmp_path / "run")
    sys.modules.pop("helpers", None)  # as in another process
    return tmp_path / "run"


def edit(run: Path, change: Callable[[dict], Any]) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


# A round trip.


def test_a_loaded_program_trains_on_to_the_same_bytes(program, data, tmp_path):
    """By the loop itself, from a run that was stopped: the step, first state and reader are the run's own."""
    how = {"arguments": {"lr": 0.02, "batch_size": 5}}
    go(program, data, tmp_path / "whole", config={"train_epoch": 2}, **how)
    go(program, data, tmp_path / "parts", config={"train_epoch": 2, "train_steps": 7}, **how)
    again = load(tmp_path / "parts")
    config = TrainConfig(output_dir=str(tmp_path / "parts"), train_epoch=2)
    step, batches = again.step, again.reader(str(data), "train")
    loop.train(step, step.update_, again.init(), batches, config, resume=True)
    assert last_bytes(tmp_path / "parts") == last_bytes(tmp_path / "whole")
    assert saved(tmp_path / "parts")[-1] == 40
    assert [column.name for column in again.columns] == ["label", "user", "item"]


def test_train_is_the_loop_over_what_build_returns(program, data, tmp_path):
    go(program, data, tmp_path / "frame")
    built = build(program)
    config = TrainConfig(output_dir=str(tmp_path / "own"))
    loop.train(built.step, built.step.update_, built.init(), built.reader(str(data), "train"), config)
    assert last_bytes(tmp_path / "own") == last_bytes(tmp_path / "frame")
    assert not (tmp_path / "own" / "run.json").exists()


def test_evaluate_reads_the_newest_checkpoint_and_every_row(run, data):
    values = evaluate(run, str(data))
    assert values["num_samples"] == 100
    built, state = restore(run / "run.json")
    assert int(state.step) == 12
    assert values == loop.evaluate(built.step.evaluate_, state, built.reader(str(data), "evaluate"))
    first = evaluate(run, str(data), checkpoint=checkpoint.latest(run), eval_steps=2)
    assert first["num_samples"] == 16


def test_held_out_files_are_evaluated_after_every_epoch(program, data, tmp_path):
    more = write_data(tmp_path / "data", rows=11, seed=4)
    _, progress = go(program, data, tmp_path / "run", held_out=[more], eval_steps=None)
    assert progress.evaluation["num_samples"] == 11
    assert read_run(tmp_path / "run")["paths"] == {"train": str(data), "evaluate": [str(more)]}


# The record.


def test_what_a_record_holds(run, program, data):
    record = read_run(run)
    assert record == {
        "format": 1,
        "program": {"file": "../code/program.py"},
        "arguments": {"lr": 0.05, "batch_size": 8, "dims": [1], "name": None},
        "paths": {"train": str(data), "evaluate": None},
        "sources": sources(find(program)),
        "versions": record["versions"],
        "threads": 1,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }
    assert list(record["sources"]) == ["helpers.py", "program.py"]
    assert record["versions"]["recfx"] == recfx.__version__
    assert set(record["versions"]) == {"numpy", "pyarrow", "python", "recfx", "torch"}
    assert differences(run) == []


def test_the_same_run_leaves_the_same_record(run, program, data, tmp_path):
    go(program, data, tmp_path / "other")
    assert (tmp_path / "other" / "run.json").read_bytes() == (run / "run.json").read_bytes()
    assert not list(run.glob(".unfinished*"))


def test_it_is_written_before_the_first_step_and_not_by_a_run_that_is_rejected(run, program, data, tmp_path):
    before = (run / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"output_dir: got .*, which holds step-000000012"):
        go(program, data, run, arguments={"lr": 0.5})
    with pytest.raises(ValueError, match="reader: got 100 rows in"):
        go(program, data, tmp_path / "new", arguments={"batch_size": 1000})
    with pytest.warns(match="nothing is left to train"):
        go(program, data, run, arguments={"lr": 0.5}, resume=True)
    assert (run / "run.json").read_bytes() == before
    assert not (tmp_path / "new").exists()
    go(program, data, run, arguments={"lr": 0.5}, overwrite=True)
    assert read_run(run)["arguments"]["lr"] == 0.5


def test_a_record_that_cannot_be_written_is_an_error_before_the_first_step(program, data, tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        go(program, data, tmp_path / "run")
    assert saved(tmp_path / "run") == []


def test_a_reader_may_be_given_what_is_not_a_path(tmp_path):
    """Arrays in memory, say: the record does not hold them."""
    program = write_program(tmp_path, program=PROGRAM.replace("reader(paths,", "reader(paths['there'],"))
    there = write_data(tmp_path / "data")
    train(program, {"there": there}, TrainConfig(output_dir=str(tmp_path / "run")), held_out={"there": there})
    assert read_run(tmp_path / "run")["paths"] == {"train": None, "evaluate": None}


# Sources.


@pytest.mark.parametrize("name", ["program.py", "helpers.py"])
def test_a_changed_source_is_rejected_by_name(run, program, name):
    file = program.with_name(name)
    file.write_text(file.read_text() + "\n# another line\n")
    with pytest.raises(ValueError, match=rf"run\.json: got a program with '.*{name}' \(changed\), expected the files"):
        load(run)
    with pytest.raises(ValueError, match="allow_changes=True"):
        evaluate(run, "nowhere")
    assert isinstance(load(run, allow_changes=True), Program)


def test_another_import_and_one_fewer_are_changes(run, program):
    (program.parent / "more.py").write_text("")
    program.write_text(PROGRAM.replace("import torch\n", "import more\nimport torch\n", 1))
    with pytest.raises(ValueError, match=r"'.*more.py' \(new\), '.*program.py' \(changed\)"):
        load(run)
    program.write_text(PROGRAM.replace("from helpers import features", "features = dict"))
    with pytest.raises(ValueError, match=r"'.*helpers.py' \(missing\), '.*program.py' \(changed\)"):
        load(run)


def test_files_that_are_not_imported_are_not_sources(run, program):
    (program.parent / "notes.py").write_text("not Python")
    load(run)


def test_sources_of_a_package_are_the_modules_of_it_that_are_reached(tmp_path, monkeypatch):
    folder = tmp_path / "pack_of_programs"
    (folder / "inner").mkdir(parents=True)
    for name, text in {
        "__init__.py": "", "inner/__init__.py": "", "unused.py": "", "inner/a.py": "from ..b import x", "b.py": "x = 1",
        "program.py": f"import json\nfrom .inner import a\n{PROGRAM.replace('from helpers', 'from .helpers')}",
        "helpers.py": f"def lazy():\n    import pack_of_programs.c\n{HELPERS}", "c.py": "",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    (tmp_path / "json.py").write_text("")  # next to the package, not in it
    monkeypatch.syspath_prepend(tmp_path)
    found = find("pack_of_programs.program")
    names = ["__init__.py", "b.py", "c.py", "helpers.py", "inner/__init__.py", "inner/a.py", "program.py"]
    assert list(sources(found)) == [f"pack_of_programs/{name}" for name in names]
    assert isinstance(build("pack_of_programs.program"), Program)


def test_a_program_of_recfx_is_covered_by_its_file_and_the_version():
    assert list(sources(find("recfx.examples.deepfm"))) == ["recfx/examples/deepfm.py"]
    assert isinstance(build("recfx.examples.deepctr", {"max_rows": 1000}), Program)


# Where the program is.


def test_a_run_with_its_program_may_be_moved(data, tmp_path):
    program = write_program(tmp_path / "run")
    go(program, data, tmp_path / "run")
    sys.modules.pop("helpers")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "run")
    assert evaluate(tmp_path / "elsewhere" / "run", str(data))["num_samples"] == 100
    assert read_run(tmp_path / "elsewhere" / "run")["program"] == {"file": "program.py"}


def test_a_program_that_was_moved_is_named(run, program):
    shutil.move(program.parent, program.parent.with_name("moved"))
    with pytest.raises(
        ValueError, match=r"run\.json: program: got '.*code/program.py', expected .* load\(run, program"
    ):
        load(run)
    file = (program.parent.with_name("moved") / "program.py").rename(program.parent.with_name("moved") / "model.py")
    assert isinstance(load(run, program=file), Program)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"'.*program.py' \(changed\)"):
        load(run, program=file)


def test_two_programs_of_one_file_name_in_a_process(tmp_path, monkeypatch):
    plain = PROGRAM.replace("from helpers import features", "features = dict")
    first, second = (write_program(tmp_path / name, program=plain) for name in "ab")
    second.write_text(plain.replace('"lr": 0.05', '"rate": 0.05').replace("args.lr", "args.rate"))
    path = list(sys.path)
    for _ in range(2):
        build(first, {"lr": 0.1})
        build(second, {"rate": 0.1})
    assert sys.path == path
    with pytest.raises(ValueError, match=r"arguments: got 'lr', expected some of \['rate', 'batch_size', 'dims'"):
        build(second, {"lr": 0.1})


def test_modules_of_one_name_next_to_two_programs_are_an_error(tmp_path):
    first, second = (write_program(tmp_path / name) for name in "ab")
    build(first)
    with pytest.raises(ValueError, match=r"module 'helpers' of '.*b/program.py': got '?.*a/helpers.py'?, expected"):
        build(second)


def test_a_relative_path_is_that_of_the_working_folder(program, data, tmp_path, monkeypatch):
    monkeypatch.chdir(program.parent)
    go("program.py", data, Path("out"))
    sys.modules.pop("helpers")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("code/out"), Program)


def test_an_edit_within_a_second_that_keeps_the_size_is_executed(tmp_path):
    """As Python's cache of bytecode would miss."""
    plain = PROGRAM.replace("from helpers import features", "features = dict")
    program = write_program(tmp_path, program=plain)
    build(program, {"lr": 1.0})
    times = program.stat()
    program.write_text(plain.replace('"lr"', '"LR"').replace("args.lr", "args.LR"))
    os.utime(program, ns=(times.st_atime_ns, times.st_mtime_ns))
    build(program, {"LR": 1.0})
    assert not (tmp_path / "__pycache__").exists()


# Arguments.


def test_arguments_are_the_defaults_or_those_given_as_json_reads_them(tmp_path):
    @dataclass
    class Given:
        lr: float
        dims: tuple[int, ...]

    ends = PROGRAM.index("    step = train_step(")
    program = write_program(tmp_path, program=PROGRAM[:ends] + "    raise KeyError(repr(vars(args)))\n")
    expected = {"lr": 1.0, "batch_size": 8, "dims": [2], "name": None}
    for given in (Given(1, (2,)), argparse.Namespace(lr=1, dims=[2]), {"lr": 1.0, "dims": (2,)}):
        with pytest.raises(KeyError) as error:
            build(program, given)
        assert error.value.args == (repr(expected),)
    with pytest.raises(KeyError, match=r"'name': \{'any': \[1\]\}"):
        build(program, {"name": {"any": [1]}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrr": 1.0}, r"arguments: got 'lrr', expected some of \['lr', 'batch_size', 'dims', 'name'\]"),
        ({"lr": "high"}, "arguments: got lr='high', expected one of type float. Its default is 0.05"),
        ({"batch_size": 8.0}, "got batch_size=8.0, expected one of type int"),
        ({"batch_size": True}, "got batch_size=True, expected one of type int"),
        ({"lr": None}, "got lr=None, expected one of type float"),
        ({"lr": float("nan")}, "got lr=nan, expected a value that JSON can hold"),
        ({"lr": 10**400}, r"got lr=1000.*, expected a float\. It is too large"),
        ({"name": 10**5000}, "got name=an int of 16610 bits, expected a value that JSON can hold"),
        ({"name": {1, 2}}, "got name=set, expected a value that JSON can hold"),
    ],
)
def test_arguments_that_cannot_be(program, given, message):
    with pytest.raises(ValueError, match=message):
        build(program, given)


def test_arguments_are_values_by_name(program):
    with pytest.raises(TypeError, match=r"arguments: got a list of str, expected a dict\. Give values by name"):
        build(program, ["lr=1"])


# What is not a program.


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "def build(args: int",
            ValueError,
            r"bad.py', which cannot be imported \(SyntaxError: .*\), expected",
        ),
        ("1 / 0", ValueError, r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("raise SystemExit(3)", ValueError, r"cannot be imported \(SystemExit: 3\)"),
        ("import no_such_package", ValueError, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("\0", ValueError, "cannot be imported"),
        ("", TypeError, r"build: got None, expected a function \(args\) -> Program\. .*bad.py is a program"),
        ("build = 3", TypeError, r"build: got 3, expected a function"),
        (
            "def build(): pass",
            TypeError,
            r"build: got the function build that takes \(\), expected a",
        ),
        ("def build(args): pass", TypeError, r"build: got None, expected .*Program.*Return recfx.program.Program"),
        ("ARGUMENTS = {3: 1}\ndef build(args): pass", TypeError, "ARGUMENTS: got 3, expected str"),
        ("ARGUMENTS = [1]\ndef build(args): pass", TypeError, "ARGUMENTS: got a list of int, expected a dict"),
        (
            "ARGUMENTS = {'x': {1}}\ndef build(args): pass",
            ValueError,
            "arguments: got x=set, expected a value",
        ),
    ],
)
def test_modules_that_are_no_programs(tmp_path, text, kind, message):
    path, modules = tmp_path / "bad.py", len(sys.modules)
    path.write_text(text)
    with pytest.raises(kind, match=message):
        build(path)
    assert len(sys.modules) <= modules + 1
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("nowhere.py", r"program: got 'nowhere.py', expected the path of a .py file. There is no such file"),
        ("no.such.module", r"program: got 'no.such.module', whose package cannot be imported \(ModuleNotFoundError"),
        ("no_such_module", r"program: got 'no_such_module', expected a module with Python source"),
        ("sys", r"program: got 'sys', expected a module with Python source"),
        ("data/clicks", r"program: got 'data/clicks', expected an import path such as 'package.module'"),
        ("", r"program: got '', expected an import path"),
        ("\0.py", r"program: got .*, expected the path of a .py file"),
        ("x" * 5000 + ".py", r"program: got 'xxx.*, expected the path of a .py file. There is no such file"),
        ("json", r"build: got None, expected a function"),
    ],
)
def test_programs_that_are_not_there(program, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(program)
    with pytest.raises(TypeError, match=r"program: got 3, expected an import path or the path of a .py file"):
        build(3)


def test_the_fields_of_a_program_are_checked(program):
    built = build(program)
    fields = vars(built)
    for name, value, message in (
        ("step", None, "step: got None, expected .*Step. Build one"),
        ("init", lambda seed: None, "init: got the function <lambda> that takes .*, expected a function"),
        ("columns", [3], "columns: got 3, expected"),
        ("reader", lambda paths: None, r"reader: got .*, expected a function \(paths, use\) -> Reader"),
    ):
        with pytest.raises(TypeError, match=message):
            Program(**fields | {name: value})


# Records that cannot be used.


def test_a_record_that_is_missing(tmp_path):
    for run in (tmp_path, tmp_path / "none", tmp_path / "run.json"):
        with pytest.raises(ValueError, match=r"run: got '.*', which contains no run.json, expected the output folder"):
            load(run)
    for run in (3, b"x", None):
        with pytest.raises(TypeError, match=r"run: got .*, expected the output folder of a run, a path"):
            load(run)
    with pytest.raises(ValueError, match=r"run: got .*, expected the output folder"):
        load("\0")


def test_a_record_of_a_newer_recfx(run):
    edit(run, lambda record: record.update(format=2))
    with pytest.raises(ValueError, match=r"run\.json: got format 2, expected 1 or less\. Update recfx"):
        load(run)


DAMAGED = ["", "{", "[]", "3", "null", '"x"', "{}", '{"format": "1"}', '{"format": true}', '{"format": 0}', "\0"]


@pytest.mark.parametrize("text", [*DAMAGED, "[" * 10**5])
def test_a_record_that_is_damaged(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: got .*, expected"):
        load(run)
    (run / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.json: got .*, expected"):
        load(run)


def test_no_record_crashes(run):
    """Each value replaced by others, and each name left out: a program, or an error that names the file."""
    errors: list[str] = []
    whole, rng = json.loads((run / "run.json").read_text()), random.Random(1)
    others = [None, 3, -1.5, True, "", "x", "\0", [], [1], {}, {"file": 3}, {"import": "a..b"}, {"file": "\0"}]
    for name in whole:
        for value in [*rng.sample(others, 4), *others[-3:], Exception]:
            record = {key: v for key, v in whole.items() if key != name or value is not Exception}
            (run / "run.json").write_text(json.dumps(record | ({} if value is Exception else {name: value})))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    load(run)
                except ValueError as error:
                    errors.append(str(error))
    assert len(errors) > 40
    assert all("expected" in error for error in errors)


@pytest.mark.parametrize(("name", "is_warned"), [("torch", True), ("recfx", True), ("numpy", False), ("python", False)])
def test_other_versions(run, name, is_warned):
    edit(run, lambda record: record["versions"].update({name: "0.0.1"}))
    assert [line.split(":")[0] for line in differences(run)] == [name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(run)
    assert len(caught) == is_warned
    if is_warned:
        assert f"is of other versions: {name}: got " in str(caught[0].message)
        assert caught[0].filename == __file__


def test_other_threads_and_processors_are_differences_and_no_warning(run):
    edit(run, lambda record: record.update(threads=64, instruction_set="SSE9"))
    load(run)
    assert differences(run) == [
        "threads: got 1, expected 64 as in the run",
        f"instruction set: got {torch.backends.cpu.get_cpu_capability()}, expected SSE9 as in the run",
    ]


def test_what_is_no_configuration_and_no_checkpoint(run, program, data):
    with pytest.raises(TypeError, match=r"config: got None, expected recfx.train.TrainConfig"):
        train(program, data, None)
    with pytest.raises(TypeError, match=r"checkpoint: got 3, expected str or os.PathLike or None"):
        restore(run, checkpoint=3)


def test_a_run_without_a_checkpoint(run):
    for path in run.glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"run: got '.*run', which contains no checkpoint, expected one at least"):
        restore(run)
