"""The command line of the DeepFM program, on small generated click logs."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import orc

from recfx import checkpoint
from recfx import train as loop
from recfx.examples import criteo_synthetic
from recfx.examples import deepfm as program
from recfx.program import evaluate, read_run, restore, running
from recfx.program.summary import text_of
from recfx.step import Step

ROOT = Path(__file__).parents[2]
RUN_SH = ROOT / "examples" / "deepfm" / "run.sh"
ROWS = {"rows_per_file": 1100, "train_files": 3, "eval_files": 1, "seed": 42}
SUMMARY = {  # the issue's, and what the table and the loop add
    "auc", "best_auc", "log_loss", "calibration", "samples_per_s", "first_step_s", "train_s", "rows", "peak_rss_bytes",
    "steps", "numeric_lr_auc", "refused_ids", "nonfinite_batches", "stopped",
}  # fmt: skip
SEED_DEFAULTS = {
    "data_paths": None, "eval_paths": None, "batch_size": 1000, "thread_num": 1, "prefetch": 1, "drop_remainder": True,
    "gradient_accumulation_steps": 4, "output_dir": "./ckpt", "log_steps": 10, "save_steps": 2000, "eval_steps": None,
    "train_steps": None, "train_epoch": 1, "sparse_lr": 1e-3, "dense_lr": 1e-3, "seed": 42, "resume": False,
    "device": "cpu", "numeric": "log1p", "steps_per_replay": 1, "cache_dir": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("criteo") / "data"
    criteo_synthetic.generate(folder, **ROWS)
    some = orc.read_table(next((folder / "train").iterdir()))
    orc.write_table(some.slice(0, 0), folder / "none.orc")
    return folder


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it is written, uncompiled."""

    def capture(step: Step, state: Any, batch: Any, *, backend: str) -> Callable:
        return step.update_

    monkeypatch.setattr(running, "capture", capture)
    monkeypatch.setattr(running, "capture_evaluation", lambda step, state, batch, *, backend: step.evaluate_)


def call(data: Path | None, *more: str, output: str = "out") -> dict[str, Any]:
    paths = [f"--data_paths={data}/train", f"--eval_paths={data}/eval"] if data else []
    program.main([*paths, "--batch_size=100", f"--output_dir={output}", *more])
    return json.loads(Path(output, "summary.json").read_text(), parse_constant=pytest.fail)


def newest(output: str) -> dict[str, str]:
    path = checkpoint.latest(output)
    return {"": path.name} | {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir()}


def refused(*argv: str) -> str:
    """The message `main` ends with."""
    with pytest.raises(SystemExit) as stop:
        program.main(list(argv))
    assert isinstance(stop.value.code, str)
    return stop.value.code


# From files to a summary.


def test_captured_end_to_end_on_generated_data(tmp_path, capsys):
    """The program as it stands: it generates, compiles, trains, evaluates, saves and sums up."""
    torch.set_num_threads(2)
    more = ["--generated_rows=20000", "--generated_dir=made", "--batch_size=1000", "--gradient_accumulation_steps=1"]
    summary = call(None, *more, "--train_epoch=2")
    assert set(summary) == SUMMARY
    info = json.loads(Path("made/info.json").read_text())
    assert (info["train_rows"], info["eval_rows"]) == (20_000, 2_000)
    assert (summary["best_auc"], summary["numeric_lr_auc"]) == (info["best_auc"], info["numeric_lr_auc"])
    assert (summary["steps"], summary["stopped"], summary["refused_ids"]) == (40, "end of data", 0)
    assert all(math.isfinite(v) for v in summary.values() if not isinstance(v, str))
    assert 0.4 < summary["auc"] < summary["best_auc"]
    assert 0.05 < summary["log_loss"] < 0.7
    assert summary["rows"] > 10_000
    assert summary["peak_rss_bytes"] > 2**26
    assert summary["first_step_s"] > 0.5  # with the time of compiling, which is before training
    assert summary["train_s"] > 0
    assert summary["samples_per_s"] > 100
    assert Path("out/step-000000040").is_dir()

    out, err = capsys.readouterr()
    assert "no --data_paths: using generated data in made" in out
    assert f"best possible AUC on the held-out rows: {info['best_auc']:.4f}" in out
    names = {"auc": "AUC", "log_loss": "log loss", "calibration": "calibration"}  # not of the training rows
    held_out = ", ".join(f"{said} {summary[name]:.4f}" for name, said in names.items())
    assert f"epoch 2 of 2, step 40, held out: {held_out}\n" in out
    assert out.endswith(text_of(summary) + "\n")
    phases = [line.split(" ... ")[0] for line in err.splitlines() if " ... " in line]
    assert phases == ["generating", "reading", "compiling", *["reading", "evaluating"] * 2, "saving"]
    compiling = float(re.search(r"^compiling \.\.\. (\d+\.\d) s$", err, flags=re.MULTILINE)[1])
    assert compiling > 0.5
    log = r"epoch 2 of 2, step 40: loss 0\.\d{4}, AUC 0\.\d{4}, [\d,]+ samples/s, 40,000 samples, 0 s left"
    assert re.search(rf"^{log}$", err, flags=re.MULTILINE)
    assert "\r" not in out + err


