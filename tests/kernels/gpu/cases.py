"""What the tests of the Triton kernels share. They run on the machine of `tests/machine`, or on a GPU.

The fixture `place` says where a test runs: on the machine in one order of accesses, with `-m slow` in others too, and
with `-m gpu` on a CUDA device.
"""

import random
import re
from collections import Counter

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.machine.library import MODES
from tests.reference import random_lists

LISTS = {
    "no samples": [[], [], []],
    "no ids": [[[], []], [[], []], [[], []]],
    "one id": [[[5]], [[]], [[]]],
    "many": random_lists(random.Random(0), lookups=3, samples=60, longest=4, ids=range(9)),
}


FIRST_ORDER = pytest.param(("threads", 0), id="machine")
ORDERS = [
    FIRST_ORDER,
    *(
        pytest.param((mode, seed), id=f"{mode}-{seed}", marks=pytest.mark.slow)
        for mode in MODES
        for seed in range(3)
        if (mode, seed) != ("threads", 0)
    ),
]
DEVICE = "cuda"
machine_alone = pytest.mark.parametrize("place", ORDERS, indirect=True)
once = pytest.mark.parametrize("place", [FIRST_ORDER], indirect=True)

# Races that are meant: kernels, the conflict, what is written where the plain access is made, and why it is right.
MEANT = [
    (
        "claim", "a plain read and an atomic", "holder = tl.load(first_H + at",
        "An empty place is then claimed by compare-and-swap, which reads memory; one that is held stays held by a "
        "position of the same key, and an old one of those only lets a minimum be taken that changes nothing.",
    ),
    (
        "order_cells", "two plain writes", "_P + k",
        "Two programs write a position only where offsets fall from one's samples to the next's, which is an error: an "
        "id of either, or padding, is in its place.",
    ),
    (
        "place_rows|store_counts|store_new", "a plain read and an atomic", "slot = tl.load(group + j",
        "A slot that looks empty is then taken by compare-and-swap, which reads memory; one that is taken stays taken.",
    ),
]  # fmt: skip


def unmeant(races: Counter) -> list[str]:
    """The races that no entry of MEANT allows."""

    def is_meant(race):
        return any(
            re.fullmatch(kernels, race.kernel) and race.conflict == conflict and text in race.lines[0]
            for kernels, conflict, text, _ in MEANT
        )

    return [str(race) for race in races if not is_meant(race)]


on_gpu = False  # set by the fixture `place`


def on_device(op):
    """`op` on copies of its tensors on the GPU, results and writes brought back; as it is on the machine."""

    def call(*args):
        if not on_gpu:
            return op(*args)
        copies = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
        out = op(*copies)
        for before, after in zip(args, copies, strict=True):
            if isinstance(before, torch.Tensor):
                before.copy_(after)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), out)

    return call


def amid(t: torch.Tensor) -> torch.Tensor:
    """The same numbers in the middle of a larger memory: what lies next to them can be read, but is not theirs."""
    return t.new_full((t.numel() + 128,), 77)[64 : 64 + t.numel()].copy_(t)
