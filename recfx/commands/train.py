"""`recfx train` and `recfx evaluate`: programs on files; the options of training that other programs share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recfx.commands.tabular import add_model_options, written_program
from recfx.commands.text import aligned

if TYPE_CHECKING:
    from recfx.program.bar import Bar

__all__ = [
    "add_evaluate_to",
    "add_rank_options",
    "add_to",
    "add_training_options",
    "check_options",
    "flag",
    "train_from",
]

PATHS = "files, folders, globs or URIs"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Declares `recfx train`."""
    parser = commands.add_parser(
        "train",
        help="train a program or a model on files",
        description="Trains a program, a module with build(args), or a model on the columns of the files, for which it "
        "writes program.py. Writes run.json, checkpoints and summary.json to the output folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", help=f"{PATHS} to train on")
    add("--program", metavar="FILE.py|MODULE", help="the path of its file, or its import path; None: made from the "
        "files, see --label")  # fmt: skip
    add("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="an argument of the program, "
        "of those in its ARGUMENTS; the value is JSON, or else text; may be repeated")  # fmt: skip
    add("--eval_paths", "--eval", nargs="+", help="held-out files, evaluated after every epoch; None: no evaluation")
    add_training_options(parser)
    add_model_options(parser)
    parser.set_defaults(command=_train)


def add_evaluate_to(commands: argparse._SubParsersAction) -> None:
    """Declares `recfx evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a run on files",
        description="AUC, log loss and calibration of a run's newest checkpoint on files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", help="output folder of the run")
    add("paths", nargs="+", help=f"{PATHS} to evaluate on")
    add("--checkpoint", help="folder of the checkpoint, step-...; None: the newest one of the run")
    add("--program", metavar="FILE.py|MODULE", help="where the program is now; None: the path in run.json")
    add("--allow_changes", action="store_true", help="go on where the program's source has changed since")
    add("--eval_steps", type=int, help="batches to read; None: all")
    add("--importance", action="store_true", help="by how much AUC changes when the values of a column are exchanged "
        "between rows, for each column; reads the files once for each")  # fmt: skip
    add_rank_options(parser)
    _add_backend(parser)
    parser.set_defaults(command=_evaluate)


def add_training_options(parser: argparse.ArgumentParser, *, output_dir: str = "./ckpt", log_steps: int = 10) -> None:
    """Declares what `train_from` reads, by the seed system's names where it has them."""
    add = parser.add_argument
    add("--output_dir", default=output_dir, help="checkpoints, run.json and summary.json")
    add("--log_steps", type=int, default=log_steps, help="optimiser steps between log lines")
    add("--save_steps", type=int, default=2000, help="optimiser steps between checkpoints; one more at the end")
    add("--eval_steps", type=int, help="batches per evaluation; None: all")
    add("--eval_every", type=int, help="optimiser steps between evaluations within an epoch; None: at its end only")
    add("--watch", metavar="VALUE", help="a value of the evaluation, such as auc or click/log_loss: the best "
        "checkpoint by it is kept, and named in best.json; None: auc with the next two options")  # fmt: skip
    add("--stop_after", type=int, help="stop after so many evaluations in a row without a best one; None: do not stop")
    add("--reduce_after", type=int, help="after so many, multiply all learning rates by reduce_by; the program's step "
        "needs rate_factor=True; None: they stay")  # fmt: skip
    add("--reduce_by", type=float, default=0.5, help="what learning rates are multiplied by")
    add("--tensorboard", type=flag, nargs="?", const=True, default=False, help="write <output_dir>/tensorboard too; "
        "needs the package tensorboard")  # fmt: skip
    add("--max_to_keep", type=int, default=5, help="checkpoints kept, besides the best one")
    add("--full_save_every", type=int, default=1, help="of so many checkpoints one is full, the others hold what "
        "changed")  # fmt: skip
    add("--save_in_background", type=flag, nargs="?", const=True, default=False, help="train on while saving")
    add("--train_steps", type=int, help="stop after so many more optimiser steps; None: after the data")
    add("--train_epoch", type=int, default=1, help="passes over the data")
    add("--resume", type=flag, nargs="?", const=True, default=False, help="go on from the newest checkpoint in "
        "output_dir, with the rest of its data or with other data")  # fmt: skip
    add("--overwrite", type=flag, nargs="?", const=True, default=False, help="delete the checkpoints in output_dir")
    add("--steps_per_replay", type=int, default=1, help="on a GPU, micro-batches per CUDA graph launch; unmeasured")
    add("--num_threads", type=int, help="threads of the step in each process; None: torch's number, or the "
        "CPU quota, and under torchrun the cores of the host divided by its processes")  # fmt: skip
    add_rank_options(parser)
    _add_backend(parser)


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Declares what concerns the ranks that torchrun starts."""
    add = parser.add_argument
    add("--virtual_shards", type=int, help="streams that rows are dealt to; None: as many as the first run has "
        "processes. Runs with other numbers of processes keep them")  # fmt: skip
    add("--deterministic", type=flag, nargs="?", const=True, default=False, help="sum by stream, so that any number of "
        "processes ends with the same bytes; slower")  # fmt: skip


def train_from(
    args: argparse.Namespace,
    program: str,
    *,
    paths: Any,
    held_out: Any,
    arguments: Mapping[str, Any],
    bar: Bar,
    known: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Trains a program as the options say; returns the summary that is also written to <output_dir>/summary.json.

    Args:     args: of `add_training_options`.  paths, held_out, arguments, bar: see `recfx.program.train`.
              known: more of the summary, by name.
    """
    from recfx import program as programs
    from recfx import train as loop
    from recfx.program.ranks import is_first_process
    from recfx.program.summary import summary_of, write_summary

    config = loop.TrainConfig(
        output_dir=args.output_dir,
        log_steps=args.log_steps,
        save_steps=args.save_steps,
        train_steps=args.train_steps,
        train_epoch=args.train_epoch,
        max_to_keep=args.max_to_keep,
        full_save_every=args.full_save_every,
        save_in_background=args.save_in_background,
        eval_every=args.eval_every,
        watch=args.watch,
        stop_after=args.stop_after,
        reduce_after=args.reduce_after,
        reduce_by=args.reduce_by,
    )
    state, progress = programs.train(
        program,
        paths,
        config,
        arguments=arguments,
        held_out=held_out,
        eval_steps=args.eval_steps,
        steps_per_replay=args.steps_per_replay,
        resume=args.resume,
        overwrite=args.overwrite,
        backend=args.backend,
        streams=args.virtual_shards,
        deterministic=args.deterministic,
        bar=bar,
        tensorboard=args.tensorboard,
    )
    summary = summary_of(progress, state, known or {})
    if is_first_process():
        write_summary(args.output_dir, summary)
    return summary