def test_generated_data_is_reused(tmp_path, eager, monkeypatch):
    more = ["--generated_rows=1000", "--generated_dir=made", "--train_steps=1", "--gradient_accumulation_steps=1"]
    first = call(None, *more)
    files = {f: f.stat().st_mtime_ns for f in Path("made").rglob("*")}
    monkeypatch.setattr(criteo_synthetic, "_write_all", lambda *_: pytest.fail("generated again"))
    second = call(None, *more, "--overwrite")
    assert {f: f.stat().st_mtime_ns for f in Path("made").rglob("*")} == files
    assert (first["auc"], first["best_auc"]) == (second["auc"], second["best_auc"])
    message = refused("--generated_rows=2000", "--generated_dir=made")
    assert message.startswith("error: folder: got 'made', which holds")


@pytest.mark.parametrize("numeric", ["log1p", "raw"])
def test_numeric(data, eager, numeric):
    """Raw numerics make logits of thousands; what comes out is finite either way, and another thing."""
    summary = call(data, f"--numeric={numeric}", "--gradient_accumulation_steps=1")
    assert summary["best_auc"] is None
    assert math.isfinite(summary["log_loss"])
    assert 0 <= summary["auc"] <= 1
    assert (summary["log_loss"] < 0.7) == (numeric == "log1p")


def test_numerics_of_the_two_spellings(data):
    args = program.parse(["--data_paths", f"{data}/train", "--batch_size=50"])
    batch = next(iter(program.read(args, args.data_paths, drop_remainder=True)))
    raw, log1p = (f(dict(batch))["numeric"] for f in (program.raw_features, program.log1p_features))
    assert raw.shape == (50, 13)
    torch.testing.assert_close(log1p, raw.clamp(min=0).log1p())
    assert raw.max() > 1000


@pytest.mark.parametrize(("flag", "steps"), [("true", 8), ("True", 8), ("false", 9), ("FALSE", 9)])
def test_drop_remainder(data, eager, flag, steps):
    """32 full batches of 103, and 4 rows more."""
    summary = call(data, "--batch_size=103", f"--drop_remainder={flag}")
    assert summary["steps"] == steps


def test_the_table_holds_every_id_once(data, eager):
    summary = call(data, "--train_epoch=2")
    args = program.parse(["--data_paths", f"{data}/train", "--batch_size=100"])
    pairs = set()
    for batch in program.read(args, args.data_paths, drop_remainder=True):
        for name in program.CATEGORICAL:
            pairs |= {(name, id) for id in batch[name].values[: int(batch[name].offsets[-1])].tolist()}
    assert summary["rows"] == len(pairs)
    assert summary["steps"] == 2 * 9


def test_without_held_out_files(data, eager):
    program.main([f"--data_paths={data}/train", "--batch_size=100", "--output_dir=out", "--log_steps=1000"])
    summary = json.loads(Path("out/summary.json").read_text(), parse_constant=pytest.fail)
    assert set(summary) == SUMMARY
    assert summary["calibration"] is None
    assert 0 < summary["auc"] < 1  # of the training rows
    assert 0 < summary["log_loss"] < 0.7


