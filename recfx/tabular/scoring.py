"""Scores of the rows of files: one row of output for each row of input, in their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq
from torch import Tensor

from recfx.capture import capture_prediction
from recfx.data import Column, VarLen, from_arrays
from recfx.data.decode import Decoder, Recipe
from recfx.data.files import File, match_files
from recfx.data.formats import Format
from recfx.data.open_file import OpenFile
from recfx.data.unit_rows import BadRow
from recfx.losses import poisson, squared_error
from recfx.program import Program
from recfx.step import Task, TrainState
from recfx.types import NUM_SAMPLES, Batch, pack

__all__ = ["score"]

BATCH_SIZE = 1024


class _Rows(Decoder):
    """A decoder that skips bad rows and remembers them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.bad: list[BadRow] = []

    def _judge(self, bad: Sequence[BadRow], file: File, source: OpenFile, unit: int) -> int:
        self.bad += bad
        return len(bad)

    def num_rows(self, file: File, unit: int) -> int:
        return self._open(file)[0].num_rows(unit)


def score(
    program: Program,
    state: TrainState,
    paths: Any,
    out: str | os.PathLike[str],
    *,
    batch_size: int = BATCH_SIZE,
    format: Format | None = None,
    backend: Any = "inductor",
) -> tuple[int, int]:
    """Writes a Parquet file with the score of each row of the files, in the order of the files and their rows.

    Columns: file; row, its number in the file; score, or one column for each of several tasks: the probability, for
    `recfx.losses.poisson` the expected count, for `squared_error` the number, float32; reason, why a row has no score.
    A bad row, such as one with a null where none may be, has a null score. Labels and weights are not read.

    Args:     program, state: see `recfx.program.restore`.  paths: files, folders, globs or URIs.
              batch_size: rows that are scored together.  format: of the files; None: by their names.
              backend: of the captured prediction.
    Returns:  the number of rows, and of those without a score.
    Raises:   ValueError when a task has no single score per row, or a file cannot be read or lacks a column; OSError
              when `out` cannot be written, which then does not exist.
    """
    links = _links(program)
    own = {name for _, name in program.step.tasks.columns}
    recipe = Recipe(tuple(column for column in program.columns if column.name not in own), format=format)
    names = list(links)
    schema = pa.schema(
        [("file", pa.string()), ("row", pa.int64()), *((name, pa.float32()) for name in names), ("reason", pa.string())]
    )
    path = Path(out)
    unfinished = path.with_name(f".unfinished-{path.name}")
    predict = _Predict(program, state, backend)
    num, num_bad = 0, 0
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for file in match_files(paths):
                for table in _tables_of(file, recipe, predict, links, batch_size, schema):
                    writer.write_table(table)
                    num, num_bad = num + len(table), num_bad + len(table) - table["reason"].null_count
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return num, num_bad


def _links(program: Program) -> dict[str, Callable[[Tensor], Tensor]]:
    """By column of the output, what makes a score of the task's logit."""
    tasks = program.step.tasks
    links = {}
    for name, task in tasks.by_name.items():
        if task.batch_loss is not None:
            raise ValueError(
                f"task '{name}': got a batch loss, whose output is not a score of a row, expected a logit. Use the "
                "step's predict."
            )
        links[name if tasks.are_named else "score"] = _link(task)
    return links


def _link(task: Task) -> Callable[[Tensor], Tensor]:
    if task.loss is squared_error:
        return lambda logit: logit
    return torch.exp if task.loss is poisson else torch.sigmoid


class _Predict:
    """The logits of a batch by output column. One layout is captured; larger batches run uncaptured."""

    def __init__(self, program: Program, state: TrainState, backend: Any) -> None:
        self.program, self.state, self.backend = program, state, backend
        self.run: Callable[..., Any] | None = None
        self.layout: Any = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        step = self.program.step
        if self.run is None:
            self.layout = batch.layout
            how = {"new_layout": "uncaptured", "backend": self.backend}
            self.run = capture_prediction(step, self.state, batch, **how)
        elif batch.layout != self.layout:
            with suppress(ValueError):  # it is larger than the first batch
                batch = pack({name: batch[name] for name in batch}, layout=self.layout)
        with torch.no_grad():
            found = step.tasks.named(self.run(self.state, batch))
        names = found if step.tasks.are_named else {"score": found[""]}
        num = int(batch[NUM_SAMPLES])
        return {name: logit[:num, 0].float() for name, logit in names.items()}


def _tables_of(
    file: File,
    recipe: Recipe,
    predict: _Predict,
    links: dict[str, Callable[[Tensor], Tensor]],
    batch_size: int,
    schema: pa.Schema,
) -> Iterator[pa.Table]:
    """A table for each unit of a file."""
    decoder, first = _Rows(recipe), 0
    columns = [_decoded(column) for column in recipe.columns]
    for unit in decoder.units(file):
        decoder.bad = []
        rows = decoder.read(file, unit).batch
        num = rows.num_rows + len(decoder.bad)
        good = np.ones(num, dtype=bool)
        reasons: list[str | None] = [None] * num
        for bad in decoder.bad:
            good[bad.number] = False
            what = f"column '{bad.column}': " if bad.column else ""
            reasons[bad.number] = f"{what}got {bad.got}, expected {bad.expected}"
        scores = {name: np.zeros(num, dtype=np.float32) for name in links}
        if rows.num_rows:
            parts = [predict(b) for b in from_arrays(pa.Table.from_batches([rows]), columns, batch_size, prefetch=0)]
            for name, link in links.items():
                scores[name][good] = torch.cat([link(part[name]) for part in parts]).cpu().numpy()
        yield pa.table(
            {
                "file": pa.array([file.path] * num, pa.string()),
                "row": pa.array(np.arange(first, first + num)),
                **{name: pa.array(values, mask=~good) for name, values in scores.items()},
                "reason": pa.array(reasons, pa.string()),
            },
            schema=schema,
        )
        first += num


def _decoded(column: Column) -> Column:
    """How a column is read from rows that have been decoded: strings are hashed already, values checked."""
    if isinstance(column, VarLen):
        return replace(column, string_hash=None, buckets=None, valid=None)
    return replace(column, valid=None)