def flag(word: str) -> bool:
    """The type of an option that is true or false."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got '{word}', expected true or false")
    return word.lower() == "true"


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError or TypeError for options that nothing which is called first would name."""
    from recfx.checks import check_int

    for name in ("num_threads", "eval_steps", "virtual_shards"):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name), 1)


def check_program(args: argparse.Namespace) -> None:
    """Raises ValueError where both a program and a label are given."""
    if args.program is not None:
        raise ValueError(
            f"label: got {args.label} with --program {args.program}, expected one of them. A program names its labels."
        )


def _train(args: argparse.Namespace) -> int:
    from recfx.environment import use_threads, wait_briefly

    wait_briefly()
    from recfx.program.bar import Bar
    from recfx.program.ranks import end_ranks, is_first_process
    from recfx.program.summary import text_of

    check_options(args)
    use_threads(args.num_threads)
    program = args.program
    if program is None or args.label:
        check_program(args)
        program = written_program(args)
        if program is None:
            return 0
    with Bar(saves_in_background=args.save_in_background) as bar:
        given = {"paths": _one(args.paths), "held_out": _one(args.eval_paths), "arguments": dict(args.set)}
        summary = train_from(args, program, **given, bar=bar)
    if is_first_process():
        print(text_of(summary))
    end_ranks()
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from recfx.environment import use_threads, wait_briefly

    wait_briefly()
    from recfx import program as programs
    from recfx.program.bar import Bar
    from recfx.program.ranks import end_ranks, is_first_process
    from recfx.program.summary import text_of

    use_threads(None)
    if args.importance:
        return _importance(args)
    with Bar() as bar:
        values = programs.evaluate(
            args.run,
            _one(args.paths),
            checkpoint=args.checkpoint,
            program=args.program,
            allow_changes=args.allow_changes,
            eval_steps=args.eval_steps,
            backend=args.backend,
            streams=args.virtual_shards,
            deterministic=args.deterministic,
            bar=bar,
        )
    if is_first_process():
        print(text_of({name: int(value) if name.startswith("num_") else value for name, value in values.items()}))
    end_ranks()
    return 0


def _importance(args: argparse.Namespace) -> int:
    from recfx import program as programs
    from recfx.capture import capture_evaluation
    from recfx.tabular import importance

    built, state = programs.restore(
        args.run, checkpoint=args.checkpoint, program=args.program, allow_changes=args.allow_changes
    )
    batches = built.reader(_one(args.paths), "evaluate")
    run = capture_evaluation(built.step, state, batches.first(), backend=args.backend)
    own = {name for _, name in built.step.tasks.columns}
    columns = [column.name for column in built.columns if column.name not in own]
    base, found = importance(run, state, batches, columns, eval_steps=args.eval_steps)
    names = [name for name in base if name.split("/")[-1] in ("auc", "log_loss")]
    rows = sorted(found, key=lambda column: found[column][names[0]])
    cells = [(column, *(f"{found[column][name]:+.4f}" for name in names)) for column in rows]
    print(aligned([("column", *names), ("(as it is)", *(f"{base[name]:.4f}" for name in names)), *cells], num_left=1))
    return 0


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor", help="of the captured step; "
        "eager needs no compiler and is slower")  # fmt: skip


def _one(paths: list[str] | None) -> Any:
    """A path alone as text, as the examples give theirs."""
    return paths[0] if paths is not None and len(paths) == 1 else paths


def _setting(word: str) -> tuple[str, Any]:
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"got '{word}', expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
