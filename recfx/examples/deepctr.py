"""Trains a model of long sequences, strings and crossed features: `python -m recfx.examples.deepctr`.

Every kind of feature once: dense columns of 8 numbers with defaults, the same bucketised into one shared table, ids
modulo a number, a cross, and two lists of up to 2000 (clicked items; words as strings) of which the last 1000 count.
Without --data_paths it first writes, once, Parquet files whose labels come from a planted model.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recfx import features as ops
from recfx.data import Column, OneOf, Reader, fixedlen, reader, varlen
from recfx.embeddings import Embedding, tile
from recfx.examples.deepctr_data import LONGEST, NUM_DENSE, generate
from recfx.examples.frame import defaults_of, parser_of, run_example
from recfx.layers import init_linear, mlp
from recfx.optim import adamw, sparse_adamw
from recfx.program import Program
from recfx.program.summary import run_program
from recfx.step import Step, TrainState, train_step
from recfx.types import COUNTS, Params

__all__ = ["ARGUMENTS", "build", "build_step", "features", "forward", "main", "parse", "read", "run"]

NAME = "recfx.examples.deepctr"

COLUMNS: list[Column] = [
    fixedlen("label", [0.0], valid=OneOf(0, 1)),
    fixedlen("dense1", [0.0] * NUM_DENSE),
    fixedlen("dense2", [1.0] * NUM_DENSE),
    *(varlen(name, torch.int64) for name in ("item", "category", "city", "clicks")),
    varlen("words", torch.uint8),
]
KEPT, RECENT, NUM_BUCKETS = 1000, 8, 1_000_003
BOUNDARIES = [0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]
DIM, HIDDEN = 8, (64, 32)


def features(batch: dict) -> dict[str, Any]:
    """What the model reads of a batch. An ordinary function: traced into the step as it is."""
    items = ops.mod({name: batch[name] for name in ("item", "clicks")}, NUM_BUCKETS)
    words = ops.mod(ops.farm_hash(batch["words"]), NUM_BUCKETS)
    sequences = ops.truncate({"clicks": items["clicks"], "words": words}, KEPT, side="left")
    crossed, overflow = ops.cross(batch["city"], batch["category"], capacity=batch["label"].shape[0])
    return {
        "label": batch["label"],
        "dense": ops.standardize(ops.log1p(torch.cat([batch["dense1"], batch["dense2"]], dim=1)), 1.3, 0.7),
        "bucket1": ops.bucketize(batch["dense1"], BOUNDARIES),
        "bucket2": ops.bucketize(batch["dense2"], BOUNDARIES),
        "item": items["item"],
        **sequences,
        "recent": ops.truncate(sequences["clicks"], RECENT, side="left"),
        "city": batch["city"],
        "category": batch["category"],
        "city_category": crossed,
        COUNTS: {
            "crossed_without_room": overflow,
            "long_clicks": ops.check_length(batch["clicks"], LONGEST, "clicks"),
            "long_words": ops.check_length(words, LONGEST, "words"),
        },
    }


def embeddings(device: str) -> dict[str, list[Embedding]]:
    """What is looked up, in tables on `device`."""
    on = partial(Embedding, dim=DIM, device=device)
    return {
        "emb": [
            on("item", shared_name="item"),
            on("clicks", shared_name="item", combiner="mean"),
            on("words", combiner="mean"),
            on("bucket1", shared_name="bucket", combiner="mean"),
            on("bucket2", shared_name="bucket", combiner="mean"),
            *(on(name) for name in ("city", "category", "city_category")),
        ],
        "recent": [on("recent", shared_name="item", combiner=tile(RECENT))],
    }


def forward(params: Params, emb: dict[str, Tensor], feats: dict) -> Tensor:
    """An MLP over dense numbers, pooled embeddings, the tiled last clicks, and item times history and words."""
    item, clicks, words = emb["emb"][:, :3].unbind(1)
    parts = [feats["dense"], emb["emb"].flatten(1), emb["recent"].flatten(1), item * clicks, item * words]
    return mlp(params, "dnn", torch.cat(parts, dim=1), num_hidden=len(HIDDEN))


def build(args: Any) -> Program:
    """The program, see `recfx.program`."""
    step = make_step(args)
    return Program(
        step=step,
        init=lambda: first_state(step, args),
        columns=COLUMNS,
        reader=lambda paths, use: read(args, paths, drop_remainder=use == "train"),
    )


def build_step(args: Any) -> tuple[Step, TrainState]:
    """The step and its first state."""
    step = make_step(args)
    return step, first_state(step, args)


def make_step(args: Any) -> Step:
    """The whole training program as one step."""
    return train_step(
        features=features,
        embeddings=embeddings(args.device),
        forward=forward,
        sparse_optimizer=sparse_adamw(args.sparse_lr),
        dense_optimizer=adamw(args.dense_lr),
        accumulation=args.gradient_accumulation_steps,
        max_rows=args.max_rows,
        seed=args.seed,
        precision=args.precision,
    )


def first_state(step: Step, args: Any) -> TrainState:
    """The state before training: parameters of the seed, empty tables."""
    generator = torch.Generator().manual_seed(args.seed)
    num_in = 2 * NUM_DENSE + (len(embeddings(args.device)["emb"]) + RECENT + 2) * DIM
    params: Params = {}
    for i, (n, m) in enumerate(itertools.pairwise([num_in, *HIDDEN, 1])):
        params[f"dnn.{i}.weight"], params[f"dnn.{i}.bias"] = init_linear(n, m, generator)
    return step.init({name: p.to(args.device) for name, p in params.items()})


def read(args: Any, paths: Any, *, drop_remainder: bool) -> Reader:
    """A reader over the files."""
    return reader(paths, COLUMNS, args.batch_size, drop_remainder=drop_remainder, shuffle_rows=10_000, seed=args.seed)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the program's arguments."""
    add = parser.add_argument
    add("--batch_size", type=int, default=500, help="samples per micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimiser step")
    add("--sparse_lr", type=float, default=1e-2, help="learning rate of the embedding rows")
    add("--dense_lr", type=float, default=3e-3, help="learning rate of the dense parameters")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of products of matrices")
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
        output_dir="./ckpt-deepctr",
        log_steps=20,
        generated_dir="./demo/deepctr",
        generated_rows=100_000,
        evaluated="the generated ones, or the training files",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json."""
    own = list(ARGUMENTS)
    return run_example(NAME, args, own, generate=_generate, known=("best_auc",), evaluates_training_files=True)


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    return generate(args.generated_dir, rows=args.generated_rows, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m recfx.examples.deepctr`."""
    run_program(run, parse(argv))


if __name__ == "__main__":
    main()
