"""Trains clicks and purchases together: `python -m recfx.examples.multitask`.

The model is ESMM, which learns purchases from all impressions, or MMoE or PLE with a logit for each. Without
--data_paths it first writes, once, impressions whose best possible AUCs are known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from recfx.data import Column, OneOf, Reader, fixedlen, reader, varlen
from recfx.embeddings import Embedding, normal
from recfx.examples.behaviour_data import clicks_and_purchases
from recfx.examples.frame import defaults_of, parser_of, run_example
from recfx.models import esmm, mmoe, ple
from recfx.optim import adamw, sparse_adamw
from recfx.program import Program
from recfx.program.summary import run_program
from recfx.step import Step, Task, TrainState, train_step

__all__ = ["ARGUMENTS", "build", "main", "parse", "read", "run"]

NAME = "recfx.examples.multitask"

LABELS, IDS = ("click", "buy"), ("user", "item", "price")
COLUMNS: list[Column] = [
    *(fixedlen(name, [0.0], valid=OneOf(0, 1)) for name in LABELS),
    *(varlen(name, torch.int64) for name in IDS),
]
DIM = 8
MODELS: dict[str, Any] = {
    "esmm": (esmm, esmm.ESMMConfig(num_sparse=len(IDS), dim=DIM)),
    "mmoe": (mmoe, mmoe.MMoEConfig(num_sparse=len(IDS), dim=DIM, tasks=LABELS)),
    "ple": (ple, ple.PLEConfig(num_sparse=len(IDS), dim=DIM, tasks=LABELS)),
}


def build(args: Any) -> Program:
    """The program, see `recfx.program`."""
    model, _ = MODELS[args.model]
    step = train_step(
        features=dict,
        embeddings={"emb": [Embedding(name, dim=DIM, init=normal(0.05), device=args.device) for name in IDS]},
        forward=model.forward,
        tasks={name: Task(label=name) for name in LABELS},
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
    model, config = MODELS[args.model]
    params = model.init(config, torch.Generator().manual_seed(args.seed))
    return step.init({name: p.to(args.device) for name, p in params.items()})


def read(args: Any, paths: Any, *, drop_remainder: bool) -> Reader:
    """A reader over the files."""
    return reader(paths, COLUMNS, args.batch_size, drop_remainder=drop_remainder, shuffle_rows=10_000, seed=args.seed)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the program's arguments."""
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="esmm", help="of recfx.models")
    add("--batch_size", type=int, default=512, help="samples per micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimiser step")
    add("--sparse_lr", type=float, default=3e-2, help="learning rate of the embedding rows")
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
        output_dir="./ckpt-multitask",
        log_steps=50,
        generated_dir="./demo/multitask",
        generated_rows=400_000,
        evaluated="the generated ones, or the training files",
    )
    parser.set_defaults(train_epoch=4)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json."""
    own, known = list(ARGUMENTS), ("best_click_auc", "best_buy_auc")
    return run_example(NAME, args, own, generate=_generate, known=known, evaluates_training_files=True)


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    return clicks_and_purchases(args.generated_dir, rows=args.generated_rows, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m recfx.examples.multitask`."""
    run_program(run, parse(argv))


if __name__ == "__main__":
    main()
