"""The page about a run: what its metrics.jsonl, run.json, summary.json and newest checkpoint hold."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recfx import metrics
from recfx.program import read_run, restore
from recfx.program.record import place_of, write_text
from recfx.program.summary import text_of
from recfx.report.charts import Line, bars, lines
from recfx.rows import statistics
from recfx.step import Step, TrainState
from recfx.train import evaluate
from recfx.train.watching import FILE, read_metrics_file

__all__ = ["write_report"]

NAME = "report.html"
STYLE = (
    "body{font:14px/1.5 sans-serif;color:#222;max-width:1200px;margin:2em auto;padding:0 1em}"
    "h1{font-size:22px}h2{font-size:16px;margin-top:2em;border-bottom:1px solid #ddd}"
    ".charts{display:flex;flex-wrap:wrap;gap:12px}.charts svg{width:100%;max-width:560px;height:auto}"
    "table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top}"
    "pre{background:#f6f6f6;padding:8px;overflow:auto}"
)
CURVES = (
    "loss",
    "log_loss",
    "auc",
    "pr_auc",
    "normalised_entropy",
    "calibration",
    "ece",
    "hit_rate_1",
    "hit_rate_10",
    "rmse",
)
Lines = Sequence[Mapping[str, Any]]


def write_report(run: str | os.PathLike[str], *, files: Any = None, eval_steps: int | None = None) -> Path:
    """Writes <run>/report.html: learning curves by task, throughput, growth of the tables, norms of their rows, where
    time goes, and what was trained on what; with files, calibration by bins of the prediction.

    Args:     run: output folder of a run.  files: held-out files that the newest checkpoint is evaluated on; None: no
              chart of calibration by bins.  eval_steps: batches of them; None: all.
    Returns:  its path. It holds its charts, so it can be sent as one file.
    Raises:   ValueError when the folder holds no run or no metrics.jsonl; ModuleNotFoundError without matplotlib.
    """
    folder = place_of(run).parent
    record, found = read_run(run), read_metrics_file(folder / FILE)
    logs = [line for line in found if line["event"] == "log"]
    held_out = [line for line in found if line["event"] == "evaluation"]
    if not logs and not held_out:
        raise ValueError(f"run: got '{folder}', whose {FILE} has no line of a step, expected some. Train it longer.")
    sections = [
        ("Learning", _learning(logs, held_out)),
        ("Speed", _speed(logs)),
        ("Tables", _tables(logs)),
    ]
    built, state = restore(run, allow_changes=True)
    sections.append(("Rows", _norms(built.step, state)))
    if files is not None:
        sections.append(("Calibration", _calibration(built, state, files, eval_steps)))
    text = _page(folder, record, sections)
    path = folder / NAME
    write_text(path, text)
    return path


def _learning(logs: Lines, held_out: Lines) -> list[str]:
    """A chart for each metric of each task, training and held out."""
    names = dict.fromkeys(name for line in logs for name in line["metrics"])
    names |= dict.fromkeys(name for line in held_out for name in line["values"])
    charts = []
    for name in (name for name in names if name.split("/")[-1] in CURVES):
        curves: dict[str, Line] = {}
        for what, part, of in (("training", logs, "metrics"), ("held out", held_out, "values")):
            there = [line for line in part if line[of].get(name) is not None]
            if there:
                curves[what] = [line["step"] for line in there], [line[of][name] for line in there]
        charts += [lines(name, curves)] if curves else []
    return charts


def _speed(logs: Lines) -> list[str]:
    steps = [line["step"] for line in logs]
    charts = [lines("samples per second", {"": (steps, [line["samples_per_s"] for line in logs])})]
    times = logs[-1]["times"] if logs else {}
    return [*charts, bars("where time goes", times, unit="seconds")] if times else charts


def _tables(logs: Lines) -> list[str]:
    """Growth, and what was inserted, evicted and not admitted, of each table."""
    charts = []
    steps = [line["step"] for line in logs]
    for i, table in enumerate(logs[-1]["tables"] if logs else []):
        features = table["features"]
        title = f"table {i}: {', '.join(features[:3])}{' ...' if len(features) > 3 else ''}"
        of = {
            name: (steps, [line["tables"][i].get(name) for line in logs])
            for name in ("rows", "inserted", "evicted", "not_admitted")
        }
        shown = {name.replace("_", " "): curve for name, curve in of.items() if name == "rows" or any(curve[1])}
        charts.append(lines(title, shown))
    return charts


def _norms(step: Step, state: TrainState) -> list[str]:
    """The norm of the rows of each logical table: mean, median, 99 %, largest."""
    names = [column.name for table in step.plan.tables for vocabulary in table.vocabularies for column in vocabulary]
    found = {name: statistics(step, state, name).norm for name in names[:40]}
    return [bars("norm of rows, mean", {name: of.mean for name, of in found.items() if of.mean == of.mean})]


def _calibration(built: Any, state: TrainState, files: Any, eval_steps: int | None) -> list[str]:
    """Predicted and observed rate in bins of equal numbers of samples."""
    kept: dict[str, Any] = {}

    def run(state: TrainState, batch: Any) -> Any:
        state, aux = built.step.evaluate_(state, batch)
        kept.update({name: [t.clone() for t in of] for name, of in built.step.tasks.named(state.metrics).items()})
        return state, aux

    run.tasks, run.read = built.step.tasks, built.step.read  # type: ignore[attr-defined]
    values = evaluate(run, state, built.reader(files, "evaluate"), eval_steps=eval_steps)
    charts = []
    for name, task in built.step.tasks.by_name.items():
        counts = task.init(state.step.device)
        if not isinstance(counts, metrics.BinaryCounts):
            continue
        prefix = f"{name}/" if name else ""
        bins = metrics.calibration_bins(metrics.BinaryCounts(*kept[name]))
        curve = [b.predicted for b in bins], [b.observed for b in bins]
        title = f"{prefix}calibration by bin; AUC {values[f'{prefix}auc']:.4f}"
        charts.append(lines(title, {"observed": curve}, across="predicted", diagonal=True))
    return charts


def _page(folder: Path, record: Mapping[str, Any], sections: Sequence[tuple[str, list[str]]]) -> str:
    summary = folder / "summary.json"
    numbers = text_of(json.loads(summary.read_text())) if summary.exists() else "The run has not ended."
    facts = {
        "program": ", ".join(record["program"].values()),
        "arguments": json.dumps(record["arguments"]),
        "trained on": json.dumps(record["paths"].get("train")),
        "evaluated on": json.dumps(record["paths"].get("evaluate")),
        "versions": ", ".join(f"{name} {of}" for name, of in sorted(record["versions"].items())),
        "device": record["device"],
        "threads": str(record["threads"]),
    }
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    name = html.escape(str(folder))
    parts = [f"<h1>{name}</h1>", f"<pre>{html.escape(numbers)}</pre>", f"<table>{rows}</table>"]
    for title, charts in sections:
        parts += [f"<h2>{title}</h2>", f'<div class="charts">{"".join(charts)}</div>'] if charts else []
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
