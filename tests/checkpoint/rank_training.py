"""Two ranks train, save in the background and in part, and go on. Run by `launch` in test_checkpoint_kills.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from recfx import checkpoint, dist
from recfx.program.ranks import end_ranks
from recfx.step import TrainState
from recfx.table import policies
from recfx.table.policies import Life
from recfx.train import TrainConfig, train
from tests.checkpoint.test_checkpoint_ranks import assert_equal_tables
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step
from tests.dist.loop_of_ranks import Dealt

LIFE = Life(admit=policies.at_least(2), candidates=600, expire=policies.unseen_for(5), every=3)
NUM = 12


def batches_of(rank: int) -> list:
    return deepfm_batches(NUM, seed=40 + rank, ids=tuple(range(40)))


def go(group: dist.Group, folder: Path, *, resume: bool = False, **config: Any) -> TrainState:
    step = deepfm_step(life=LIFE, group=group)
    settings = TrainConfig(
        output_dir=str(folder), save_steps=4, save_in_background=True, full_save_every=3, max_to_keep=9, **config
    )
    reader = Dealt(batches_of(group.rank), group)
    state, _ = train(step, step.update_, step.init(deepfm_params()), reader, settings, resume=resume)
    return state


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    group = dist.join()
    expected = go(group, folder / "whole")
    go(group, folder / "stopped", train_steps=8)
    state = go(group, folder / "stopped", resume=True)
    step = deepfm_step(life=LIFE, group=group)
    loaded, _ = checkpoint.load(folder / "whole" / "step-000000012", step, step.init(deepfm_params()))
    for a, b, c in zip(expected.tables, state.tables, loaded.tables, strict=True):
        assert_equal_tables(a, b)
        assert_equal_tables(a, c)
        assert int(a.num_candidates) > 0
        assert int(a.num_rows) > 20
    end_ranks()


if __name__ == "__main__":
    main()
