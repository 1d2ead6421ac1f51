"""What ranks of a group do in the loop. Run by `launch` in test_loop.py; prints one line of JSON a rank."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recfx import checkpoint, dist
from recfx.dist import Group
from recfx.program.ranks import end_ranks
from recfx.program.summary import summary_of
from recfx.train import TrainConfig, evaluate, train
from recfx.train.ranks import together
from recfx.train.watching import FILE, read_metrics_file
from tests.conftest import deepfm_batches, deepfm_params, deepfm_step, linear_params, linear_step
from tests.loop import Log, MemoryIterator, MemoryReader

NUM = 12


class Dealt(MemoryReader):
    """The batches of one rank; ranks agree on signals with each of them."""

    def __init__(self, batches: list, group: Group) -> None:
        super().__init__(batches)
        self.group = group

    def start_at(self, position: dict) -> Any:
        return DealtIterator(self, position["batch"])


class DealtIterator(MemoryIterator):
    """interrupted: whether this rank was, set by the loop.  is_interrupted: whether any was, before the last batch."""

    interrupted = is_interrupted = False

    def __next__(self) -> Any:
        is_over = self.place == len(self.reader.batches)
        stops, over = self.reader.group.most([self.interrupted, is_over])
        self.is_interrupted = bool(stops)
        if over:
            raise StopIteration
        return super().__next__()


class NoSaver:
    """Stands in for checkpoints: says what would have been saved."""

    busy = False
    numbers: list[int]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.numbers = []
        saved.append(self.numbers)

    def __enter__(self) -> NoSaver:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def finish(self) -> None: ...

    def save(self, state: Any, *, number: int, loop: dict) -> None:
        self.numbers.append(number)


saved: list[list[int]] = []


def batches_of(rank: int, *, num: int = NUM) -> list:
    return deepfm_batches(num, seed=5 + rank)


def go(
    group: Group,
    folder: str,
    batches: list,
    listener: Callable = lambda *_: None,
    make: Callable = linear_step,
    params: Callable = linear_params,
    evaluated: Callable | None = None,
    **config: Any,
) -> Any:
    step = make(group=group)
    reader = Dealt(batches, group)
    settings = TrainConfig(output_dir=folder, **config)
    state = step.init(params())
    evaluate_with = None if evaluated is None else partial(evaluated, step)
    return step, *train(step, step.update_, state, reader, settings, on_event=listener, evaluate_with=evaluate_with)


def error_of(function: Callable, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fails_on(rank: int, group: Group) -> None:
    with together(group):
        if group.rank == rank:
            raise FileNotFoundError(f"no file on {rank}")


def facts(group: Group, folder: str) -> dict[str, Any]:
    """What the checks of test_loop.py look at."""
    found: dict[str, Any] = {}

    def stop() -> None:
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for name, event, number in (("step", "after_step", 3), ("before", "before_epoch", 0), ("end", "after_epoch", NUM)):
        log = Log((event, number), stop)
        _, _, progress = go(group, folder, batches_of(group.rank), log, log_steps=2, save_steps=4, train_epoch=2)
        found[name] = [progress.step, progress.stopped, saved[-1], log.steps("log")]
    step, state, progress = go(group, folder, batches_of(group.rank), log_steps=5)
    found["samples"], found["loss"] = progress.num_samples, progress.loss
    found["summary_rows"] = summary_of(progress, state, {}, group=group)["rows"]
    found["own_rows"] = int(state.tables[0].num_rows)
    found["evaluation"] = evaluate(step.evaluate_, state, Dealt(batches_of(group.rank, num=3), group), group=group)
    found |= watched(group, folder)
    bad = batches_of(group.rank)
    if group.rank == 1:
        bad[6]["label"][2] = 7.0
    found["label"] = error_of(go, group, folder, bad, log_steps=4)
    nan = batches_of(group.rank)
    if group.rank == 1:
        nan[2]["numeric"][3, 0] = float("nan")
    found["nan"] = error_of(go, group, folder, nan, log_steps=4, make=deepfm_step, params=deepfm_params)
    found["differs"] = error_of(go, group, folder, batches_of(0), log_steps=4 + group.rank)
    found["whole"] = error_of(
        train,
        step,
        step.update_,
        step.init(linear_params()),
        MemoryReader(batches_of(0)),
        TrainConfig(output_dir=folder),
    )
    found["fails"] = error_of(fails_on, 1, group)
    return found


def watched(group: Group, folder: str) -> dict[str, Any]:
    """Evaluations within an epoch that end the run and lower its rates, and a listener of rank 1 that ends it."""

    def evaluated(step: Any, state: Any) -> dict[str, float]:
        values = evaluate(step.evaluate_, state, Dealt(batches_of(group.rank, num=2), group), group=group)
        return values | {"auc": {3: 0.6}.get(int(state.step), 0.5)}

    def stop(event: str, progress: Any, state: Any) -> str | None:
        return "stop" if group.rank == 1 and (event, progress.step) == ("after_step", 3) else None

    make, how = partial(linear_step, rate_factor=True), {"eval_every": 3, "stop_after": 2, "reduce_after": 1}
    _, state, early = go(group, f"{folder}/early", batches_of(group.rank), make=make, evaluated=evaluated, **how)
    lines = [(line["event"], line["step"]) for line in read_metrics_file(Path(folder, "early", FILE))]
    rows = read_metrics_file(Path(folder, "early", FILE))[-1]["tables"][0]["rows"]
    found = {"early": [early.step, early.stopped, float(state.rate), saved[-1]], "lines": lines, "line_rows": rows}
    own = int(state.tables[0].num_rows)
    _, _, heard = go(group, f"{folder}/heard", batches_of(group.rank), stop)
    return found | {"early_rows": own, "heard": [heard.step, heard.stopped]}


def main() -> None:
    """Arguments: what to do, a folder."""
    what, folder = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    checkpoint.Saver = NoSaver  # type: ignore[misc,assignment]
    group = dist.join()
    if what == "facts":
        print(json.dumps(facts(group, folder)))
        end_ranks()
        return

    def die(event: str, progress: Any, state: Any) -> None:
        if group.rank == 1 and (event, progress.step) == ("after_step", 5):
            Path(folder, "dies").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        go(group, folder, batches_of(group.rank), die, train_epoch=100)
    except dist.RankError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
