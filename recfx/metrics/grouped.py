"""AUC within groups, such as a user's samples, of predictions that are collected on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recfx.checks import check_type

__all__ = ["GroupedAuc", "gauc"]


class GroupedAuc:
    """Collects predictions for `gauc`, exactly: batch by batch, in any order, on any rank.

    The samples of a group may be spread over batches and ranks, so every prediction is kept, on the host: 13 bytes a
    sample.

    Example:  >>> of_users = GroupedAuc()
              >>> of_users.add(torch.tensor([1, 1, 2]), torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.0, 1.0, 0.0]))
              >>> of_users.add(torch.tensor([2, 2]), torch.tensor([0.5, 0.7]), torch.tensor([1.0, 1.0]))
              >>> of_users.value()
              0.85
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def num_samples(self) -> int:
        """How many predictions there are."""
        return sum(len(group) for group, _, _ in self._parts)

    def add(self, group: Tensor, score: Tensor, label: Tensor) -> None:
        """Keeps copies of them. A score may be a logit: only the order within a group counts.

        Shapes:   integers, floats and labels of N elements each; a click is a label above 0.5.
        Raises:   ValueError when one has more elements than another; TypeError on groups of floats.
        """
        group, score, label = _flattened(group, score, label)
        kept = group.detach().to("cpu", torch.int64), score.detach().cpu(), (label > 0.5).detach().cpu()
        self._parts.append((kept[0].clone(), kept[1].clone(), kept[2]))

    def merge(self, other: GroupedAuc) -> None:
        """Adds what another has, such as that of another rank."""
        self._parts += other._parts

    def value(self) -> float:
        """See `gauc`."""
        if not self._parts:
            return math.nan
        group, score, click = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return gauc(group, score, click)


def gauc(group: Tensor, score: Tensor, label: Tensor) -> float:
    """Mean of the AUCs of groups, of a user's samples each, weighted by their sizes; pairs of equal score as half.

    Of predictions collected on the host, in any order, from any number of batches and workers. Groups of one class are
    left out. NaN without a group of two classes, and where a score is not finite.

    Shapes:   i64, f32 and label of N elements each; a click is a label above 0.5.
    Raises:   ValueError when one has more elements than another; TypeError on groups of floats.
    Example:  >>> gauc(torch.tensor([1, 1, 2, 2, 2]), torch.tensor([0.1, 0.9, 0.5, 0.5, 0.7]),
              ...      torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
              0.85
    """
    group, score, label = _flattened(group, score, label)
    if not bool(score.isfinite().all()):
        return math.nan
    order = score.argsort()
    order = order[group[order].argsort(stable=True)]
    group, score, click = group[order], score[order], (label[order] > 0.5).double()
    in_group, in_tie = torch.zeros_like(group), torch.zeros_like(group)
    in_group[1:] = (group[1:] != group[:-1]).cumsum(0)
    in_tie[1:] = ((group[1:] != group[:-1]) | (score[1:] != score[:-1])).cumsum(0)

    def sums(values: Tensor, of: Tensor) -> Tensor:
        return torch.bincount(of, weights=values)[of]  # of the sample's group or tie

    negative, in_same_tie = 1 - click, sums(1 - click, in_tie)
    positives, negatives = sums(click, in_group), sums(negative, in_group)
    first_of_tie = torch.searchsorted(in_tie, in_tie)
    first_of_group = torch.searchsorted(in_group, in_group)
    before = negative.cumsum(0) - negative
    below = before[first_of_tie] - before[first_of_group]
    counted = (positives > 0) & (negatives > 0)
    wins = click * (below + in_same_tie / 2)
    auc_by_size = (wins / (positives * negatives) * (positives + negatives))[counted].sum()
    return float(auc_by_size / counted.sum())


def _flattened(group: Tensor, score: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, value in (("group", group), ("score", score), ("label", label)):
        check_type(name, value, Tensor, "Use torch.tensor.")
    group, score, label = group.flatten(), score.flatten(), label.flatten()
    if not len(group) == len(score) == len(label):
        sizes = [len(group), len(score), len(label)]
        raise ValueError(f"group, score, label: got {sizes} elements, expected as many of each.")
    if group.is_floating_point():
        raise TypeError(f"group: got {group.dtype}, expected integers. float32 merges ids above 2**24.")
    return group, score, label
