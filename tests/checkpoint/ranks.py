"""Ranks that are threads of one process: what tests of checkpoints of several ranks share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recfx.dist import Group, RankError

T = TypeVar("T")
PATIENCE_S = 60.0


class Meeting:
    """Where threads exchange values."""

    def __init__(self, num: int) -> None:
        self.rounds: list[list[Any]] = [[] for _ in range(num)]  # what each rank has said
        self.ended: set[int] = set()
        self.changed = threading.Condition()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        with self.changed:
            self.rounds[rank].append(value)
            number = len(self.rounds[rank])
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: all(self.has_answered(r, number) for r in range(len(self.rounds))), PATIENCE_S
            )
            if any(len(said) < number for said in self.rounds):
                raise RankError("group: got a rank that has ended")
            return [said[number - 1] for said in self.rounds]

    def has_answered(self, rank: int, number: int) -> bool:
        return rank in self.ended or len(self.rounds[rank]) >= number

    def leave(self, rank: int) -> None:
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()


@dataclass(frozen=True, kw_only=True, eq=False)
class ThreadGroup(Group):
    """A group whose ranks are threads. It has no process groups, so a step of it cannot train."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]

    def wait(self) -> None:
        self.gather(None)


def on_ranks(world_size: int, work: Callable[[Group], T]) -> list[T | Exception]:
    """What `work` returns or raises on each rank."""
    meeting = Meeting(world_size)

    def run(rank: int) -> T | Exception:
        group = ThreadGroup(
            rank=rank, world_size=world_size, streams=2 * world_size, deterministic=False, meeting=meeting
        )
        try:
            return work(group)
        except Exception as error:
            return error
        finally:
            meeting.leave(rank)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def results(world_size: int, work: Callable[[Group], T]) -> list[T]:
    """What `work` returns on each rank. Raises the error of the first rank that has one."""
    found: list[T] = []
    for result in on_ranks(world_size, work):
        if isinstance(result, Exception):
            raise result
        found.append(result)
    return found
