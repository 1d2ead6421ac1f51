"""Training killed with SIGKILL at random moments and resumed, until it ends; its last checkpoint against that of a run
that nobody killed.

    python -m tests.faults.kills 200     counts as JSON

Children are forked from one process that has imported everything and computed nothing, so a kill costs milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._dynamo  # torch imports it when a step first runs: here, once, and not in every child

from recfx.checkpoint import compact, diff, latest
from recfx.train import TrainConfig, train
from tests.conftest import deepfm_batches, deepfm_step
from tests.loop import MemoryReader, fresh

NUM_BATCHES, EPOCHS, SAVE_STEPS = 14, 2, 3
MODES = [(in_background, full_every) for in_background in (False, True) for full_every in (1, 3)]


@dataclass
class Counts:
    kills: int = 0
    while_saving: int = 0  # an unfinished folder was left
    without_checkpoint: int = 0  # before the first was whole
    runs: int = 0  # that came to their end
    equal: int = 0  # of these: the same bytes as never killed


def run(folder: Path, in_background: bool, full_every: int, slow: random.Random | None) -> None:
    """Trains, resuming where there is something to resume from. `slow`: the disk takes its time."""
    torch.set_num_threads(1)
    if slow is not None:
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(slow.uniform(0, 0.012)), fsync(file))[1]  # type: ignore[assignment]
    step = deepfm_step(accumulation=2)
    reader = MemoryReader(deepfm_batches(NUM_BATCHES + 1, seed=5, ids=tuple(range(150)), short_last=True))
    config = TrainConfig(
        output_dir=str(folder), save_steps=SAVE_STEPS, train_epoch=EPOCHS, max_to_keep=2,
        save_in_background=in_background, full_save_every=full_every,
    )  # fmt: skip
    train(step, step.update_, fresh(step), reader, config, resume=True)


def forked(work: object, *args: object) -> int:
    """Pid of a child that does the work, and exits with 0 unless it failed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(*args)  # type: ignore[operator]
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def digests(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def kill_until_done(folder: Path, mode: tuple[bool, int], rng: random.Random, duration: float, counts: Counts) -> None:
    """One run, killed again and again; every other time it may run as long as a whole run takes."""
    while True:
        pid = forked(run, folder, *mode, random.Random(rng.random()))
        time.sleep(rng.uniform(0, duration * rng.choice((0.4, 1.2))))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert status == 0, f"{folder}: a resumed run failed, see its output above"
            counts.runs += 1
            return
        counts.kills += 1
        counts.while_saving += any(folder.glob(".unfinished-*"))
        counts.without_checkpoint += latest(folder) is None


def kill(num_kills: int, seed: int) -> Counts:
    """Runs in all modes in turn, until `num_kills` children were killed and the last run has ended."""
    rng, counts = random.Random(seed), Counts()
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        begun = time.perf_counter()
        assert os.waitpid(forked(run, whole, False, 1, random.Random(0)), 0)[1] == 0
        duration = time.perf_counter() - begun
        while counts.kills < num_kills:
            mode = MODES[counts.runs % len(MODES)]
            folder = Path(scratch, str(counts.runs))
            kill_until_done(folder, mode, rng, duration, counts)
            last, expected = latest(folder), latest(whole)
            assert last is not None
            assert expected is not None
            assert (last.name, diff(last, expected)) == (expected.name, [])
            counts.equal += digests(compact(last) if mode[1] > 1 else last) == digests(expected)
            assert not list(folder.glob(".unfinished-*"))
    return counts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(asdict(kill(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0))))
