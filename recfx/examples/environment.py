"""What the programs read from the environment."""

from __future__ import annotations

import os

__all__ = ["check_one_process"]


def check_one_process() -> None:
    """These programs train one model in one process: several would each train their own, and say nothing.

    Raises:   ValueError when RANK or WORLD_SIZE, which torchrun sets, tells of more than one process.
    """
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1")):
        if (word := os.environ.get(name, alone)) != alone:
            raise ValueError(
                f"{name}: got '{word}', expected {alone} or no such variable. This program runs in one process; under "
                "torchrun each process would train a separate model. Start it without torchrun."
            )
