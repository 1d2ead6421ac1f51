"""The ranks that train one model, and what they tell each other on the host."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from recfx.checks import check_int, check_type

__all__ = ["Group", "RankError", "current", "exchanging", "join", "leave"]

TIMEOUT_S = 3600.0  # a rank may compile, evaluate or save while the others wait

_joined: list[Group] = []  # the group that this process has joined


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The ranks that train one model. Made by `join`.

    Args:     rank, world_size: this process, and how many there are. Launched by torchrun.
              streams: rows are dealt to so many streams, see `recfx.dist.deal`. Rank r has a contiguous run of them.
              deterministic: sums over samples are taken by stream, in the order of the streams, so that a run ends with
              the same bytes on any number of ranks.
              exchange: process group of the tensors that a step exchanges; None: one process.
              host: process group of the messages between hosts, on CPUs; None: one process.
    """

    rank: int
    world_size: int
    streams: int
    deterministic: bool
    exchange: distributed.ProcessGroup | None = None
    host: distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes for all."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Of the process group of a step's exchanges, as torch's functional collectives take it."""
        return "" if self.exchange is None else self.exchange.group_name

    @property
    def streams_per_rank(self) -> int:
        """Streams of the ranks that have most."""
        return -(-self.streams // self.world_size)

    @property
    def rounds(self) -> int:
        """Calls of a step for one whole batch: a deterministic rank trains its streams one after another."""
        return self.streams_per_rank if self.deterministic else 1

    @property
    def own_streams(self) -> range:
        """Numbers of this rank's streams: a contiguous run, or every world_size-th one in a deterministic group.

        A deterministic rank trains its streams one after another, so all ranks together train them in order.
        """
        if self.deterministic:
            return range(self.rank, self.streams, self.world_size)
        each, more = divmod(self.streams, self.world_size)
        first = self.rank * each + min(self.rank, more)
        return range(first, first + each + (self.rank < more))

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks. Every rank must call it, with as many."""
        if self.host is None:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.int64)
        with named_errors():
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.host)
        return tensor.tolist()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor summed over all ranks, in place. Integers are summed exactly."""
        if self.host is not None:
            with named_errors():
                on_host = tensor.cpu()
                distributed.all_reduce(on_host, group=self.host)
                tensor.copy_(on_host)
        return tensor

    def from_first_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Gives the tensors the values that rank 0 has."""
        if self.host is None:
            return
        for tensor in tensors:
            on_host = tensor.detach().cpu()
            with named_errors():
                distributed.broadcast(on_host, group=self.host, group_src=0)
            tensor.detach().copy_(on_host)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on each of them. They are pickled."""
        if self.host is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with named_errors():
            distributed.all_gather_object(values, value, group=self.host)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.host is None:
            return value
        values = [value]
        with named_errors():
            distributed.broadcast_object_list(values, group=self.host, group_src=0)
        return values[0]

    def wait(self) -> None:
        """Waits until every rank has come here."""
        if self.host is not None:
            with named_errors():
                distributed.barrier(group=self.host)

    def check_same(self, what: str, value: Any) -> None:
        """Raises ValueError on every rank when a rank has another value than rank 0."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what}: got {other!r} on rank {rank}, expected {values[0]!r} as on rank 0. All ranks train one "
                    "model. Start them with the same program and arguments."
                )


class named_errors:  # noqa: N801 - used as a context, like contextlib's
    """Turns torch's error about a rank that has ended, or does not answer, into `RankError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RankError):
            raise RankError(
                f"group: got an error while exchanging with other ranks ({_first_line(error)}), expected all of them "
                "to go on. One has ended or does not answer; its own error is in its output. Start again: the run goes "
                "on from the last checkpoint with resume=True."
            ) from error


class RankError(RuntimeError):
    """Another rank has ended, or does not answer."""


@contextmanager
def exchanging() -> Iterator[None]:
    """A step that exchanges with other ranks: torch's error about one that has ended becomes a RankError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not (isinstance(error, distributed.DistError) or "gloo/" in str(error)):
            raise
        raise RankError(
            f"group: got an error within a step that exchanges with other ranks ({_first_line(error)}), expected all "
            "of them to go on. One has ended or does not answer; its own error is in its output. Start again: the run "
            "goes on from the last checkpoint with resume=True."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def join(
    *, streams: int | None = None, deterministic: bool = False, device: str | torch.device = "cpu", use: bool = True
) -> Group:
    """Joins the ranks that torchrun has started; alone without torchrun.

    Args:     streams: into how many streams rows are dealt; None: as many as there are ranks. A run that continues with
              another number of ranks keeps its number of streams: their rows and their order stay the same.
              deterministic: see `Group`.  device: where steps run. NCCL exchanges between GPUs, Gloo between CPUs.
              use: whether `train_step` takes this group where it is given none.
    Raises:   ValueError when streams is below 1; RuntimeError of torch when the other ranks cannot be reached.
    Example:  >>> group = join()
              >>> group.rank, group.world_size
              (0, 1)
    """
    check_type("deterministic", deterministic, bool)
    if streams is not None:
        check_int("streams", streams, 1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    leave()
    if world_size == 1:
        group = Group(rank=0, world_size=1, streams=streams or 1, deterministic=deterministic)
    else:
        group = _join_others(world_size, streams or world_size, deterministic, torch.device(device))
    if use:
        _joined.append(group)
    return group


def _join_others(world_size: int, streams: int, deterministic: bool, device: torch.device) -> Group:
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not distributed.is_initialized():
        with named_errors():
            store, rank, _ = next(distributed.rendezvous("env://", timeout=timeout))
            store = _of_this_start(store, rank, world_size)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    with named_errors():
        exchange = distributed.new_group(backend=backend, timeout=timeout)
        host = distributed.new_group(backend="gloo", timeout=timeout)
    assert isinstance(exchange, distributed.ProcessGroup)
    assert isinstance(host, distributed.ProcessGroup)
    return Group(
        rank=distributed.get_rank(),
        world_size=world_size,
        streams=streams,
        deterministic=deterministic,
        exchange=exchange,
        host=host,
    )


def _of_this_start(store: Any, rank: int, world_size: int) -> Any:
    """A part of the store that no earlier start of the ranks has written to.

    torchrun may keep one store for workers that it starts again: they would read addresses of those that have ended.
    Rank 0 gives a name to each rank that has written a new token.
    """
    token = uuid.uuid4().hex
    if rank:
        store.set(f"recfx/token/{rank}", token)
        name = store.get(f"recfx/name/{token}").decode()
        store.set(f"recfx/known/{name}/{rank}", "")
    else:
        name, begun = token, time.monotonic()
        known = [f"recfx/known/{name}/{other}" for other in range(1, world_size)]
        while not store.check(known):
            for other in range(1, world_size):
                if store.check([f"recfx/token/{other}"]):
                    store.set(f"recfx/name/{store.get(f'recfx/token/{other}').decode()}", name)
            if time.monotonic() - begun > TIMEOUT_S:
                raise RuntimeError("a rank has not started")
            time.sleep(0.01)
    return distributed.PrefixStore(f"recfx/{name}", store)


def current() -> Group | None:
    """The group that this process has joined; None: one process."""
    return _joined[-1] if _joined else None


def leave() -> None:
    """Forgets the group that was joined. Process groups of torch stay until the process ends."""
    _joined.clear()
