"""Trains DeepFM on click logs in ORC files: `python -m recfx.examples.deepfm --data_paths=./data/`.

Without --data_paths it first writes, once, a click log of the same shape whose labels come from a planted model, so
that the AUC reached can be held against the best one possible.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from recfx import features as ops
from recfx.checks import check_int
from recfx.commands.train import flag
from recfx.data import Column, OneOf, Reader, fixedlen, reader, varlen
from recfx.dist import Group
from recfx.embeddings import Embedding, truncated_normal
from recfx.examples.criteo_synthetic import generate
from recfx.examples.frame import defaults_of, parser_of, run_example
from recfx.models import deepfm
from recfx.optim import SparseOptimizer, adamw, sparse_adamw
from recfx.program import Program
from recfx.program.summary import run_program
from recfx.step import Step, TrainState, train_step

__all__ = ["ARGUMENTS", "build", "build_step", "main", "parse", "read", "run"]

NAME = "recfx.examples.deepfm"

NUMERIC = [f"i{i}" for i in range(1, 14)]
CATEGORICAL = [f"c{i}" for i in range(1, 27)]
COLUMNS: list[Column] = [
    fixedlen("label", [0.0], valid=OneOf(0, 1)),
    *(varlen(name, torch.float32) for name in NUMERIC),
    *(varlen(name, torch.int64) for name in CATEGORICAL),
]
EMBEDDING_DIM, HIDDEN = 8, (64, 16)
NUM_GENERATED_FILES = 10


def log1p_features(batch: dict) -> dict[str, Any]:
    """Numerics as log(1 + max(x, 0)), a missing one 0; categories as they are."""
    feats = raw_features(batch)
    return {**feats, "numeric": ops.log1p(feats["numeric"])}


def raw_features(batch: dict) -> dict[str, Any]:
    """Numerics as they are, as the seed's example has them: ill-conditioned, logits reach a million."""
    numeric_BN = torch.cat([ops.select_dense(batch[name]) for name in NUMERIC], dim=1)
    return {
        "label": batch["label"],
        "numeric": numeric_BN,
        **{name: ops.select_ragged(batch[name]) for name in CATEGORICAL},
    }


def build(args: Any) -> Program:
    """The program, see `recfx.program`."""
    step = make_step(args)
    return Program(
        step=step,
        init=lambda: first_state(step, args),
        columns=COLUMNS,
        reader=lambda paths, use: read(args, paths, drop_remainder=use == "train" and args.drop_remainder),
    )


def build_step(
    args: Any, *, sparse_optimizer: SparseOptimizer | None = None, group: Group | None = None
) -> tuple[Step, TrainState]:
    """The step and its first state. Another sparse optimiser, and a group of ranks, may be put in."""
    step = make_step(args, sparse_optimizer=sparse_optimizer, group=group)
    return step, first_state(step, args)


def make_step(args: Any, *, sparse_optimizer: SparseOptimizer | None = None, group: Group | None = None) -> Step:
    """The whole training program as one step."""

    def embeddings(dim: int) -> list[Embedding]:
        init = truncated_normal(0.001)
        return [Embedding(name, dim=dim, combiner="sum", init=init, device=args.device) for name in CATEGORICAL]

    return train_step(
        features=log1p_features if args.numeric == "log1p" else raw_features,
        embeddings={"emb": embeddings(EMBEDDING_DIM), "bias": embeddings(1)},
        forward=deepfm.forward,
        sparse_optimizer=sparse_optimizer or sparse_adamw(args.sparse_lr, weight_decay=0.01),
        dense_optimizer=adamw(args.dense_lr, weight_decay=0.01),
        accumulation=args.gradient_accumulation_steps,
        max_rows=args.max_rows,
        seed=args.seed,
        precision=args.precision,
        on_nonfinite=args.on_nonfinite,
        group=group,
    )


def first_state(step: Step, args: Any) -> TrainState:
    """The state before training: parameters of the seed, empty tables."""
    config = deepfm.DeepFMConfig(num_numeric=13, num_sparse=26, dim=EMBEDDING_DIM, hidden=HIDDEN)
    params = deepfm.init(config, torch.Generator().manual_seed(args.seed))
    return step.init({name: p.to(args.device) for name, p in params.items()})


def read(args: Any, paths: Any, *, drop_remainder: bool) -> Reader:
    """A reader over the files."""
    return reader(
        paths,
        COLUMNS,
        args.batch_size,
        drop_remainder=drop_remainder,
        threads=args.thread_num,
        prefetch=args.prefetch,
        cache=args.cache_dir,
        pin_memory=args.device == "cuda",
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the program's arguments: the seed system's names, where it has them."""
    add = parser.add_argument
    add("--batch_size", type=int, default=1000, help="samples per micro-batch")
    add("--thread_num", type=int, default=1, help="units of files (ORC stripes, Parquet row groups) decoded at once")
    add("--prefetch", type=int, default=1, help="units decoded ahead per thread; 0: decode while the step waits")
    add("--cache_dir", help="keeps decoded rows there, 400 bytes each, for later epochs and runs; None: nowhere")
    add("--drop_remainder", type=flag, default=True, help="leave out the last rows that do not fill a batch")
    add("--gradient_accumulation_steps", type=int, default=4, help="micro-batches per optimiser step")
    add("--sparse_lr", type=float, default=1e-3, help="learning rate of the embedding rows")
    add("--dense_lr", type=float, default=1e-3, help="learning rate of the dense parameters")
    add("--seed", type=int, default=42, help="of initial weights, and of generated data")
    add("--on_nonfinite", choices=["stop", "skip", "ignore"], default="stop", help="where a loss, logit or gradient is "
        "NaN or infinite: end with an error, leave the batch out, or go on")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the step runs, tables included")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of products of matrices; tf32: on cuda")
    add("--max_rows", type=int, default=2**26, help="most embedding rows; on cuda their memory is taken at once")
    add("--numeric", choices=["log1p", "raw"], default="log1p", help="log(1 + max(x, 0)), or the seed's own raw inputs")


ARGUMENTS = defaults_of(_add_arguments)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: the program's arguments, and those of training."""
    parser = parser_of(
        NAME,
        __doc__,
        _add_arguments,
        output_dir="./ckpt",
        log_steps=10,
        generated_dir="./demo/data",
        generated_rows=2_000_000,
        evaluated="no evaluation, or the generated ones",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json."""
    check_int("generated_rows", args.generated_rows, NUM_GENERATED_FILES)
    return run_example(NAME, args, list(ARGUMENTS), generate=_generate, known=("best_auc", "numeric_lr_auc"))


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    rows_per_file = args.generated_rows // NUM_GENERATED_FILES
    parts = {"train_files": NUM_GENERATED_FILES, "eval_files": 1}
    return generate(args.generated_dir, rows_per_file=rows_per_file, **parts, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m recfx.examples.deepfm`."""
    run_program(run, parse(argv))


if __name__ == "__main__":
    main()