def test_eval_steps(data, eager, monkeypatch):
    counted = []
    evaluate = loop.evaluate

    def spy(*args: Any, **kwargs: Any) -> dict:
        values = evaluate(*args, **kwargs)
        counted.append(values["num_samples"])
        return values

    monkeypatch.setattr(loop, "evaluate", spy)
    call(data, "--train_steps=1", "--eval_steps=3")
    call(data, "--train_epoch=2", output="again")
    assert counted == [300, 1100, 1100]


def test_a_cache_changes_no_byte(data, eager):
    call(data, "--train_epoch=2", output="decoded")
    call(data, "--train_epoch=2", "--cache_dir=cache", output="cached")
    assert len([*Path("cache").rglob("*.arrow")]) == ROWS["train_files"] + ROWS["eval_files"]
    assert newest("cached") == newest("decoded")


def test_every_argument_reaches_what_it_names(data, eager, monkeypatch):
    """None is dropped or crossed with another on its way: what is called gets the values that were given."""
    got: dict[str, list[dict]] = {}

    def spy(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call_and_note(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(real).bind(*args, **kwargs).arguments
            got.setdefault(name, []).append(dict(bound))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call_and_note)

    for name in ("sparse_adamw", "adamw", "train_step", "reader"):
        spy(program, name)
    for name in ("TrainConfig", "train", "evaluate"):
        spy(loop, name)
    call(
        data, "--thread_num=3", "--prefetch=2", "--cache_dir=cache", "--drop_remainder=false",
        "--gradient_accumulation_steps=2", "--log_steps=5", "--save_steps=6", "--eval_steps=7", "--max_to_keep=8",
        "--full_save_every=9", "--save_in_background", "--train_steps=1", "--train_epoch=11", "--sparse_lr=0.12",
        "--dense_lr=0.13", "--seed=14", "--precision=bf16", "--max_rows=15000", "--num_threads=2",
        "--eval_every=21", "--watch=log_loss", "--stop_after=22", "--reduce_by=0.25",
    )  # fmt: skip
    assert torch.get_num_threads() == 2
    assert got["sparse_adamw"] == [{"lr": 0.12, "weight_decay": 0.01}]
    assert got["adamw"] == [{"lr": 0.13, "weight_decay": 0.01}]
    (step,) = got["train_step"]
    expected = {"accumulation": 2, "max_rows": 15000, "seed": 14, "precision": "bf16"}
    assert {name: step[name] for name in expected} == expected
    assert [(r["paths"], r["drop_remainder"]) for r in got["reader"]] == [
        (f"{data}/train", False),
        (f"{data}/eval", False),
    ]
    expected = {"batch_size": 100, "threads": 3, "prefetch": 2, "cache": "cache"}
    assert all({name: r[name] for name in expected} == expected for r in got["reader"])
    assert got["TrainConfig"] == [
        {
            "output_dir": "out", "log_steps": 5, "save_steps": 6, "train_steps": 1, "train_epoch": 11, "max_to_keep": 8,
            "full_save_every": 9, "save_in_background": True, "eval_every": 21, "watch": "log_loss", "stop_after": 22,
            "reduce_after": None, "reduce_by": 0.25,
        }
    ]  # fmt: skip
    assert [e["eval_steps"] for e in got["evaluate"]] == [7]


def test_dense_parameters_follow_the_seed():
    one, same, other = (program.build_step(program.parse([f"--seed={seed}"]))[1].params for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_run_records_its_program(data, eager):
    """The arguments of the program alone: those of training are no part of what is built."""
    call(data, "--sparse_lr=0.5", "--train_steps=1")
    record = read_run("out")
    assert record["program"] == {"import": "recfx.examples.deepfm"}
    assert record["arguments"] == program.ARGUMENTS | {"sparse_lr": 0.5, "batch_size": 100}
    assert set(record["arguments"]).isdisjoint({"output_dir", "train_steps", "generated_rows"})
    assert record["paths"] == {"train": f"{data}/train", "evaluate": f"{data}/eval"}
    assert list(record["sources"]) == ["recfx/examples/deepfm.py"]
    built, state = restore("out")
    assert int(state.step) == 1
    assert evaluate("out", f"{data}/eval") == loop.evaluate(
        built.step.evaluate_, state, built.reader(f"{data}/eval", "evaluate")
    )


# Stopping and going on.


@pytest.mark.parametrize("accumulation", [1, 4])
def test_resume(data, eager, accumulation):
    more = [f"--gradient_accumulation_steps={accumulation}", "--train_epoch=2"]
    call(data, *more, output="whole")
    stopped = call(data, *more, "--train_steps=5", output="parts")
    assert (stopped["steps"], stopped["stopped"]) == (5, "train_steps")
    resumed = call(data, *more, "--resume", output="parts")
    assert newest("parts") == newest("whole")
    with pytest.warns(match="nothing is left to train"):
        again = call(data, *more, "--resume=true", output="parts")
    assert newest("parts") == newest("whole")
    names = ("auc", "log_loss", "calibration", "rows", "steps")
    assert [again[name] for name in names] == [resumed[name] for name in names]
    assert again["samples_per_s"] is None


@pytest.mark.parametrize("accumulation", [1, 4])
def test_several_steps_per_replay_end_in_the_same_bytes(data, monkeypatch, accumulation):
    """On a CPU one after another: 33 batches, and 9 windows, the last of them incomplete."""
    monkeypatch.setattr("recfx.capture.captured.compiled", lambda function, state, sections: function)
    made, several = [], running.capture_steps
    monkeypatch.setattr(running, "capture_steps", lambda *args, **how: made.append(how) or several(*args, **how))
    more = [f"--gradient_accumulation_steps={accumulation}", "--log_steps=5"]
    one = call(data, *more, output="one")
    assert made == []
    many = call(data, *more, "--steps_per_replay=7", output="many")
    assert made == [{"steps_per_replay": 7, "backend": "inductor"}]
    assert newest("many") == newest("one")
    names = ("auc", "log_loss", "calibration", "rows", "steps")
    assert [many[name] for name in names] == [one[name] for name in names]


def test_ctrl_c(data, eager, monkeypatch, capsys):
    def interrupting(step: Step, state: Any, batch: Any, *, backend: str) -> Callable:
        def run(state: Any, batch: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return step.update_(state, batch)

        return run

    calls: list = []
    with monkeypatch.context() as patch:
        patch.setattr(running, "capture", interrupting)
        summary = call(data, output="parts")
    assert (summary["steps"], summary["stopped"]) == (2, "interrupted")
    call(data, "--resume", output="parts")
    call(data, output="whole")
    assert newest("parts") == newest("whole")


def test_checkpoints_are_saved_and_kept_as_told(data, eager):
    call(data, "--gradient_accumulation_steps=1", "--save_steps=10", "--max_to_keep=2")
    assert sorted(p.name for p in Path("out").iterdir()) == [
        ".lock",
        "metrics.jsonl",
        "run.json",
        "step-000000030",
        "step-000000033",
        "summary.json",
    ]


def test_the_seed_decides(data, eager):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(data, f"--seed={seed}", "--train_steps=2", output=name)
    assert newest("a") == newest("b") != newest("c")


# Arguments and errors.


def test_defaults_are_the_seeds():
    args = vars(program.parse([]))
    assert {name: args[name] for name in SEED_DEFAULTS} == SEED_DEFAULTS
    assert args["max_to_keep"] >= 1


def test_the_first_state_is_the_seeds():
    """26 columns of 8 + 1, one physical table; 21 206 dense parameters."""
    step, state = program.build_step(program.parse([]))
    assert sum(p.numel() for p in state.params.values()) == 21_206
    assert [(plan.dims, len(plan.lookups)) for plan in step.plan.tables] == [((8, 1), 26)]
    assert {c.init for v in step.plan.tables[0].vocabularies for c in v} == {program.truncated_normal(0.001)}


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0
    usage, options = " ".join(capsys.readouterr().out.split()).split(" options: ")
    assert "python -m recfx.examples.deepfm" in usage
    for name, value in vars(program.parse([])).items():
        explained = re.search(rf"--{name} (?:\{{.*?\}}|\[?[A-Z_]+\]?) (.+?)(?= --[a-z]|$)", options)
        assert explained, name
        assert len(explained[1].split("default")[0]) > 10, name
        if value is not None:
            assert f"(default: {value})" in explained[1], name
        else:
            assert re.search(r"; None: \w.* \(default: None\)$", explained[1]), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--drop_remainder", "1"], "--drop_remainder: got '1', expected true or false"),
        (["--resume", "maybe"], "--resume: got 'maybe', expected true or false"),
        (["--numeric", "sqrt"], "--numeric: invalid choice: 'sqrt'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--batch_size", "many"], "--batch_size: invalid int value: 'many'"),
        (["--epochs", "2"], "unrecognized arguments: --epochs 2"),
    ],
)
def test_arguments_that_cannot_be_read(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data_paths=nowhere"], r"paths: got 'nowhere', which matches no file"),
        (["--data_paths={data}/train", "--eval_paths=nowhere"], r"paths: got 'nowhere', which matches no file"),
        (["--data_paths={data}/info.json"], r"info.json', row 0: got '\{' .*, expected a JSON object in a line"),
        (["--data_paths={data}/train", "--batch_size=0"], r"batch_size: got 0, expected at least 1"),
        (
            ["--data_paths={data}/train", "--batch_size=4000"],
            r"reader: got 3300 rows in '.*00.orc', .*02.orc' \(batch_size=4000",
        ),
        (["--data_paths={data}/train", "--eval_paths={data}/none.orc"], r"reader: got 0 rows in '.*none.orc' \(batch_"),
        (["--data_paths={data}/train", "--thread_num=0"], r"threads: got 0, expected at least 1"),
        (["--data_paths={data}/train", "--gradient_accumulation_steps=0"], r"accumulation: got 0, expected at least 1"),
        (["--data_paths={data}/train", "--steps_per_replay=0"], r"steps_per_replay: got 0, expected at least 1"),
        (["--data_paths={data}/train", "--train_steps=0"], r"train_steps: got 0, expected at least 1"),
        (["--data_paths={data}/train", "--sparse_lr=-1"], r"lr: got -1.0, expected 0"),
        (
            ["--data_paths={data}/train", "--output_dir={data}/info.json"],
            r"output_dir: got .*info.json', a file or below one, expected",
        ),
        (["--generated_rows=5", "--generated_dir=made"], r"generated_rows: got 5, expected at least 10"),
        (["--num_threads=0"], r"num_threads: got 0, expected at least 1"),
        (["--eval_paths={data}/eval"], r"eval_paths: got .*/eval without data_paths, expected both or neither"),
        (["--data_paths={data}/train", "--eval_steps=0"], r"eval_steps: got 0, expected at least 1"),
    ],
)
def test_errors_are_one_line(data, eager, argv, message):
    got = refused(*(word.format(data=data) for word in argv))
    assert got.startswith("error: ")
    assert "\n" not in got
    assert re.search(message, got), got


