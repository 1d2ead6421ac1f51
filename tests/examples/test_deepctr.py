"""The program of long sequences, strings and crossed features, on small generated click logs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx.capture import capture
from recfx.data import reader
from recfx.examples import deepctr as program
from recfx.examples import deepctr_data
from recfx.program import running
from recfx.step import Step
from recfx.types import COUNTS, Batch
from tests.reference_features import cross_pair, fingerprint64, lists_of

ROWS = {"rows": 1200, "seed": 3, "files": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepctr") / "data"
    deepctr_data.generate(folder, **ROWS)
    return folder


@pytest.fixture(scope="module")
def batch(data: Path) -> Batch:
    return next(iter(reader(f"{data}/train", program.COLUMNS, 100)))


@pytest.fixture
def rows(data: Path) -> list[dict]:
    return pq.read_table(data / "train" / "part-00000.parquet").slice(0, 100).to_pylist()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists cut at 5, so that the small log has longer ones."""
    monkeypatch.setattr(program, "KEPT", 5)
    monkeypatch.setattr(program, "RECENT", 2)


def test_features_are_what_the_rows_say(batch, rows, short):
    feats = program.features(batch)
    mod = program.NUM_BUCKETS
    assert lists_of(feats["item"]) == [[row["item"] % 2**64 % mod] for row in rows]
    clicks = [[id % 2**64 % mod for id in row["clicks"]] for row in rows]
    assert lists_of(feats["clicks"]) == [ids[-5:] for ids in clicks]
    assert lists_of(feats["recent"]) == [ids[-2:] for ids in clicks]
    words = [[fingerprint64(word.encode()) % 2**64 % mod for word in row["words"]] for row in rows]
    assert lists_of(feats["words"]) == [ids[-5:] for ids in words]
    assert lists_of(feats["city_category"]) == [[cross_pair(row["city"], row["category"])] for row in rows]
    for name, column, default in (("bucket1", "dense1", 0.0), ("bucket2", "dense2", 1.0)):
        dense = [row[column] or [default] * 8 for row in rows]
        expected = [[sum(x >= boundary for boundary in program.BOUNDARIES) for x in row] for row in dense]
        assert feats[name].tolist() == expected
    assert {name: int(count) for name, count in feats[COUNTS].items()} == dict.fromkeys(feats[COUNTS], 0)


def uncompiled(step: Step, state: Any, batch: Batch, *, backend: str = "") -> Callable:
    return lambda state, batch: step.update_(state, batch)


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_trains_evaluates_and_saves(data, tmp_path, monkeypatch, captured):
    if not captured:
        monkeypatch.setattr(running, "capture", uncompiled)
        monkeypatch.setattr(running, "capture_evaluation", lambda step, state, batch, *, backend: step.evaluate_)
    args = [f"--data_paths={data}/train", f"--eval_paths={data}/train", "--batch_size=100", "--log_steps=5"]
    program.main([*args, f"--output_dir={tmp_path}/out", "--train_epoch=6"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 6 * 12
    assert summary["auc"] > 0.75
    assert list((tmp_path / "out").glob("*/*.safetensors"))


def test_ctrl_c_is_summed_up_too(data, tmp_path, monkeypatch):
    """It stops before anything is evaluated, and before there is a rate."""

    def interrupted(step: Step, state: Any, batch: Batch, *, backend: str) -> Callable:
        def run(state: Any, batch: Batch) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return uncompiled(step, state, batch)(state, batch)

        return run

    monkeypatch.setattr(running, "capture", interrupted)
    monkeypatch.setattr(running, "capture_evaluation", lambda step, state, batch, *, backend: step.evaluate_)
    program.main([f"--data_paths={data}/train", "--batch_size=100", f"--output_dir={tmp_path}/out"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["steps"], summary["samples_per_s"]) == (1, None)
    assert 0 <= summary["auc"] <= 1
    assert summary["log_loss"] > 0


def test_captured_as_one_graph_it_is_the_same_step(batch):
    step, state = program.build_step(program.parse([]))
    _, other = program.build_step(program.parse([]))
    run, eager = capture(step, state, batch), uncompiled(step, state, batch)
    for _ in range(3):
        state, aux = run(state, batch)
        other, expected = eager(other, batch)
        torch.testing.assert_close(aux.loss, expected.loss, rtol=1e-5, atol=0)
    assert [int(t.num_rows) for t in state.tables] == [int(t.num_rows) for t in other.tables]


def test_the_table_of_items_is_shared_by_its_history(batch):
    step, state = program.build_step(program.parse([]))
    state, aux = step.update_(state, batch)
    names = {c.name for t in step.plan.tables for columns in t.vocabularies for c in columns}
    assert {"item", "bucket", "emb/words", "emb/city_category"} <= names
    assert torch.isfinite(aux.loss)
    assert set(aux.counts) == {"crossed_without_room", "long_clicks", "long_words"}


def test_a_list_above_its_length_is_an_error_before_it_trains(batch, monkeypatch):
    monkeypatch.setattr(program, "LONGEST", 3)
    with pytest.raises(ValueError, match=r"clicks: got a list of .* values, expected at most 3"):
        program.features(batch)


def test_generated_once_and_never_over_something_else(data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.parquet")}
    assert len(before) == 3
    assert 0.6 < deepctr_data.generate(data, **ROWS)["best_auc"] < 0.9
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.parquet")} == before
    lengths = [len(row) for row in pq.read_table(data / "eval")["clicks"].to_pylist()]
    assert min(lengths) == 0
    assert max(lengths) <= deepctr_data.LONGEST
    (tmp_path / "other").write_text("")
    with pytest.raises(ValueError, match=r"folder: got .*, which holds other files"):
        deepctr_data.generate(tmp_path, **ROWS)


def test_errors_end_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as stop:
        program.main([f"--data_paths={tmp_path}/nowhere"])
    assert str(stop.value.code).startswith("error: ")


@pytest.mark.parametrize("paths", [["--data_paths={none}"], ["--data_paths={data}/train", "--eval_paths={none}"]])
def test_files_without_a_batch_are_an_error(data, tmp_path, paths):
    none = tmp_path / "none.parquet"
    pq.write_table(pq.read_table(data / "eval").slice(0, 0), none)
    with pytest.raises(SystemExit, match=r"error: reader: got \d+ rows in '.*' \(batch_size=500, "):
        program.main([path.format(data=data, none=none) for path in paths])


def test_eval_paths_are_not_dropped_in_silence():
    with pytest.raises(SystemExit, match=r"error: eval_paths: got x without data_paths, expected both or neither"):
        program.main(["--eval_paths=x"])


def test_the_device_is_that_of_every_table_and_parameter():
    args = program.parse(["--max_rows=1000"])
    args.device = "meta"
    _, state = program.build_step(args)
    assert {t.device.type for t in tree_leaves((state.tables, state.params))} == {"meta"}
    assert {t.ids.numel() for t in state.tables} == {1000}


def test_cuda_is_refused_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        program.main(["--device=cuda"])
    assert stop.value.code == "error: device: got cuda, expected cpu. torch finds no CUDA device here."
    with pytest.raises(SystemExit) as stop:
        program.main(["--device=tpu"])
    assert stop.value.code == 2
    assert "--device: invalid choice: 'tpu'" in capsys.readouterr().err
