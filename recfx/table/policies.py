"""When a row is created and when it is deleted, as pure functions that a user can write.

    admit  (count i32 [P], id i64 [P], vocabulary i32 [P], step i64 []) -> bool [P]   traced into the step
    expire (columns, step) -> bool [R]                                                run by the sweep, between steps
    score  (columns, step) -> i64 [R]                                                 likewise; the lowest go first

`count` is how often an id without a row has occurred so far, itself included. Steps are the only clock, so that a run
can be repeated. Nothing here is ever called by an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recfx.checks import check_int
from recfx.kernels.index.hashing import GOLDEN, mix, shift_right

__all__ = [
    "Admit",
    "Expire",
    "Life",
    "RowColumns",
    "Score",
    "at_least",
    "created_before",
    "least_frequently_used",
    "least_recently_used",
    "read_only",
    "unseen_for",
    "with_probability",
]


class RowColumns(NamedTuple):
    """The rows of one physical table by number, for `expire` and `score` to read. Their answer for a freed row counts
    for nothing."""

    id: Tensor  # i64 [R]
    vocabulary: Tensor  # i32 [R], -1 where a row is freed
    last_step: Tensor  # i64 [R], last step that touched the row
    first_step: Tensor  # i32 [R], step that created it
    num_steps: Tensor  # i32 [R], steps that touched it through a trainable feature
    weight: Tensor  # f32 [R, W], its logical tables side by side


Admit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Expire = Callable[[RowColumns, int], Tensor]
Score = Callable[[RowColumns, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Life:
    """Which ids get a row, which rows are deleted and when, for every physical table of a step.

    Args:     admit: whether an id without a row gets one at this occurrence; until then it is treated like a refused
              one (`Embedding.unknown` is its value, it has no gradient) and counted apart. None: always.
              candidates: most ids without a row that are counted for `admit`, exactly, in 27 bytes each; further ones
              count as seen once. Emptied at a sweep that finds it more than half full. 0: `count` is always 0.
              expire: rows to delete.
              score, keep: of what is left, rows are deleted by rising score, then by row number, down to `keep` rows.
              every: optimiser steps between sweeps; a sweep runs after each step number that it divides.
              at_cap: what to do when a table has `max_rows` rows: "refuse" new ids and count them, "evict" by a sweep
              at the end of the step that filled it (of that step's ids those that came too late get no row), or
              "stop" with an error at the end of the step that had no room for one.
    Cost:     4 bytes a row and one pass over a step's rows for `num_steps`; a sweep reads every row's columns.
    Raises:   ValueError on a number out of range, when only one of `score` and `keep` is given, or neither to evict by;
              TypeError on what is not an int or not a function.
    Example:  >>> Life(expire=unseen_for(10_000), score=least_recently_used, keep=900_000).every
              1000
    """

    admit: Admit | None = None
    candidates: int = 2**22
    expire: Expire | None = None
    score: Score | None = None
    keep: int | None = None
    every: int = 1000
    at_cap: Literal["refuse", "evict", "stop"] = "refuse"

    def __post_init__(self) -> None:
        if (self.score is None) != (self.keep is None):
            raise ValueError(f"keep: got {self.keep} with score {self.score}, expected both or neither.")
        for name, least in (("keep", 0), ("every", 1), ("candidates", 0)):
            value = getattr(self, name)
            if value is not None or name != "keep":
                check_int(name, value, least)
        for name in ("admit", "expire", "score"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name}: got {value!r}, expected a function.")
        if self.candidates >= 2**31:
            raise ValueError(f"candidates: got {self.candidates}, expected at most 2**31 - 1.")
        if self.at_cap not in ("refuse", "evict", "stop"):
            raise ValueError(f"at_cap: got '{self.at_cap}', expected 'refuse', 'evict' or 'stop'.")
        if self.at_cap == "evict" and self.score is None:
            raise ValueError("score: got None with at_cap='evict', expected a function. It specifies which rows go.")


# Admission.


def at_least(n: int) -> Admit:
    """A row is created at an id's n-th occurrence.

    Raises:   TypeError when n is not an int, ValueError when it is below 1.
    Example:  >>> at_least(3)(torch.tensor([1, 2, 3, 4]), None, None, None).tolist()
              [False, False, True, True]
    """
    check_int("n", n, 1)
    return lambda count, id, vocabulary, step: count >= n


def with_probability(p: float, *, seed: int) -> Admit:
    """Each occurrence of an id without a row creates one with probability p, drawn from (seed, vocabulary, id, count).

    Raises:   TypeError when p is not a number or seed not an int; ValueError when p is not in [0, 1], or seed too long.
    Example:  >>> with_probability(1.0, seed=0)(torch.tensor([1]), torch.tensor([7]), torch.tensor([0]), None).tolist()
              [True]
    """
    if type(p) not in (int, float):
        raise TypeError(f"p: got {p!r}, expected a float.")
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}, expected 0 to 1.")
    check_int("seed", seed, -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed: got {seed}, expected 64 bits, signed.")

    def admit(count: Tensor, id: Tensor, vocabulary: Tensor, step: Tensor) -> Tensor:
        key = mix(id + (vocabulary.long() + 1) * GOLDEN) ^ seed
        return shift_right(mix(mix(key) + count.long() * GOLDEN), 11) < int(p * 2**53)

    return admit


def read_only(count: Tensor, id: Tensor, vocabulary: Tensor, step: Tensor) -> Tensor:
    """No row is created; those that exist are trained. It counts nothing: use it with `candidates=0`."""
    return torch.zeros_like(id, dtype=torch.bool)


# Eviction.


def unseen_for(steps: int) -> Expire:
    """A row last seen at step s is deleted at the check after step t if t - s >= steps.

    Raises:   TypeError when steps is not an int, ValueError when it is below 1.
    Example:  >>> rows = RowColumns(None, None, torch.tensor([1, 5, 6]), None, None, None)
              >>> unseen_for(5)(rows, 10).tolist()
              [True, True, False]
    """
    check_int("steps", steps, 1)  # 0 would delete the rows of this very step
    return lambda columns, step: step - columns.last_step >= steps


def created_before(steps: int) -> Expire:
    """Time to live: a row created at step s is deleted at the check after step t if t - s >= steps, seen or not.

    Raises:   TypeError when steps is not an int, ValueError when it is below 1.
    Example:  >>> rows = RowColumns(None, None, None, torch.tensor([1, 5, 6], dtype=torch.int32), None, None)
              >>> created_before(5)(rows, 10).tolist()
              [True, True, False]
    """
    check_int("steps", steps, 1)  # 0 would delete the rows of this very step
    return lambda columns, step: step - columns.first_step >= steps


def least_recently_used(columns: RowColumns, step: int) -> Tensor:
    """Score: the last step that touched the row."""
    return columns.last_step


def least_frequently_used(columns: RowColumns, step: int) -> Tensor:
    """Score: the steps that touched the row, the less recently seen first where they are as many."""
    return (columns.num_steps.long() << 32) | columns.last_step