def test_what_is_wrong_with_the_output_folder_is_said_before_anything_compiles(data, eager, monkeypatch):
    call(data, "--train_steps=1")
    for name in ("capture", "capture_evaluation"):
        monkeypatch.setattr(running, name, lambda *_, **__: pytest.fail("compiled"))
    paths = f"--data_paths={data}/train", "--batch_size=100"
    assert "which holds step-000000001, for a run that begins at step 0" in refused(*paths, "--output_dir=out")
    Path("file").touch()
    for folder in ("file", "file/below"):
        assert f"output_dir: got '{folder}', a file or below one" in refused(*paths, f"--output_dir={folder}")
    got = refused(*paths, "--output_dir=/proc/none")
    assert re.match(r"error: output_dir: got '/proc/none', where nothing can be written \(.*\), expected a folder", got)
    with checkpoint.Saver("busy", program.build_step(program.parse([]))[0]):
        monkeypatch.setattr("recfx.checkpoint.folders.LOCK_WAIT_S", 0.0)
        assert "writes checkpoints there, expected no other writer" in refused(*paths, "--output_dir=busy")

    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    got = refused(*paths, "--output_dir=new")
    assert got.startswith("error: output_dir: got 'new', where nothing can be written (No space left on device), exp")


def test_ctrl_c_while_it_compiles(data, monkeypatch, capsys):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "capture_evaluation", interrupted)
    with pytest.raises(SystemExit) as stop:
        call(data)
    assert stop.value.code == 130
    err = capsys.readouterr().err
    assert re.search(r"\ninterrupted while compiling, after \d\.\d s\. Nothing was trained\.\n$", err)
    assert "Traceback" not in err


