"""The rows of a block in another order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from recfx.kernels.pack_columns import Block, BlockColumn
from recfx.kernels.take_lists import take_lists

__all__ = ["take_rows"]


def take_rows(block: Block, order: np.ndarray) -> Block:
    """Row i of the result is row order[i] of the block.

    Cost:     one pass over the values in random order, column by column.
    """
    return Block.of(len(order), [_take(column, order, block.num_rows) for column in block.columns])


def _take(column: BlockColumn, order: np.ndarray, num_rows: int) -> BlockColumn:
    if not column.offsets:
        return BlockColumn(column.values.reshape(num_rows, -1)[order].ravel())
    first, length = _lists(column.offsets[0])
    first, length, levels = first[order], length[order], []
    for offsets in column.offsets[1:]:  # the items of a level are lists themselves
        (first, taken), (length, _) = (_gather(items, first, length) for items in _lists(offsets))
        levels.append(taken)
    values, taken = _gather(column.values, first, length)
    weights = None if column.weights is None else _gather(column.weights, first, length)[0]
    return BlockColumn(values, (*levels, taken), weights)


def _lists(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return offsets[:-1], np.diff(offsets)


def _gather(items: np.ndarray, first: np.ndarray, length: np.ndarray) -> Sequence[np.ndarray]:
    """The lists end to end, and their offsets."""
    arrays = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in (items, first, length)]
    values, offsets = take_lists(arrays[:1], arrays[1:2], arrays[2:], [int(length.sum())])
    return values.numpy(), offsets.numpy()
