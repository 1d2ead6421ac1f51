"""`train`: the loop around a step. Its pieces are the methods of `recfx.train.pieces.Loop`."""

from __future__ import annotations

from recfx import checkpoint
from recfx.checks import check_type
from recfx.run_checks import check_step_and_state
from recfx.step import Step, TrainState
from recfx.train.checks import Run, RunSteps, check_reader, check_run
from recfx.train.output import check_output
from recfx.train.pieces import EvaluateWith, Loop, OnEvent
from recfx.train.progress import Progress, Reader, TrainConfig
from recfx.train.ranks import check_dealt, group_of, together
from recfx.train.signals import interrupts
from recfx.train.stopping import check_evaluated
from recfx.train.watching import MetricsFile

__all__ = ["train"]


def train(
    step: Step,
    run: Run | RunSteps,
    state: TrainState,
    reader: Reader,
    config: TrainConfig,
    *,
    steps_per_replay: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    evaluate_with: EvaluateWith | None = None,
    on_event: OnEvent = lambda *_: None,
) -> tuple[TrainState, Progress]:
    """Trains until the data, the epochs or `train_steps` end. Ctrl-C, SIGTERM and SIGHUP finish the step and save.

    Args:     run: `step.update_` or its capture.  state: freshly initialised, or loaded.
              steps_per_replay: above 1, `run` is what `capture_steps` made for as many, and is given so many batches at
              once; fewer before a sweep, a log line, a checkpoint, the last of `train_steps` and the end of the data.
              Events of steps then come once a call, and a signal finishes it.
              resume: continue from the newest checkpoint in output_dir, if there is one. When this reader wrote it, the
              bytes are the same as never having stopped. When a run over other data ended with it, this run begins
              at the start of its data.
              overwrite: delete the checkpoints in output_dir before the first step.
              evaluate_with: state -> values by name, called after every epoch, every `eval_every` steps and after
              `train_steps`; a resumed run that has nothing left to train is evaluated too. Torch's generators are
              restored after it. What follows from its values: see `TrainConfig.watch`.
              on_event: called with every event. It ends the run by returning "stop" or by `progress.stop()`: the step
              in progress is finished, the run saved, and a resumed one goes on from there.
    Returns:  the state after the last step, and where training stands.

    Rank 0 writes <output_dir>/metrics.jsonl, see `recfx.train.watching`; it goes on where a run is resumed.
    Ranks that train together call it at the same time, each with what `recfx.dist.streams.deal(reader, group)` returns.
    A signal to any of them stops all after the same step. Losses, counts and samples are those of all ranks, samples as
    of the last log line or end of an epoch. What was trained since the last checkpoint is lost where held-out data
    cannot be read.
    Raises:   ValueError when steps_per_replay is below 1, there is nothing to train on, output_dir holds checkpoints
              and neither resume, overwrite nor a state loaded from there decides what to do, or it holds some to resume
              from and the state is loaded or trained already, or the newest one was saved in the middle of other data,
              or when labels were outside [0, 1], before or in this call, see `check_labels`; FloatingPointError when
              the step met NaN or infinity, before or in this call, and is to stop, see `check_finite`; OSError when
              output_dir cannot be written, see `check_output`; what `run`, the reader, a listener and the checkpoint
              raise. A save that is being written is waited for.
    """
    if type(steps_per_replay) is not int or steps_per_replay < 1:
        raise ValueError(f"steps_per_replay: got {steps_per_replay!r}, expected at least 1, an int.")
    check_step_and_state(step, state, "The order is (step, run, state, reader, config).")
    check_run(run, state, "step.update_")
    check_reader(reader)
    check_type("config", config, TrainConfig)
    check_evaluated(config, state, is_evaluated=evaluate_with is not None)
    group = group_of(step)
    check_dealt(reader, group)
    same = {**vars(config), "steps_per_replay": steps_per_replay, "resume": resume, "overwrite": overwrite}
    for name, value in {**same, "evaluate_with": evaluate_with is None, "step": int(state.step)}.items():
        group.check_same(name, value)
    with together(group):
        if group.is_first:
            check_output(config, int(state.step), resume=resume, overwrite=overwrite)
    loop = Loop(step, run, state, reader, config, steps_per_replay, evaluate_with, on_event)
    keep = {"max_to_keep": config.max_to_keep, "full_every": config.full_save_every}
    with checkpoint.Saver(config.output_dir, step, **keep) as saver, interrupts() as interrupted:
        loop.saver, loop.interrupted, loop.overwrite = saver, interrupted, overwrite
        found = group.from_first(checkpoint.latest(config.output_dir))
        if found is not None and resume:
            loop.resume_from(found)
        loop.read_rate()
        loop.metrics_file = MetricsFile(config.output_dir, step, group, loop.progress.step)
        loop.begin(found)
        loop.evaluate_missed()
        while loop.has_more():
            loop.run_epoch()
        loop.end()
    return loop.state, loop.progress
