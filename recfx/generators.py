"""The random generators of a process: those of torch, which a step may draw from, and those that it may not."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph

__all__ = ["Draws", "check_graph", "frozen", "generator_states", "kept_generators", "set_generator_states"]


class Draws:
    """Whether a step draws from torch's generators: a checkpoint then holds their states. Known after one call."""

    def __init__(self) -> None:
        self.happened = self.is_known = False

    @contextmanager
    def watched(self, device: torch.device) -> Iterator[None]:
        """In the first call: compares the states of the generators of the CPU and of `device` before and after."""
        if self.is_known:
            yield
            return
        before = generator_states(device)
        yield
        after = generator_states(device)
        self.happened, self.is_known = any(not torch.equal(before[name], after[name]) for name in before), True


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """u8 states of torch's default generators, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `generator_states`; those of other kinds of device are left alone."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[list[str]]:
    """The default generators of torch, Python and numpy come out as they were.

    Yields a list that, once the block has ended, names those of Python and numpy that were drawn from: by the block, or
    by another thread meanwhile. These are the generators of the functions of the modules `random` and `numpy.random`.
    A `random.Random()` or `numpy.random.default_rng()` that the program made is not seen.
    """
    drawn: list[str] = []
    before: dict[str, Any] = {"random": random.getstate(), "numpy.random": np.random.get_state()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield drawn
    finally:
        after = {"random": random.getstate(), "numpy.random": np.random.get_state()}
        drawn += [name for name in before if pickle.dumps(before[name]) != pickle.dumps(after[name])]
        random.setstate(before["random"])
        np.random.set_state(before["numpy.random"])


def check_graph(graph: Graph) -> None:
    """Raises ValueError where an operator draws from a `torch.Generator` that the program made.

    A checkpoint does not hold its state. Generators of numpy and Python leave no operator in a graph.
    """
    for node in graph.nodes:
        if node.kwargs.get("generator") is not None:
            raise frozen(f"a torch.Generator, by {node.target}")


def frozen(source: str) -> ValueError:
    """The error for a step whose random numbers a graph would repeat."""
    return ValueError(
        f"forward: got numbers drawn from {source}, expected none. They would be the same at every step, or others "
        "after a resume. Use the fourth argument of forward, see recfx.context.Context, or torch's random functions "
        "without a generator."
    )
