"""Evaluation on held-out batches, and the metrics of a state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from recfx.checks import check_int, check_type
from recfx.dist import Group, current
from recfx.step import TrainState
from recfx.step.tasks import Tasks
from recfx.train.checks import Run, check_not_trained, check_run, tasks_of, times_trained, without_warning
from recfx.train.grouped import collect, gauc_values, grouped_of
from recfx.train.labels import check_held_out_labels
from recfx.train.progress import Progress
from recfx.train.ranks import of_ranks, summed
from recfx.types import Batch

__all__ = ["evaluate", "read_metrics", "reset_metrics_"]


def evaluate(
    run: Run,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    eval_steps: int | None = None,
    gauc_by: str | None = None,
    group: Group | None = None,
) -> dict[str, float]:
    """AUC, log loss, calibration and number of samples of held-out batches; the state's own metrics come out unchanged.

    Of a step for other tasks, the values of their metrics, see `recfx.metrics.Metric`; of several, named "click/auc".
    AUC, log loss and calibration are NaN when a logit or loss was not finite; `num_nonfinite` counts those samples.
    Padding of a short batch counts for nothing: give a reader with drop_remainder=False, and every row is evaluated.

    Args:     run: `step.evaluate_` or its capture.  eval_steps: whole batches to read; None: all.
              gauc_by: name of a feature i64 [B, 1], or Ragged with one id each, such as "user": "gauc" is added for
              each task with a label, exact over all batches and ranks, see `recfx.metrics.GroupedAuc`.
              group: the ranks that evaluate together: the values are those of all their rows, and every rank must call
              this, with its part of the reader, see `recfx.dist`. None: the group that was joined, or one process.
    Raises:   ValueError when there is no batch, eval_steps is below 1, or a label is outside [0, 1] and the step is one
              that checks labels: the error names its batch, which is read again where `batches` can be.
    """
    if eval_steps is not None:
        check_int("eval_steps", eval_steps, 1)
    check_run(run, state, "step.evaluate_")
    check_type("batches", batches, Iterable, "Give a reader, or a list of batches.")
    group = of_ranks(group or current())
    most = None if eval_steps is None else eval_steps * group.rounds
    stream, before = iter(batches), times_trained(state)
    without_warning(stream)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"batches: got none from {stream}, expected one at least. There is nothing to evaluate.")
    tasks = tasks_of(run, state)
    grouped = grouped_of(tasks, gauc_by)
    kept, num = tree_map(Tensor.clone, state.metrics), 0
    try:
        reset_metrics_(state)
        for batch in itertools.islice(itertools.chain([first], stream), most):
            state, aux = run(state, batch)
            if gauc_by is not None:
                collect(run, tasks, gauc_by, batch, aux, grouped)
            num += 1
        check_not_trained(before, state)
        counts = summed(group, state.metrics)
        values = tasks.values(counts) | gauc_values(tasks, grouped, group)
        check_held_out_labels(tasks, counts, run, state, batches, num, group)
    finally:
        for target, source in zip(tree_leaves(state.metrics), tree_leaves(kept), strict=True):
            target.copy_(source)
    return values


def read_metrics(
    progress: Progress, state: TrainState, *, group: Group | None = None, tasks: Tasks | None = None
) -> None:
    """Loss, AUC and all metrics since they were last reset, and what was left out, read from the device.

    Args:     group: over the rows of all ranks, which must all call this; None: the group that was joined.
              tasks: `step.tasks`; None: one task with the default metrics.
    """
    tasks = tasks or tasks_of(None, state)
    values = progress.metrics = tasks.values(summed(of_ranks(group or current()), state.metrics))
    progress.loss = tasks.loss(values)
    progress.auc = next((value for name, value in values.items() if name.split("/")[-1] == "auc"), math.nan)
    progress.num_nonfinite = int(state.nonfinite.num_batches)


def reset_metrics_(state: TrainState) -> None:
    """Counts of the next phase start from zero."""
    for t in tree_leaves(state.metrics):
        t.zero_()