def test_a_label_that_is_no_click_is_named(data, eager):
    table = orc.read_table(data / "train" / "part-00001.orc")
    labels = table["label"].to_pylist()
    labels[1007] = [2.0]
    Path("bad").mkdir()
    orc.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(labels)), "bad/part.orc")
    got = refused("--data_paths=bad", "--batch_size=100", "--output_dir=out")
    assert got == "error: column 'label' of 'bad/part.orc', row 1007: got 2.0, expected one of 0, 1."


def test_cuda_is_refused_where_it_cannot_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused("--device=cuda") == "error: device: got cuda, expected cpu. torch finds no CUDA device here."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "save_in_background: got true on cuda" in refused("--device=cuda", "--save_in_background")


def test_a_damaged_checkpoint_is_named(data, eager):
    call(data, "--train_steps=2")
    path = checkpoint.latest("out") / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    got = refused(f"--data_paths={data}/train", "--batch_size=100", "--output_dir=out", "--resume")
    assert got.startswith(f"error: {path}: checksum differs")


def test_an_error_of_the_process_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "recfx.examples.deepfm", "--data_paths=nowhere", "--output_dir=out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: paths: got 'nowhere', which matches no file")
    assert "Traceback" not in done.stderr + done.stdout
    assert not (ROOT / "out").exists()


