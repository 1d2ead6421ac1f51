"""The errors on labels outside [0, 1], in training and evaluation: how many, in which steps, and one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from recfx.dist import Group
from recfx.step import Step, TrainState
from recfx.step.tasks import Tasks
from recfx.train.checks import described_by, place_of
from recfx.train.ranks import group_of, rank_text, summed
from recfx.types import NUM_SAMPLES, Batch

__all__ = ["check_held_out_labels", "check_labels", "find_bad_label"]

WHY = "Binary cross entropy has no minimum there: the logit of such a label grows without end."
ADVICE = (
    "Let the reader name the row: fixedlen('{label}', [0.0], valid=OneOf(0, 1)). Another loss is not checked, and "
    "train_step(check_labels=False) accepts such labels."
)


def check_labels(step: Step, state: TrainState, *, where: str | Callable[[], str] = "") -> None:
    """Raises when a label of a real sample was outside [0, 1], or NaN, and the step is one that checks labels.

    Call it before each save, where a loop logs, and before the metrics are reset: they hold the count.
    `recfx.train.check_finite` calls it too.

    Args:     where: the part of the error on the steps and on one such label, or a function that makes it.
    Cost:     one host read. Ranks that train together must all call it: labels of all of them are counted.
    Raises:   ValueError naming the feature, how many labels there were and what to do.
    """
    for label, count in step.tasks.bad_labels(summed(group_of(step), state.metrics)).items():
        where = where if isinstance(where, str) else where()
        raise ValueError(
            f"feature '{label}': got {_labels(count)} outside [0, 1]{where}, expected 0 to 1. {WHY} Nothing was "
            f"saved since. {ADVICE.format(label=label)}"
        )


def find_bad_label(step: Step, state: TrainState, batches: Any, num: int, position: dict | None, epoch: int) -> str:
    """The first label outside [0, 1] in the next `num` batches and its place, for an error; "" without one.

    Args:     batches: what a reader's `epoch` or `start_at` returned.  position: where it begins, None at the start.
              epoch: its number, from 0.
    """
    stream, group = iter(batches), group_of(step)
    for _ in range(num):
        place = place_of(position, epoch, described_by(batches))
        batch = next(stream, None)
        if batch is None:
            break
        feats = step.read(Batch(batch.buffer.to(state.step.device), batch.layout))
        found = _first_of_tasks(step, feats)
        for rank, (one, its_place) in enumerate(group.gather((found, place))):
            if one is not None:
                return f", such as {one} of the batch{rank_text(group, rank)} that {its_place}"
        position = batches.position
    return ""


def _first_of_tasks(step: Step, feats: Any) -> str | None:
    """The first label of a task outside [0, 1], where the step checks it."""
    finite = step.on_nonfinite == "skip"  # the others were left out
    for task in step.tasks.by_name.values():
        if task.counts_labels:
            there = None if task.mask is None else feats[task.mask] != 0
            if (found := _bad_label(feats, task.label, finite=finite, there=there)) is not None:
                return found
    return None


def check_held_out_labels(
    tasks: Tasks,
    counts: Any,
    run: Callable[[TrainState, Batch], Any],
    state: TrainState,
    batches: Iterable[Batch],
    num: int,
    group: Group,
) -> None:
    """Raises the error of `evaluate` on labels of held-out batches. It overwrites the metrics of the state.

    Args:     tasks, counts: of them, which have been counted.  run: as in `evaluate`.
              batches: run again one by one until there is such a label; an iterator cannot be.
              num: how many of them were run.  group: the ranks that have run theirs.
    Raises:   ValueError when one was outside.
    """
    bad = tasks.bad_labels(counts)
    if not bad:
        return
    label, count = next(iter(bad.items()))
    of_label = f" of feature '{label}'" if tasks.are_named else ""
    try:
        where = "" if isinstance(batches, Iterator) else _place(tasks, run, state, iter(batches), num, group)
    except Exception as error:  # only the message suffers
        where = f" (the batches could not be read again: {str(error) or type(error).__name__})"
    raise ValueError(
        f"batches: got {_labels(count)}{of_label} outside [0, 1]{where}, expected 0 to 1. {WHY} AUC and calibration "
        f"would be wrong too. {ADVICE.format(label=label if tasks.are_named else 'label')}"
    )


def _place(
    tasks: Tasks,
    run: Callable[[TrainState, Batch], Any],
    state: TrainState,
    stream: Iterator[Batch],
    num: int,
    group: Group,
) -> str:
    """The first batch with such a label, for an error.

    The feature function may compute the label from columns. A column is named when no other has as many such values.
    """
    for number in range(1, num + 1):
        described = described_by(stream)
        batch = next(stream)
        for t in tree_leaves(state.metrics):
            t.zero_()
        run(state, batch)
        count = max(tasks.bad_labels(state.metrics).values(), default=0)
        own = f"{f' ({described})' if described else ''}{_value_in(batch, count)}" if count else None
        for rank, text in enumerate(group.gather(own)):
            if text is not None:
                getattr(stream, "close", lambda: None)()
                return f", the first in batch {number}{rank_text(group, rank)}{text}"
    return ""


def _value_in(batch: Batch, count: int) -> str:
    """The column that has so many labels outside [0, 1], and one of them, for an error; "" where several have."""
    columns = [name for name, t in batch.items() if _is_column(t) and _num_bad(batch, t) == count]
    return f", where column '{columns[0]}' has {_bad_label(batch, columns[0])}" if len(columns) == 1 else ""


def _is_column(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() == 2 and t.shape[1] == 1


def _num_bad(feats: Any, values: Tensor) -> int:
    return int(_is_bad(_real(feats, values)).sum())


def _bad_label(feats: Any, label: str, *, finite: bool = False, there: Tensor | None = None) -> str | None:
    """The first value outside [0, 1] of a real sample, and its place.

    Args:     finite: one that is neither NaN nor infinite.  there: bool [B, 1], samples that have one; None: all.
    """
    values = _real(feats, feats[label])
    counted = True if there is None else _real(feats, there) > 0
    places = (_is_bad(values) & counted & (values.isfinite() | (not finite))).nonzero().tolist()
    return f"{values[tuple(places[0])].item()} at {places[0]}" if places else None


def _real(feats: Any, values: Tensor) -> Tensor:
    return values[: int(feats[NUM_SAMPLES])].float()


def _is_bad(values: Tensor) -> Tensor:
    return ~((values >= 0) & (values <= 1))


def _labels(count: int) -> str:
    return f"{count} label{'s' * (count > 1)}"
