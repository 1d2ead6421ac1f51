"""Trains DIN on clicks with histories: `python -m recfx.examples.din`.

The history of a user is a list of clicked items of any length; its rows stay a list, and the item in question decides
how much each of them counts. Item and history share a table. Without --data_paths it first writes, once, clicks whose
best possible AUC is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from recfx.data import Column, OneOf, Reader, fixedlen, reader, varlen
from recfx.embeddings import Embedding, normal
from recfx.examples.behaviour_data import LONGEST, clicks_with_history
from recfx.examples.frame import defaults_of, parser_of, run_example
from recfx.models import din
from recfx.optim import adamw, sparse_adamw
from recfx.program import Program
from recfx.program.summary import run_program
from recfx.step import Step, TrainState, train_step

__all__ = ["ARGUMENTS", "build", "main", "parse", "read", "run"]

NAME = "recfx.examples.din"

COLUMNS: list[Column] = [
    fixedlen("label", [0.0], valid=OneOf(0, 1)),
    varlen("item", torch.int64),
    varlen("history", torch.int64, truncate=LONGEST, side="left"),
]
DIM = 16


def build(args: Any) -> Program:
    """The program, see `recfx.program`."""
    on = partial(Embedding, dim=DIM, shared_name="items", init=normal(0.05), device=args.device)
    step = train_step(
        features=dict,
        embeddings={"target": [on("item")], "history": [on("history", combiner=None)]},
        forward=din.forward,
        sparse_optimizer=sparse_adamw(args.sparse_lr),
        dense_optimizer=adamw(args.dense_lr),
        accumulation=args.gradient_accumulation_steps,
        max_rows=args.max_rows,
        seed=args.seed,
    )
    return Program(
        step=step,
        init=lambda: first_state(step, args),
        columns=COLUMNS,
        reader=lambda paths, use: read(args, paths, drop_remainder=use == "train"),
    )


def first_state(step: Step, args: Any) -> TrainState:
    """The state before training: parameters of the seed, empty tables."""
    config = din.DINConfig(dim=DIM, attention=16, activation="dice", hidden=(32, 16))
    params, stats = din.init(config, torch.Generator().manual_seed(args.seed))
    return step.init({name: p.to(args.device) for name, p in params.items()}, stats=stats)


def read(args: Any, paths: Any, *, drop_remainder: bool) -> Reader:
    """A reader over the files."""
    return reader(paths, COLUMNS, args.batch_size, drop_remainder=drop_remainder, shuffle_rows=10_000, seed=args.seed)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the program's arguments."""
    add = parser.add_argument
    add("--batch_size", type=int, default=256, help="samples per micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimiser step")
    add("--sparse_lr", type=float, default=2e-2, help="learning rate of the embedding rows")
    add("--dense_lr", type=float, default=5e-3, help="learning rate of the dense parameters")
    add("--seed", type=int, default=42, help="of initial weights, and of generated data")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the step runs, tables included")
    add("--max_rows", type=int, default=2**26, help="most rows of a table; on cuda their memory is taken at once")


ARGUMENTS = defaults_of(_add_arguments)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: the program's arguments, and those of training."""
    parser = parser_of(
        NAME,
        __doc__,
        _add_arguments,
        output_dir="./ckpt-din",
        log_steps=50,
        generated_dir="./demo/din",
        generated_rows=200_000,
        evaluated="the generated ones, or the training files",
    )
    parser.set_defaults(train_epoch=4)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json."""
    own = list(ARGUMENTS)
    return run_example(NAME, args, own, generate=_generate, known=("best_auc",), evaluates_training_files=True)


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    return clicks_with_history(args.generated_dir, rows=args.generated_rows, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m recfx.examples.din`."""
    run_program(run, parse(argv))


if __name__ == "__main__":
    main()
