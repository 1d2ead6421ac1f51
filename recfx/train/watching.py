"""What a run writes about itself while it trains: metrics.jsonl, a line of JSON for each thing that happened.

    {"event": "start", "step": 0, "epoch": 1, "tables": [...], ...}
    {"event": "log", "step": 10, "epoch": 1, "samples": 10000, "samples_per_s": 51234.5, "loss": 0.46, "metrics": ...}
    {"event": "evaluation", "step": 20, "epoch": 1, "values": {"auc": 0.74, ...}}
    {"event": "end", "step": 20, "stopped": "", ...}

A number that is NaN or infinite is null. Counts are those of all ranks; rank 0 writes.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recfx.checkpoint.folders import BEST, name_of
from recfx.dist import Group
from recfx.step import Step, TrainState
from recfx.table import num_live
from recfx.train.progress import Progress
from recfx.train.stopping import Watch

__all__ = ["FILE", "MetricsFile", "read_metrics_file", "write_best"]

FILE = "metrics.jsonl"
TALLIES = ("looked_up", "inserted", "evicted", "not_admitted")  # as in `TableState.tally`


class MetricsFile:
    """Writes <folder>/metrics.jsonl. All ranks call it at the same points; rank 0 writes.

    A run that goes on from step N drops the lines of later steps, which are trained again; one that begins at step 0
    starts the file from its first line. A line that cannot be written is a warning, once: the run goes on
    without the file.

    Args:     first: the step that this call of `train` begins at.
    """

    def __init__(self, folder: str | Path, step: Step, group: Group, first: int) -> None:
        self._path, self._step, self._group, self._first = Path(folder, FILE), step, group, first
        self._begun = self._broken = False
        self._known: set[tuple[str, int]] = set()  # evaluations before this call

    def begin(self, progress: Progress, state: TrainState) -> None:
        """Writes the "start" line, once, when the run can no longer be rejected."""
        if not self._begun:
            self._begun = True
            if self._group.is_first:
                self._cut()
            ranks = {"ranks": self._group.world_size} if self._group.world_size > 1 else {}
            self._write("start", progress, {"tables": self._tables(state), **ranks})

    def log(self, progress: Progress, state: TrainState) -> None:
        """Writes the "log" line of a step."""
        values = {
            **self._position(progress),
            "loss": progress.loss,
            "metrics": progress.metrics,
            "nonfinite_batches": progress.num_nonfinite,
            "rate_factor": progress.rate_factor,
            "eta_s": progress.eta_s,
            "tables": self._tables(state),
        }
        self._write("log", progress, values)

    def evaluation(self, progress: Progress, state: TrainState) -> None:
        """Writes the "evaluation" line of a step, in place of one that was there before the run was resumed."""
        self.begin(progress, state)
        if self._group.is_first and ("evaluation", progress.step) in self._known:
            self._known.discard(("evaluation", progress.step))
            self._rewrite([l for l in read_metrics_file(self._path) if _key(l) != ("evaluation", progress.step)])
        self._write("evaluation", progress, {"values": progress.evaluation, "rate_factor": progress.rate_factor})

    def end(self, progress: Progress, state: TrainState) -> None:
        """Writes the "end" line, where the run has begun."""
        if self._begun:
            values = {"stopped": progress.stopped, "train_s": progress.train_s, "first_step_s": progress.first_step_s}
            tables = {"tables": self._tables(state)}
            self._write("end", progress, {**self._position(progress), **values, **tables})

    def _position(self, progress: Progress) -> dict[str, Any]:
        return {
            "samples": progress.num_samples,
            "samples_per_s": progress.samples_per_s,
            "seconds": progress.seconds,
            "times": {name: round(seconds, 4) for name, seconds in progress.times.items()},
        }

    def _tables(self, state: TrainState) -> list[dict[str, Any]]:
        """Rows and counts of each table, over all ranks."""
        counts = [[num_live(t), int(t.num_refused), *t.tally.tolist()] for t in state.tables]
        counts = self._group.sum_(torch.tensor(counts)).tolist()
        names = ("rows", "refused", *TALLIES)
        return [
            {
                "features": list(dict.fromkeys(lookup.feature for lookup in plan.lookups)),
                **dict(zip(names, of, strict=True)),
            }
            for plan, of in zip(self._step.plan.tables, counts, strict=True)
        ]

    def _write(self, event: str, progress: Progress, values: Mapping[str, Any]) -> None:
        line = {"event": event, "step": progress.step, "epoch": progress.epoch_number, **values}
        if self._group.is_first and not self._broken:
            text = json.dumps(_plain(line), allow_nan=False) + "\n"
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                self._give_up(error)

    def _cut(self) -> None:
        """Leaves the lines of the steps that this run goes on from."""
        lines = [l for l in read_metrics_file(self._path) if self._first and l["step"] <= self._first]
        self._known = {_key(line) for line in lines if line["event"] == "evaluation"}
        self._rewrite(lines)

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        unfinished = self._path.with_name(f".unfinished-{FILE}")
        try:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(unfinished, self._path)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        warnings.warn(
            f"recfx: {self._path} cannot be written ({error.strerror or error}). Training goes on.", stacklevel=2
        )


def read_metrics_file(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; none where no file can be read.

    What is not a line of it, such as the last one of a process that was killed while it wrote, is left out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and type(value.get("step")) is int and isinstance(value.get("event"), str):
            found.append(value)
    return found


def write_best(folder: str | Path, watch: Watch, values: Mapping[str, float]) -> None:
    """Writes <folder>/best.json: the best checkpoint, by which value, and its other values."""
    path = Path(folder, BEST)
    best = {"checkpoint": name_of(watch.best_step), "step": watch.best_step, "watch": watch.key, "value": watch.best}
    unfinished = path.with_name(f".unfinished-{BEST}")
    unfinished.write_text(json.dumps(_plain({**best, "values": values}), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _key(line: Mapping[str, Any]) -> tuple[str, int]:
    return line["event"], line["step"]


def _plain(value: Any) -> Any:
    """The value for JSON: None for a number that is NaN or infinite, text for what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
