"""Tasks: what the outputs of a model are trained for, and what is counted of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from recfx.checks import check_function, check_number, check_type, said
from recfx.losses import Bpr, InBatchSoftmax, bce_with_logits
from recfx.metrics import BinaryCounts, Counts, Metric, SlicedCounts, metric_of, num_bad_labels
from recfx.metrics.slices import total_of, values_of
from recfx.step.finite import kept
from recfx.step.outputs import check_logit, check_loss, check_outputs, check_tensors

__all__ = ["Loss", "Outputs", "Task", "Tasks", "tasks_of"]

Outputs = dict[str, Any]  # by task: a logit f32 [B, 1] or, for a batch loss, tensors by name
Loss = Callable[[Tensor, Tensor], Tensor]
ALONE = ""  # name of a task that has none
UNIT = 2.0**-20


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What one output of `forward` is trained for: its target, its loss, and what is counted of it.

    The loss of a step is the sum over tasks of `weight` times the task's losses, divided by the number of real samples,
    whether or not they have a label for the task.

    Args:     label: name of the feature [B, 1] that holds the target.
              loss: (logit, label) -> loss per sample [B, 1]. None: `recfx.losses.bce_with_logits`.
              batch_loss: in place of label and loss: (output, features, valid bool [B, 1]) -> loss per sample [B, 1],
              where output is a dict of tensors [B, ...], such as {"query": [B, D], "item": [B, D]}. It sees one
              micro-batch of one process: under accumulation and on ranks, losses of parts are added. Where `valid` is
              False, the outputs are 0.
              weight: of the task's losses in the sum, > 0.
              mask: name of a feature [B, 1]; samples where it is 0 have no label for this task. They add no loss,
              no gradient and nothing to its metrics, and their label may be NaN. None: all samples have one.
              sample_weight: name of a feature [B, 1] that multiplies each sample's loss of this task.
              metrics: what is counted, such as `recfx.metrics.binary_metrics(2**10)`; None: those of
              `recfx.metrics.metric_of(loss)`.
              check_labels: as in `recfx.step.train_step`, for this task.
    Raises:   ValueError without a label or a batch loss, or where batch_loss is given with a label or a loss, or on a
              weight that is not positive; TypeError when a part is of another type.
    Example:  >>> Task(label="click", mask="was_shown").weight
              1.0
    """

    label: str | None = None
    loss: Loss | None = None
    batch_loss: Callable[..., Tensor] | None = None
    weight: float = 1.0
    mask: str | None = None
    sample_weight: str | None = None
    metrics: Metric | None = None
    check_labels: bool | None = None

    def __post_init__(self) -> None:
        for name in ("label", "mask", "sample_weight"):
            check_type(name, getattr(self, name), str | None, "It is the name of a feature.")
        check_type("check_labels", self.check_labels, bool | None, "None: they are checked with the default loss.")
        check_type("metrics", self.metrics, Metric | None, "Build them: recfx.metrics.binary_metrics().")
        if self.batch_loss is None:
            if self.label is None:
                raise ValueError("task: got no label, expected the name of a feature, or a batch_loss. Give label=...")
            if self.loss is not None:
                check_function("loss", self.loss, "logit, label", "loss f32 [B, 1]")
        else:
            given = [name for name in ("label", "loss", "check_labels") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"task: got batch_loss and {given[0]}, expected one of them. A batch loss takes what it needs from "
                    "the features."
                )
            check_function("batch_loss", self.batch_loss, "output, feats, valid", "loss f32 [B, 1]")
            if self.metrics is None and not isinstance(self.batch_loss, Bpr | InBatchSoftmax):
                raise ValueError(
                    "task: got a batch_loss without metrics, expected them. A user's batch loss has no default."
                )
        self._check_counts()
        check_number("weight", self.weight)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: got {self.weight}, expected 0 < weight < inf. Leave a task out by its absence.")

    def _check_counts(self) -> None:
        """Raises TypeError when the metrics count in something that a training run and an evaluation cannot read."""
        if self.metrics is None:
            return
        counts = self.metrics.init()
        if self.metrics.values is None:
            advice = "That is what recfx.train reads. Give others a function `values`, see recfx.metrics.Metric."
            check_type("metrics.init()", counts, BinaryCounts, advice)
        fields = [*getattr(counts, "_fields", ())]
        if not fields or not all(isinstance(t, Tensor) for t in tree_leaves(counts)):
            raise TypeError(
                f"metrics.init(): got {said(counts)}, expected a NamedTuple of tensors. They are added over batches "
                "and ranks."
            )

    @property
    def columns(self) -> dict[str, str]:
        """By argument, the names of features [B, 1] that it reads; a request for a prediction may lack them."""
        names = {"label": self.label, "sample_weight": self.sample_weight, "mask": self.mask}
        return {argument: name for argument, name in names.items() if name is not None}

    @property
    def counts(self) -> Metric:
        """Its metrics, or the default ones."""
        return self.metrics or metric_of(self.batch_loss or self.loss or bce_with_logits)

    @property
    def counts_labels(self) -> bool:
        """Whether labels outside [0, 1] are counted, and are an error."""
        if self.check_labels is not None or self.batch_loss is not None:
            return bool(self.check_labels)
        return self.loss in (None, bce_with_logits)

    def labelled(self, feats: Mapping[str, Any], valid: Tensor) -> Tensor:
        """bool [B, 1]: the real samples that have a label."""
        return valid if self.mask is None else valid & (feats[self.mask] != 0)

    def losses(self, output: Any, feats: Mapping[str, Any], there: Tensor) -> Tensor:
        """The weighted loss of each sample [B, 1], 0 for those without a label."""
        # An output of padding may be NaN: no multiple of its slope is 0.
        cleaned = functools.partial(kept, there=there)
        if self.batch_loss is not None:
            loss_B = self.batch_loss({name: cleaned(t) for name, t in output.items()}, feats, there)
            check_loss(loss_B, there, "batch_loss")
        else:
            assert self.label is not None
            label = feats[self.label].float()
            loss_B = (self.loss or bce_with_logits)(cleaned(output), label if self.mask is None else cleaned(label))
            check_loss(loss_B, output)
        if self.sample_weight is not None:
            weight = feats[self.sample_weight]
            loss_B = loss_B * (weight if self.mask is None else cleaned(weight))
        return torch.where(there, loss_B, 0.0)

    def init(self, device: torch.device) -> Counts:
        """Counts of no sample."""
        counts: Any = self.counts.init(device)
        if self.counts_labels or not isinstance(counts, BinaryCounts | SlicedCounts):
            return counts
        return counts._replace(sums=counts.sums[:5].clone())

    def count_(
        self,
        counts: Counts,
        output: Any,
        feats: Mapping[str, Any],
        loss_B: Tensor,
        there: Tensor,
        *,
        sums_exactly: bool,
    ) -> None:
        """Adds the samples that have a label to the counts."""
        target = feats if self.label is None else feats[self.label]
        given: tuple[Any, ...] = output, target, loss_B, there
        if self.counts.by is not None:
            given = *given, values_of(feats, self.counts.by)
        if not sums_exactly:
            self.counts.update_(counts, *given)
            return
        sums = {name: t for name, t in counts._asdict().items() if t.is_floating_point()}
        zeros = {name: torch.zeros_like(t) for name, t in sums.items()}
        new = self.counts.update_(counts._replace(**zeros), *given)
        for name, total in sums.items():
            total.add_((getattr(new, name) / UNIT).round() * UNIT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tasks:
    """The tasks of a step.

    Args:     by_name: tasks; one that was given alone is called "".
              are_named: whether `forward` returns a dict by task.
              sums_exactly: whether sums of a batch are rounded to multiples of 2**-20, which f64 adds exactly: sums of
              many batches are then the same in any order.
    """

    by_name: dict[str, Task]
    are_named: bool
    sums_exactly: bool = False

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(argument, feature) for the features [B, 1] that tasks read; a request for a prediction may lack them."""
        return list(dict.fromkeys(pair for task in self.by_name.values() for pair in task.columns.items()))

    def init(self, device: torch.device) -> Any:
        """Counts of no sample."""
        return self.given({name: task.init(device) for name, task in self.by_name.items()})

    def given(self, by_name: dict[str, Any]) -> Any:
        """What a caller gets: one thing for a task alone, a dict for several."""
        return by_name if self.are_named else by_name[ALONE]

    def named(self, given: Any) -> dict[str, Any]:
        """The inverse of `given`."""
        return given if self.are_named else {ALONE: given}

    def outputs(self, result: Any, feats: Mapping[str, Any], num_samples: int, *, labelled: bool = True) -> Outputs:
        """The outputs by task of what `forward` returned, after checks of their shapes.

        Args:     num_samples: B.  labelled: whether the features of the tasks are compared too.
        """
        if self.are_named:
            check_outputs(result, self.by_name)
        outputs = self.named(result)
        for name, task in self.by_name.items():
            if task.batch_loss is not None:
                check_tensors(outputs[name], name, num_samples)
            else:
                check_logit(outputs[name], name, feats, list(task.columns.values()) if labelled else [], num_samples)
        return outputs

    def losses(self, outputs: Outputs, feats: Mapping[str, Any], valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the tasks' losses of each sample [B, 1], and the losses by task."""
        total, by_name = None, {}
        for name, task in self.by_name.items():
            loss_B = by_name[name] = task.losses(outputs[name], feats, task.labelled(feats, valid))
            weighted = loss_B if task.weight == 1 else loss_B * task.weight
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, by_name

    def count_(
        self, counts: Any, outputs: Outputs, feats: Mapping[str, Any], losses: Mapping[str, Tensor], valid: Tensor
    ) -> None:
        """Adds the valid samples to the counts of each task."""
        for name, task in self.by_name.items():
            there = task.labelled(feats, valid)
            of_task = self.named(counts)[name]
            task.count_(of_task, outputs[name], feats, losses[name], there, sums_exactly=self.sums_exactly)

    def values(self, counts: Any) -> dict[str, float]:
        """What the counts say, read on the host: by "auc", or for named tasks by "click/auc"."""
        found: dict[str, float] = {}
        for name, of_task in self.named(counts).items():
            values = self.by_name[name].counts.read(of_task)
            found |= {f"{name}/{what}" if self.are_named else what: value for what, value in values.items()}
        return found

    def loss(self, values: Mapping[str, float]) -> float:
        """The sum over tasks of weight times the mean loss, out of `values`."""
        total = 0.0
        for name, task in self.by_name.items():
            prefix = f"{name}/" if self.are_named else ""
            means = [values[prefix + what] for what in ("log_loss", "loss") if prefix + what in values]
            total += task.weight * (means[0] if means else math.nan)
        return total

    def bad_labels(self, counts: Any) -> dict[str, int]:
        """By the name of their feature, how many labels were outside [0, 1], where they are checked."""
        found: dict[str, int] = {}
        for name, task in self.by_name.items():
            of_task = self.named(counts)[name]
            if task.counts_labels and task.label is not None and isinstance(of_task, BinaryCounts | SlicedCounts):
                number = num_bad_labels(total_of(of_task) if isinstance(of_task, SlicedCounts) else of_task)
                found |= {task.label: max(number, found.get(task.label, 0))} if number else {}
        return found


def tasks_of(tasks: Task | Mapping[str, Task] | None, alone: Mapping[str, Any]) -> Tasks:
    """The tasks of `train_step`.

    Args:     tasks: its argument.  alone: its arguments for one task, by name.
    Raises:   TypeError or ValueError when `tasks` is of another type, is empty, or comes with arguments for one task.
    """
    if tasks is None:
        check_type("label", alone["label"], str, "It is the name of a feature.")
        return Tasks(by_name={ALONE: Task(**alone)}, are_named=False)
    default = {"label": "label", "loss": bce_with_logits}
    given = [name for name, value in alone.items() if value is not default.get(name) and value != default.get(name)]
    if given:
        raise ValueError(
            f"{given[0]}: got {said(alone[given[0]])} with tasks, expected one of them. Give it to the Task it is for."
        )
    if isinstance(tasks, Task):
        return Tasks(by_name={ALONE: tasks}, are_named=False)
    check_type("tasks", tasks, Mapping, "They are tasks by name: {'click': Task(label='click')}.")
    if not tasks:
        raise ValueError("tasks: got none, expected one at least. A step trains for them.")
    _check_names(tasks)
    return Tasks(by_name=dict(tasks), are_named=True)


def _check_names(tasks: Iterable[str] | Mapping[str, Any]) -> None:
    assert isinstance(tasks, Mapping)
    for name, task in tasks.items():
        check_type("tasks", name, str, "They are tasks by name.")
        check_type(f"task '{name}'", task, Task, "Build one: recfx.step.Task(label=...).")
        if not name or "/" in name:
            raise ValueError(f"task '{name}': got that name, expected one without '/'. Metrics are named 'task/auc'.")
