"""recfx's side of the benchmarks: DeepFM's captured step over a table that already holds the workload's ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.workload import CATEGORICAL, DIM, Workload, init_weights
from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.step import Step, TrainState
from recfx.table import table
from recfx.types import Batch, Ragged

CHUNK = 2**20
PHASES = {
    "lookup": ("recfx::order_ids", "recfx::find_or_insert_", "recfx::pool"),
    "row update": ("recfx::add_row_grads_", "recfx::adamw_rows_"),
    "forward+backward": ("aten::mm", "aten::addmm", "cpp_fused", "recfx::add_predictions_"),
}


class Captured(NamedTuple):
    step: Callable[[Batch], Tensor]  # loss of one captured step
    state: TrainState


def captured_step(
    work: Workload, *arguments: str, seed: int = 0, backend: Literal["inductor", "eager"] = "inductor"
) -> Captured:
    """The step of `python -m recfx.examples.deepfm`, from the baselines' weights and the workload's ids.

    Args:     arguments: further arguments of that program.  backend: of `capture`.
    """
    args = program.parse(["--data_paths", "", "--gradient_accumulation_steps", "1", "--numeric", "raw", *arguments])
    step, state = program.build_step(args)
    fill(step, state, work, init_weights(work.table_rows, seed=seed))
    run = capture(step, state, work.batches[0], backend=backend)
    return Captured(lambda batch: run(state, batch)[1].loss, state)


def fill(step: Step, state: TrainState, work: Workload, weights: dict[str, Tensor]) -> None:
    """Inserts the universe in order, so that row numbers equal the baselines', then writes their weights."""
    insert_universe(step, state, work.universe)
    write_weights_(state, weights)


def insert_universe(step: Step, state: TrainState, universe: dict[str, Tensor]) -> None:
    """Inserts the ids of the columns in order: their positions end to end are their row numbers."""
    (plan,), (rows,) = step.plan.tables, state.tables
    inserter = table(plan, optimizer_slots=2, seed=42)
    empty = Ragged(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
    features = {lookup.feature for lookup in plan.lookups}
    for name in CATEGORICAL:
        for ids in universe[name].split(CHUNK):
            offsets = torch.tensor([0, len(ids)], dtype=torch.int32)
            inserter.grow_(rows, len(ids))
            inserter.insert_(rows, inserter.read(dict.fromkeys(features, empty) | {name: Ragged(ids, offsets)}))
            rows.num_unique.zero_()
            rows.step.add_(1)  # each chunk is a separate step: its unique numbers start at 0
    num_rows = sum(map(len, universe.values()))
    rows.step.zero_()
    rows.seen[:num_rows] = -1
    assert int(rows.num_rows) == num_rows


def write_weights_(state: TrainState, weights: dict[str, Tensor]) -> None:
    """Writes the baselines' weights into a state with the same row numbers."""
    of_rows = state.tables[0].rows[: len(weights["bias"]) - 1, 0]
    of_rows[:, :DIM], of_rows[:, DIM : DIM + 1] = weights["embedding"][:-1], weights["bias"][:-1]
    names = {"numeric_emb": "numeric_embedding", "numeric_bias": "numeric_bias"}
    names |= {f"dnn.{i}.{part}": f"{part[0]}{i + 1}" for i in range(3) for part in ("weight", "bias")}
    for name, theirs in names.items():
        state.params[name].copy_(weights[theirs].T if name.endswith("weight") else weights[theirs])


def phases(step: Callable[[Batch], Tensor], batches: list[Batch]) -> dict[str, float]:
    """Milliseconds per step by phase, from a profile of one pass over the batches; profiling itself adds some.

    "overhead" is the time outside kernels: views, buffers and calls from the graph's Python. Loops are recognised by
    the names that Inductor gives them under conftest.py's setting.
    """
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for batch in batches:
            step(batch)
    spent = dict.fromkeys((*PHASES, "overhead"), 0.0)
    for event in record.key_averages():
        owner = (phase for phase, names in PHASES.items() if any(name in event.key for name in names))
        spent[next(owner, "overhead")] += event.self_cpu_time_total / 1e3 / len(batches)
    return spent
