"""What the ranks that train together do at the same points of the loop: they add up, and agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._pytree import tree_map

from recfx.checks import said
from recfx.dist import Group, RankError

__all__ = ["check_dealt", "group_of", "of_ranks", "rank_text", "summed", "together"]

ALONE = Group(rank=0, world_size=1, streams=1, deterministic=False)


def of_ranks(group: Group | None) -> Group:
    """The group, or one of this process alone, which exchanges nothing."""
    return ALONE if group is None else group


def group_of(step: Any) -> Group:
    """The ranks that share a step's tables, or this process alone."""
    return of_ranks(getattr(step, "group", None))


def summed(group: Group, counts: Any) -> Any:
    """The counts of all ranks, on each of them; `counts` stay this rank's. Every rank must call it."""
    return counts if group.world_size == 1 else tree_map(lambda t: group.sum_(t.clone()), counts)


def rank_text(group: Group, rank: int) -> str:
    """ " of rank 1", for an error; "" in one process."""
    return "" if group.world_size == 1 else f" of rank {rank}"


@contextmanager
def together(group: Group) -> Iterator[None]:
    """Every rank runs a block that exchanges nothing. Where it raises on one, it raises on all.

    The others would wait for that rank at their next exchange.
    Raises:   RankError on ranks whose own block went well, naming the first that failed and its error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # every rank must know of it
        error = raised
    texts = group.gather(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    failed = [rank for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise RankError(
            f"rank {failed[0]}: got an error ({texts[failed[0]]}), expected all ranks to go on. Nothing was trained "
            "since the last checkpoint. Mend what that rank names, and start again."
        )


def check_dealt(reader: object, group: Group) -> None:
    """Raises ValueError when several ranks would all train on the whole data."""
    if group.world_size > 1 and getattr(reader, "group", None) is None:
        raise ValueError(
            f"reader: got {said(reader)} on {group.world_size} ranks, expected one that is dealt to them. Each rank "
            "would train on all rows. Use recfx.dist.streams.deal(reader, group)."
        )
