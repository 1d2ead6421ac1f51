"""What the example programs share: their data is given or generated, then they are trained, evaluated and summed up."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from recfx.commands.train import add_training_options, check_options, train_from
from recfx.environment import use_threads
from recfx.program.bar import Bar
from recfx.program.ranks import is_restarted, join_ranks
from recfx.train.ranks import together

__all__ = ["defaults_of", "parser_of", "run_example"]


def parser_of(
    name: str,
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    *,
    output_dir: str,
    log_steps: int,
    generated_dir: str,
    generated_rows: int,
    evaluated: str,
) -> argparse.ArgumentParser:
    """The command line of an example: its data, its own arguments, and the options of training.

    Args:     add_arguments: declares its own.  evaluated: on what, where no --eval_paths are given.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_paths", help="files, folders, globs or URIs to train on, with commas between; None: generated ones")
    add("--eval_paths", help=f"held-out files, evaluated after every epoch; None: {evaluated}")
    add_arguments(parser)
    add_training_options(parser, output_dir=output_dir, log_steps=log_steps)
    add("--generated_dir", default=generated_dir, help="where generated files are kept")
    add("--generated_rows", type=int, default=generated_rows, help="training rows to generate")
    return parser


def defaults_of(add_arguments: Callable[[argparse.ArgumentParser], None]) -> dict[str, Any]:
    """The `ARGUMENTS` of a program, from its command line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args([]))


def run_example(
    name: str,
    args: argparse.Namespace,
    own: Sequence[str],
    *,
    generate: Callable[[argparse.Namespace], dict[str, Any]],
    known: Sequence[str],
    evaluates_training_files: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json.

    Args:     name: of the program's module.  own: names of the arguments that its `build` has.
              generate: writes files where there are none, below args.generated_dir; returns what is known of them.
              known: names of that, for the summary.
              evaluates_training_files: where there are no others.
    """
    _check(args)
    use_threads(args.num_threads)
    with Bar(saves_in_background=args.save_in_background) as bar:
        planted: dict[str, Any] = {}
        if args.data_paths is None:
            planted = _generated(args, generate, bar)
            args.data_paths, args.eval_paths = f"{args.generated_dir}/train", f"{args.generated_dir}/eval"
        only_training_files = evaluates_training_files and args.eval_paths is None
        return train_from(
            args,
            name,
            paths=args.data_paths,
            held_out=args.data_paths if only_training_files else args.eval_paths,
            arguments={name: getattr(args, name) for name in own},
            bar=bar,
            known={name: planted.get(name) for name in known},
        )


def _generated(
    args: argparse.Namespace, generate: Callable[[argparse.Namespace], dict[str, Any]], bar: Bar
) -> dict[str, Any]:
    """What is known of the generated files, which rank 0 writes where there are none."""
    how = {"streams": args.virtual_shards, "deterministic": args.deterministic, "device": args.device}
    resume = args.resume or is_restarted(args.output_dir)
    group, planted = join_ranks(args.output_dir, **how, resume=resume), {}
    with together(group):
        if group.is_first:
            bar.write(f"no --data_paths: using generated data in {args.generated_dir}")
            with bar.phase("generating"):
                planted = generate(args)
            for name in (name for name in planted if name.startswith("best_") and not name.endswith("loss")):
                what = name.removeprefix("best_").replace("_", " ").replace("auc", "AUC")
                bar.write(f"best possible {what} on the held-out rows: {planted[name]:.4f}")
    return group.from_first(planted)


def _check(args: argparse.Namespace) -> None:
    check_options(args)
    if args.eval_paths is not None and args.data_paths is None:
        raise ValueError(
            f"eval_paths: got {args.eval_paths} without data_paths, expected both or neither. Generated clicks have "
            "separate held-out files."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, expected cpu. torch finds no CUDA device here.")
    if args.device == "cuda" and args.save_in_background:
        raise ValueError("save_in_background: got true on cuda, expected false. A forked child cannot read a GPU.")
