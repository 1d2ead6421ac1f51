"""What ranks exchange within a step, as operators of a captured graph. In one process each returns its argument."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.dist.group import Group

__all__ = ["all_gather", "all_reduce", "all_to_all"]


def all_to_all(group: Group, message: Tensor) -> Tensor:
    """Row r [N, K] goes to rank r. Returns what came from each rank, by rank, in the same shape."""
    if group.exchange is None:
        return message
    ones = [1] * group.world_size
    return _wait(_ops().all_to_all_single(message.contiguous(), ones, ones, group.name))


def all_reduce(group: Group, tensor: Tensor) -> Tensor:
    """The sum over all ranks, in an order of torch's choice: equal on all ranks and from run to run."""
    return tensor if group.exchange is None else _wait(_ops().all_reduce(tensor, "sum", group.name))


def all_gather(group: Group, tensor: Tensor) -> Tensor:
    """A tensor [K] of each rank, by rank: [N, K]."""
    if group.exchange is None:
        return tensor[None]
    gathered = _wait(_ops().all_gather_into_tensor(tensor, group.world_size, group.name))
    return gathered.view(group.world_size, -1)


def _ops():  # type: ignore[no-untyped-def] # a namespace of torch
    return torch.ops._c10d_functional


def _wait(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)
