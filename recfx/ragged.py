"""Lists of unequal length inside a model: sums, softmax and attention over each sample's own rows.

The rows of a history, `Embedding(..., combiner=None)`, reach `forward` as a `recfx.types.Ragged` of values f32 [P, D].
Sizes are static: P is the capacity of the column, and values after the last list are ignored. The cost is that of the P
values, not of B times the longest list. Every function has a gradient, and the same bytes from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recfx.types import Ragged

__all__ = ["is_there", "last", "lengths", "position_of", "sample_of", "segment_softmax", "segment_sum", "spread"]


def lengths(offsets: Tensor) -> Tensor:
    """The length of each list, i32 [B].

    Example:  >>> lengths(torch.tensor([0, 2, 2, 5], dtype=torch.int32)).tolist()
              [2, 0, 3]
    """
    return offsets.diff()


def sample_of(offsets: Tensor, num_values: int) -> Tensor:
    """The number of the list that each value belongs to, i64 [num_values]; B after the last list.

    Example:  >>> sample_of(torch.tensor([0, 2, 2, 3], dtype=torch.int32), 4).tolist()
              [0, 0, 2, 3]
    """
    places = torch.arange(num_values, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), places, right=True)


def position_of(offsets: Tensor, num_values: int) -> Tensor:
    """The place of each value in its list, i64 [num_values]; counted on after the last list.

    Example:  >>> position_of(torch.tensor([0, 2, 2, 3], dtype=torch.int32), 3).tolist()
              [0, 1, 0]
    """
    return torch.arange(num_values, device=offsets.device) - offsets[sample_of(offsets, num_values)]


def is_there(offsets: Tensor, num_values: int) -> Tensor:
    """Which values belong to a list, bool [num_values].

    Example:  >>> is_there(torch.tensor([0, 2], dtype=torch.int32), 3).tolist()
              [True, True, False]
    """
    return torch.arange(num_values, device=offsets.device) < offsets[-1]


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each list's values, f32 [P, ...], i32 [B + 1] -> f32 [B, ...]. 0 for an empty list.

    Example:  >>> segment_sum(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 3], dtype=torch.int32))
              tensor([3., 0., 4.])
    """
    return _SegmentSum.apply(values, offsets)


def spread(per_sample: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    """What belongs to a sample, at each value of its list, [B, ...] -> [num_values, ...]; 0 after the last list.

    Example:  >>> spread(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 2, 2, 3], dtype=torch.int32), 4)
              tensor([5., 5., 7., 0.])
    """
    return _Spread.apply(per_sample, offsets, num_values)


def segment_softmax(scores: Tensor, offsets: Tensor) -> Tensor:
    """The softmax of scores over each list, f32 [P, ...] -> f32 [P, ...]; 0 after the last list.

        softmax(s)[p] = exp(s[p] - m) / sum of exp(s[q] - m) over the list's q, m the largest of its scores

    Scores may be -inf, which gives 0; a list of nothing but -inf gives zeros.
    Example:  >>> segment_softmax(torch.tensor([0.0, 0.0, 3.0, 9.0]), torch.tensor([0, 2, 3], dtype=torch.int32))
              tensor([0.5000, 0.5000, 1.0000, 0.0000])
    """
    num = scores.shape[0]
    there = is_there(offsets, num).view(-1, *[1] * (scores.dim() - 1))
    largest = torch.segment_reduce(scores.detach(), "max", offsets=offsets, axis=0, unsafe=True, initial=-torch.inf)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    # Before the exponential: a score after the last list may be NaN, and no multiple of its slope is 0.
    exps = torch.where(there, scores - _gathered(largest, offsets, num), -torch.inf).exp()
    sums = segment_sum(exps, offsets)
    return exps / spread(torch.where(sums > 0, sums, 1.0), offsets, num).clamp(min=torch.finfo(sums.dtype).tiny)


def last(rows: Ragged, length: int) -> tuple[Tensor, Tensor]:
    """The last rows of each list side by side, in their order, and which places hold one.

    Returns:  [B, length, ...], 0 where there is none; bool [B, length]. The first places are filled.
    Cost:     that of B * length rows.
    Example:  >>> rows, there = last(Ragged(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 3]).int()), 2)
              >>> rows.tolist(), there.tolist()
              ([[2.0, 3.0], [0.0, 0.0]], [[True, True], [False, False]])
    """
    values, offsets = rows.values, rows.offsets.long()
    place = torch.arange(length, device=values.device)
    first = torch.maximum(offsets[1:] - length, offsets[:-1])
    there = place < (offsets[1:] - first)[:, None]
    if values.shape[0] == 0:
        return values.new_zeros(len(there), length, *values.shape[1:]), there
    taken = values[torch.where(there, first[:, None] + place, 0)]
    return torch.where(there.view(*there.shape, *[1] * (values.dim() - 1)), taken, 0.0), there


def _summed(values: Tensor, offsets: Tensor) -> Tensor:
    # torch's operator adds the values of a list in order. A scatter that is compiled adds them as threads come.
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True, initial=0.0)


def _gathered(per_sample: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    padded = torch.cat([per_sample, per_sample.new_zeros(1, *per_sample.shape[1:])])
    return padded[sample_of(offsets, num_values)]


class _SegmentSum(torch.autograd.Function):
    """`segment_sum`, whose gradient is `spread`."""

    @staticmethod
    def forward(values: Tensor, offsets: Tensor) -> Tensor:
        return _summed(values.contiguous(), offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.num_values = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gathered(grads[0], ctx.saved_tensors[0], ctx.num_values), None


class _Spread(torch.autograd.Function):
    """`spread`, whose gradient is `segment_sum`."""

    @staticmethod
    def forward(per_sample: Tensor, offsets: Tensor, num_values: int) -> Tensor:
        return _gathered(per_sample, offsets, num_values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _summed(grads[0].contiguous(), ctx.saved_tensors[0]), None, None