# The launch script.


def launched(*more: str) -> argparse.Namespace:
    """The arguments that run.sh gives the program."""
    environment = os.environ | {"PYTHON": "echo"}
    done = subprocess.run([RUN_SH, *more], env=environment, capture_output=True, text=True, timeout=60, check=True)
    module, *argv = done.stdout.split()[1:]
    assert module == "recfx.examples.deepfm"
    return program.parse(argv)


def test_run_sh():
    assert os.access(RUN_SH, os.X_OK)
    args = launched()
    assert args.data_paths == "./data/"
    assert {**vars(args), "data_paths": None} == vars(program.parse([]))


def test_run_sh_takes_the_number_of_processes():
    environment = os.environ | {"PYTHON": "echo", "NPROC": "3"}
    done = subprocess.run([RUN_SH, "--seed=1"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    launcher, *words = done.stdout.split()[1:]
    assert launcher == "torch.distributed.run"
    assert words[:4] == ["--standalone", "--nproc_per_node=3", "-m", "recfx.examples.deepfm"]
    assert program.parse(words[4:]).seed == 1


def test_run_sh_passes_arguments_on():
    args = launched("--batch_size=7", "--data_paths=elsewhere")
    assert (args.batch_size, args.data_paths, args.log_steps) == (7, "elsewhere", 10)


# The demo.


def demo_argv() -> list[str]:
    """What `make demo` gives the program."""
    command = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/installed", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    words = done.stdout.replace("\\\n", " ").split()
    assert words[1:3] == ["-m", "recfx.examples.deepfm"]
    return words[3:]


def test_the_demo_generates_its_data_and_accumulates_nothing():
    args = program.parse(demo_argv())
    assert (args.data_paths, args.eval_paths, args.generated_rows) == (None, None, 2_000_000)
    assert args.gradient_accumulation_steps == 1


@pytest.mark.slow
def test_the_demo_learns_what_can_be_learnt():
    """In three minutes, to 0.05 of the best possible AUC and 0.05 above what the numbers alone tell."""
    torch.set_num_threads(2)
    program.main(demo_argv())
    summary = json.loads(Path("demo/ckpt/summary.json").read_text())
    assert summary["train_s"] < 180
    assert summary["best_auc"] - 0.05 < summary["auc"] < summary["best_auc"] + 0.01
    assert summary["auc"] > summary["numeric_lr_auc"] + 0.05
