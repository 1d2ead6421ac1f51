"""What a program says at its end."""

from __future__ import annotations

import json
import os

import pytest

from recfx.program.summary import run_program, text_of, write_summary

SUMMARY = {
    "auc": 0.74801234,
    "best_auc": None,
    "log_loss": 0.1234567,
    "calibration": 12.3456,
    "samples_per_s": 35214.7,
    "first_step_s": 0.01234,
    "train_s": 1234.56,
    "rows": 203441,
    "peak_rss_bytes": 1_230_000_000,
    "steps": 7,
    "stopped": "end of data",
}


def test_digits_units_and_separators():
    lines = [" ".join(line.split()) for line in text_of(SUMMARY).splitlines()]
    assert lines == [
        "AUC 0.7480", "best possible AUC -", "log loss 0.1235", "calibration 12.35", "speed 35,210 samples/s",
        "first step, compiled 0.012 s", "train time 1,234.6 s", "rows 203,441", "peak memory 1.2 GB", "steps 7",
        "stopped end of data",
    ]  # fmt: skip
    assert len({line.index("  ", len(line) - len(line.lstrip())) for line in text_of(SUMMARY).splitlines()}) == 1
    assert text_of({"peak_rss_bytes": 810_123_456}).split() == ["peak", "memory", "810", "MB"]


def test_the_file_keeps_all_digits(tmp_path):
    write_summary(tmp_path, SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_leaves_the_file_before_and_tells_the_numbers(tmp_path, monkeypatch):
    write_summary(tmp_path, {"auc": 0.5})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        run_program(lambda args: write_summary(tmp_path, {"auc": 0.75}), None)
    assert str(stop.value.code) == (
        f"error: {tmp_path}/summary.json: No space left on device. The run has ended and its checkpoints are whole; "
        'this file was not written. Its content: {"auc": 0.75}'
    )
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"auc": 0.5}


def test_ctrl_c_ends_with_130_and_one_line(capsys):
    def run(args):
        raise KeyboardInterrupt(*args)

    for args in ([], ["interrupted while compiling, after 3.1 s. Nothing was trained."]):
        with pytest.raises(SystemExit) as stop:
            run_program(run, args)
        assert stop.value.code == 130
        err = capsys.readouterr().err
        assert err.startswith("interrupted")
        assert err.count("\n") == 1
