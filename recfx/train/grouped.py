"""GAUC during an evaluation: the predictions of each task, collected on the host by user."""

from __future__ import annotations

from typing import Any

from recfx.checks import check_type
from recfx.dist import Group
from recfx.losses import item_ids
from recfx.metrics import GroupedAuc
from recfx.step import Aux
from recfx.step.tasks import Tasks
from recfx.types import NUM_SAMPLES, Batch

__all__ = ["collect", "gauc_values", "grouped_of"]


def grouped_of(tasks: Tasks, gauc_by: str | None) -> dict[str, GroupedAuc]:
    """An empty collection for each task that has a label; none without `gauc_by`.

    Raises:   ValueError when no task has a label.
    """
    check_type("gauc_by", gauc_by, str | None, "It is the name of a feature.")
    if gauc_by is None:
        return {}
    found = {name: GroupedAuc() for name, task in tasks.by_name.items() if task.label is not None}
    if not found:
        raise ValueError(f"gauc_by: got '{gauc_by}', expected None. No task has a label, so none has an AUC.")
    return found


def collect(run: Any, tasks: Tasks, gauc_by: str, batch: Batch, aux: Aux, grouped: dict[str, GroupedAuc]) -> None:
    """Adds a batch's real samples that have a label, of each task. Waits for the device.

    Raises:   TypeError when `run` does not read features; ValueError when there is no feature `gauc_by`.
    """
    if not hasattr(run, "read"):
        raise TypeError(
            "run: got one without `read`, expected step.evaluate_ or its capture as it is. GAUC reads labels."
        )
    feats = run.read(Batch(batch.buffer.to(aux.loss.device), batch.layout))
    if gauc_by not in feats:
        raise ValueError(f"feature '{gauc_by}': missing, expected the group of each sample. Return it in `features`.")
    num = int(feats[NUM_SAMPLES])
    group, outputs = item_ids(feats, gauc_by)[:num], tasks.named(aux.logit)
    for name, of_task in grouped.items():
        task = tasks.by_name[name]
        there = slice(None) if task.mask is None else feats[task.mask][:num, 0] != 0
        of_task.add(group[there], outputs[name][:num, 0][there], feats[task.label][:num, 0][there])


def gauc_values(tasks: Tasks, grouped: dict[str, GroupedAuc], group: Group) -> dict[str, float]:
    """ "gauc", or "click/gauc" for named tasks, over the rows of all ranks, which must all call it."""
    values = {}
    for name, own in grouped.items():
        of_all = GroupedAuc()
        for of_rank in group.gather(own):
            of_all.merge(of_rank)
        values[f"{name}/gauc" if tasks.are_named else "gauc"] = of_all.value()
    return values
