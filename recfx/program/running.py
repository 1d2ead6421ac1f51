"""A program is trained and evaluated; a run is loaded."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from recfx import checkpoint as checkpoints
from recfx import train as loop
from recfx.capture import capture, capture_evaluation, capture_steps
from recfx.capture.captured import Backend
from recfx.checks import check_type
from recfx.program.bar import Bar
from recfx.program.definition import Program, build_found
from recfx.program.modules import find
from recfx.program.ranks import deal_to, is_restarted, join_ranks, mark_launch
from recfx.program.record import (
    FILE,
    check_sources,
    differences,
    located,
    place_of,
    ranks_of,
    read_run,
    record_of,
    write_text,
)
from recfx.program.tensorboard import TensorBoard
from recfx.step import Step, TrainState
from recfx.train import Event, Progress, TrainConfig, check_output
from recfx.train.ranks import together
from recfx.train.stopping import check_evaluated
from recfx.types import Batch

__all__ = ["evaluate", "load", "restore", "train"]

COMPARED = ("recfx", "torch")  # versions that `load` warns of


# long: its arguments, and ranks that agree between the phases
def train(
    program: str | os.PathLike[str],
    paths: Any,
    config: TrainConfig,
    *,
    arguments: Mapping[str, Any] | None = None,
    held_out: Any = None,
    eval_steps: int | None = None,
    steps_per_replay: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    backend: Backend = "inductor",
    streams: int | None = None,
    deterministic: bool = False,
    bar: Bar | None = None,
    tensorboard: bool = False,
) -> tuple[TrainState, Progress]:
    """Builds a program, captures its step and trains it; writes <output_dir>/run.json before the first step.

    Args:     program, arguments: see `build`.  paths: what the program's reader is given, with "train".
              config, steps_per_replay, resume, overwrite: see `recfx.train.train`.
              held_out: what the reader is given with "evaluate", after every epoch; None: no evaluation.
              eval_steps: batches per evaluation; None: all.  backend: see `recfx.capture.capture`.
              streams, deterministic: see `recfx.dist.join`; streams of None: those of the checkpoint that the run
              goes on from, or as many as there are ranks.
              bar: shows what is going on, on rank 0; None: nothing is shown.
              tensorboard: whether <output_dir>/tensorboard is written too, see `recfx.program.tensorboard`.

    Under torchrun every rank calls it, with the same arguments. A worker that torchrun restarts after its first step
    goes on from the newest checkpoint, whatever `resume` and `overwrite` say.
    Returns:  the state after the last step, and where training stands.
    Raises:   what `build`, the program, `recfx.capture.capture`, `recfx.train.train` and `evaluate` raise; OSError when
              run.json cannot be written.
    """
    check_type("config", config, TrainConfig)
    if is_restarted(config.output_dir):
        resume, overwrite = True, False
    found = find(program)
    chosen_device = str((arguments or {}).get("device", "cpu"))
    how: dict[str, Any] = {"streams": streams, "deterministic": deterministic, "device": chosen_device}
    group = join_ranks(config.output_dir, **how, resume=resume)
    bar = bar if group.is_first else None
    with together(group):
        built, chosen = build_found(found, arguments)
        batches, batches_held_out = built.reader(paths, "train"), None
        if held_out is not None:
            batches_held_out = built.reader(held_out, "evaluate")
    for name, value in {"program": found.name or found.file.name, **chosen}.items():
        group.check_same(name, value)
    step, evaluate_with = built.step, None
    batches = deal_to(group, batches)
    batches_held_out = None if held_out is None else deal_to(group, batches_held_out)
    state = built.init()
    check_evaluated(config, state, is_evaluated=held_out is not None)
    given, device = {"train": paths, "evaluate": held_out}, str(state.step.device)
    record = record_of(found, config.output_dir, arguments=chosen, paths=given, device=device)
    record |= ranks_of(group)
    with _phase(bar, "reading"):
        first = batches.first()
        if batches_held_out is not None:
            batches_held_out.first()  # raises here where there is none, not after an epoch
    with together(group):
        if group.is_first:
            check_output(config, resume=resume, overwrite=overwrite)
    with _phase(bar, "compiling"):
        if batches_held_out is not None:
            evaluation = capture_evaluation(step, state, first, backend=backend)

            def evaluate_with(state: TrainState) -> dict[str, float]:
                return loop.evaluate(evaluation, state, batches_held_out, eval_steps=eval_steps, group=group)

        run = _captured(step, state, first, steps_per_replay, backend)
    if bar is not None:
        bar.watch(run)
    listeners: list[Callable[..., None]] = [] if bar is None else [bar.on_event]
    listeners += [TensorBoard(config.output_dir).on_event] if tensorboard and group.is_first else []
    on_event = _recording(Path(config.output_dir, FILE), record if group.is_first else None, listeners)
    how = {"steps_per_replay": steps_per_replay, "resume": resume, "overwrite": overwrite}
    return loop.train(step, run, state, batches, config, **how, evaluate_with=evaluate_with, on_event=on_event)


def load(
    run: str | os.PathLike[str], *, program: str | os.PathLike[str] | None = None, allow_changes: bool = False
) -> Program:
    """Builds the program of a run again, with the run's arguments. Its code is executed: load runs you trust.

    Its source files must be the same, byte for byte. Versions of Python and packages may differ; a UserWarning names
    other ones of recfx and torch, which may change values. Threads, instruction set and device are not compared, see
    `differences`.

    Args:     run: the output folder, or its `run.json`.
              program: where the program is now, if it has been moved; None: the path in `run.json`.
              allow_changes: build it although its sources have changed.
    Raises:   ValueError when there is no such record, it is damaged or of a newer recfx, the program is not found, or
              its sources have changed; what `build` raises.
    """
    path, record = place_of(run), read_run(run)
    found = located(record, path) if program is None else find(program)
    if not allow_changes:
        check_sources(record, path, found)
    changed = [line for line in differences(run) if line.partition(":")[0] in COMPARED]
    if changed:
        warnings.warn(f"recfx: {path} is of other versions: {'; '.join(changed)}. Values may differ.", stacklevel=2)
    return build_found(found, record["arguments"])[0]


def restore(
    run: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    program: str | os.PathLike[str] | None = None,
    allow_changes: bool = False,
) -> tuple[Program, TrainState]:
    """`load`, and the state of one of its checkpoints.

    Args:     checkpoint: its folder; None: the newest one next to `run.json`.  program, allow_changes: see `load`.
    Raises:   ValueError when there is no checkpoint, or it does not fit the program; what `load` raises.
    """
    check_type("checkpoint", checkpoint, str | os.PathLike | None, "It is the folder of a checkpoint.")
    built = load(run, program=program, allow_changes=allow_changes)
    folder = place_of(run).parent
    found = checkpoints.latest(folder) if checkpoint is None else Path(checkpoint)
    if found is None:
        raise ValueError(f"run: got '{folder}', which contains no checkpoint, expected one at least. Train it first.")
    state, _ = checkpoints.load(found, built.step, built.init())
    return built, state


def evaluate(
    run: str | os.PathLike[str],
    paths: Any,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    program: str | os.PathLike[str] | None = None,
    allow_changes: bool = False,
    eval_steps: int | None = None,
    backend: Backend = "inductor",
    streams: int | None = None,
    deterministic: bool = False,
    bar: Bar | None = None,
) -> dict[str, float]:
    """The metrics of a run's checkpoint on files, see `recfx.train.evaluate`.

    Args:     run, checkpoint, program, allow_changes: see `restore`.  paths: what the program's reader is given, with
              "evaluate".  eval_steps: batches to read; None: all.  backend, bar: see `train`.
              streams, deterministic: see `recfx.dist.join`. Any number of ranks gives the same counts.
    """
    device = str(read_run(run)["arguments"].get("device", "cpu"))
    group = join_ranks(place_of(run).parent, streams=streams, deterministic=deterministic, device=device)
    bar = bar if group.is_first else None
    built, state = restore(run, checkpoint=checkpoint, program=program, allow_changes=allow_changes)
    batches = deal_to(group, built.reader(paths, "evaluate"))
    with _phase(bar, "reading"):
        first = batches.first()
    with _phase(bar, "compiling"):
        captured = capture_evaluation(built.step, state, first, backend=backend)
    with _phase(bar, "evaluating"):
        return loop.evaluate(captured, state, batches, eval_steps=eval_steps, group=group)


def _captured(step: Step, state: TrainState, batch: Batch, steps_per_replay: int, backend: Backend) -> Any:
    if steps_per_replay == 1:
        return capture(step, state, batch, backend=backend)
    return capture_steps(step, state, batch, steps_per_replay=steps_per_replay, backend=backend)


def _recording(
    path: Path, record: Mapping[str, Any] | None, listeners: Sequence[Callable[..., None]]
) -> Callable[..., None]:
    """A listener that writes the record before the first step, when the run can no longer be rejected, and notifies
    others.

    Args:     record: None on ranks other than the first, which write nothing.
    """
    text = None if record is None else json.dumps(record, indent=1, sort_keys=True) + "\n"

    def on_event(event: Event, progress: Progress, state: TrainState) -> None:
        nonlocal text
        if text is not None and event == "before_step":
            write_text(path, text)
            mark_launch(path.parent)
            text = None
        for listener in listeners:
            listener(event, progress, state)

    return on_event


def _phase(bar: Bar | None, name: str) -> AbstractContextManager[Any]:
    return nullcontext() if bar is None else bar.phase(name)
