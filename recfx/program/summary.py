"""The summary of a run: rounded numbers for people on the screen, and all digits in summary.json."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from recfx.dist import Group, RankError, current
from recfx.program.ranks import end_at_once, end_ranks, is_first_process, rank_prefix
from recfx.program.record import write_text
from recfx.step import TrainState
from recfx.table import num_live
from recfx.train import Progress
from recfx.train.ranks import of_ranks

__all__ = ["run_program", "summary_of", "text_of", "write_summary"]

FILE = "summary.json"
LABELS = {
    "auc": "AUC",
    "best_auc": "best possible AUC",
    "numeric_lr_auc": "AUC of the numbers alone",
    "samples_per_s": "speed",
    "first_step_s": "first step, compiled",
    "train_s": "train time",
    "refused_ids": "ids without a row",
    "peak_rss_bytes": "peak memory",
    "nonfinite_batches": "batches with NaN",
}


def summary_of(
    progress: Progress, state: TrainState, planted: Mapping[str, float | None], *, group: Group | None = None
) -> dict[str, Any]:
    """The numbers of a run, for JSON: None for NaN. Rows, ids without a row and memory are those of all ranks.

    Args:     planted: known numbers of generated data, by name.
              group: whose ranks must all call this; None: the group that was joined, or one process.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rows = sum(num_live(t) for t in state.tables)
    refused = sum(int(t.num_refused) for t in state.tables)
    rows, refused, peak = of_ranks(group or current()).sum_(torch.tensor([rows, refused, peak])).tolist()
    values: dict[str, float | None] = {"auc": progress.auc, "log_loss": progress.loss, **progress.evaluation}
    values = values if "auc" in progress.evaluation or not progress.evaluation else {**progress.evaluation}
    if "auc" in values:
        values = {"auc": values["auc"], **planted, "log_loss": values["log_loss"]}
        values["calibration"] = progress.evaluation.get("calibration")
    else:  # of another task, or of several
        values = {name: v for name, v in values.items() if "num_" not in name} | dict(planted)
    summary = {
        **values,
        "samples_per_s": progress.samples_per_s,
        "first_step_s": progress.first_step_s,
        "train_s": progress.train_s,
        "rows": rows,
        "refused_ids": refused,
        "peak_rss_bytes": peak,
        "nonfinite_batches": progress.num_nonfinite,
        "steps": progress.step,
        "stopped": progress.stopped or "end of data",
    }
    return {name: None if value != value else value for name, value in summary.items()}  # JSON has no NaN


def write_summary(folder: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes <folder>/summary.json, whole or not at all.

    Raises:   OSError naming the file, with the numbers, when the disk is full or not writable.
    """
    path = Path(folder, FILE)
    try:
        write_text(path, json.dumps(summary, indent=1))
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{path}: {error.strerror or error}. The run has ended and its checkpoints are whole; this file was not "
            f"written. Its content: {json.dumps(summary)}",
        ) from error


def text_of(summary: Mapping[str, Any]) -> str:
    """A line for each number, with its unit: four significant digits, counts in full, times to a tenth of a second.

    Example:  >>> print(text_of({"auc": 0.74801234, "rows": 203441, "train_s": 12.3456, "peak_rss_bytes": 1.23e9}))
                      AUC  0.7480
                     rows  203,441
               train time  12.3 s
              peak memory  1.2 GB
    """
    labels = {name: LABELS.get(name, name.replace("_", " ")) for name in summary}
    width = max(map(len, labels.values()), default=0)
    return "\n".join(f"{labels[name]:>{width}}  {_value(name, value)}" for name, value in summary.items())


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("_bytes"):
        return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"
    if name == "samples_per_s":
        return f"{_digits(value)} samples/s"
    if name.endswith("_s"):
        return f"{value:,.1f} s" if value >= 1 else f"{value:.2g} s"
    return f"{value:,}" if isinstance(value, int) else _digits(value)


def _digits(number: float) -> str:
    """Four significant digits, without an exponent where there are usual ones."""
    rounded = float(f"{number:.4g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:#.4g}"


def run_program(run: Callable[[Any], Mapping[str, Any]], args: Any) -> None:
    """Runs a program and prints its summary, on rank 0; an error is one line on standard error, naming the rank.

    Raises:   SystemExit: 1 on an error, 130 where ctrl-C ended it before it could save, as shells have it.
    """
    try:
        summary = run(args)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, RankError) as error:
        line = f"{rank_prefix()}error: {_line_of(error)}"
        if rank_prefix():
            end_at_once(1, line)
        raise SystemExit(line) from error
    except KeyboardInterrupt as stop:
        line = str(stop) or "interrupted. What was trained since the last checkpoint is lost."
        if rank_prefix():
            end_at_once(130, f"{rank_prefix()}{line}")
        print(line, file=sys.stderr)
        raise SystemExit(130) from stop
    if is_first_process():
        print(text_of(summary))
    end_ranks()


def _line_of(error: Exception) -> str:
    """The message of an error; without the number of a system error where the message is ours."""
    ours = isinstance(error, OSError) and error.filename is None and error.strerror
    return str(error.strerror) if ours else str(error)  # type: ignore[attr-defined]
