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
from recfx.capture import capture, capture_evaluation, capture_steps
from recfx.checks import check_int
from recfx.data import Column, OneOf, Reader, fixedlen, reader, varlen
from recfx.embeddings import Embedding, truncated_normal
from recfx.examples.bar import Bar
from recfx.examples.criteo_synthetic import generate
from recfx.examples.environment import check_one_process, use_threads
from recfx.examples.summary import run_program, summary_of, write_summary
from recfx.models import deepfm
from recfx.optim import SparseOptimizer, adamw, sparse_adamw
from recfx.step import Step, TrainState, train_step
from recfx.train import TrainConfig, check_output, evaluate, train

__all__ = ["build_step", "main", "parse", "read", "run"]

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


def build_step(args: argparse.Namespace, *, sparse_optimizer: SparseOptimizer | None = None) -> tuple[Step, TrainState]:
    """The whole training program as one step, and its first state. Another sparse optimiser may be put in."""

    def embeddings(dim: int) -> list[Embedding]:
        init = truncated_normal(0.001)
        return [Embedding(name, dim=dim, combiner="sum", init=init, device=args.device) for name in CATEGORICAL]

    step = train_step(
        features=log1p_features if args.numeric == "log1p" else raw_features,
        embeddings={"emb": embeddings(EMBEDDING_DIM), "bias": embeddings(1)},
        forward=lambda params, emb, feats: deepfm.forward(params, emb, feats["numeric"]),
        sparse_optimizer=sparse_optimizer or sparse_adamw(args.sparse_lr, weight_decay=0.01),
        dense_optimizer=adamw(args.dense_lr, weight_decay=0.01),
        accumulation=args.gradient_accumulation_steps,
        max_rows=args.max_rows,
        seed=args.seed,
        precision=args.precision,
        on_nonfinite=args.on_nonfinite,
    )
    config = deepfm.DeepFMConfig(num_numeric=13, num_sparse=26, dim=EMBEDDING_DIM, hidden=HIDDEN)
    params = deepfm.init(config, torch.Generator().manual_seed(args.seed))
    return step, step.init({name: p.to(args.device) for name, p in params.items()})


def read(args: argparse.Namespace, paths: str, *, drop_remainder: bool) -> Reader:
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json."""
    _check(args)
    use_threads(args.num_threads)
    with Bar(saves_in_background=args.save_in_background) as bar:
        planted = _generated(args, bar) if args.data_paths is None else {}
        config = TrainConfig(
            output_dir=args.output_dir,
            log_steps=args.log_steps,
            save_steps=args.save_steps,
            train_steps=args.train_steps,
            train_epoch=args.train_epoch,
            max_to_keep=args.max_to_keep,
            full_save_every=args.full_save_every,
            save_in_background=args.save_in_background,
        )
        batches = read(args, args.data_paths, drop_remainder=args.drop_remainder)
        held_out = None if args.eval_paths is None else read(args, args.eval_paths, drop_remainder=False)
        step, state = build_step(args)
        with bar.phase("reading"):
            first = batches.first()
            if held_out is not None:
                held_out.first()  # where there is none, better said now than after an epoch
        check_output(config, resume=args.resume, overwrite=args.overwrite)
        many, evaluate_with = args.steps_per_replay, None
        with bar.phase("compiling"):
            if held_out is not None:
                evaluation = capture_evaluation(step, state, first)

                def evaluate_with(state: TrainState) -> dict[str, float]:
                    return evaluate(evaluation, state, held_out, eval_steps=args.eval_steps)

            captured = (
                capture(step, state, first) if many == 1 else capture_steps(step, state, first, steps_per_replay=many)
            )
        bar.watch(captured)
        state, progress = train(
            step,
            captured,
            state,
            batches,
            config,
            steps_per_replay=many,
            resume=args.resume,
            overwrite=args.overwrite,
            evaluate_with=evaluate_with,
            on_event=bar.on_event,
        )
    known = {name: planted.get(name) for name in ("best_auc", "numeric_lr_auc")}
    summary = summary_of(progress, state, known)
    write_summary(args.output_dir, summary)
    return summary


def _generated(args: argparse.Namespace, bar: Bar) -> dict[str, Any]:
    """Writes the generated files where there are none, and gives the arguments their paths."""
    bar.write(f"no --data_paths: using generated click logs in {args.generated_dir}")
    with bar.phase("generating"):
        planted = generate(
            args.generated_dir,
            rows_per_file=args.generated_rows // NUM_GENERATED_FILES,
            train_files=NUM_GENERATED_FILES,
            eval_files=1,
            seed=args.seed,
        )
    args.data_paths, args.eval_paths = f"{args.generated_dir}/train", f"{args.generated_dir}/eval"
    bar.write(f"best possible AUC on the held-out rows: {planted['best_auc']:.4f}")
    return planted


def _check(args: argparse.Namespace) -> None:
    """What nothing that is called first would name by its argument."""
    check_one_process()
    for name, least in (("num_threads", 1), ("eval_steps", 1), ("generated_rows", NUM_GENERATED_FILES)):
        value = getattr(args, name)
        if value is not None:
            check_int(name, value, least)
    if args.eval_paths is not None and args.data_paths is None:
        raise ValueError(
            f"eval_paths: got {args.eval_paths} without data_paths, expected both or neither. Generated clicks have "
            "held-out files of their own."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, expected cpu. torch finds no CUDA device here.")
    if args.device == "cuda" and args.save_in_background:
        raise ValueError("save_in_background: got true on cuda, expected false. A forked child cannot read a GPU.")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The seed system's argument names, where it has them."""
    parser = argparse.ArgumentParser(
        prog="python -m recfx.examples.deepfm",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_paths", help="files, folders, globs or URIs to train on, with commas between; None: generated ones")
    add("--eval_paths", help="held-out files, evaluated after every epoch; None: no evaluation, or the generated ones")
    add("--batch_size", type=int, default=1000, help="samples per micro-batch")
    add("--thread_num", type=int, default=1, help="units of files (ORC stripes, Parquet row groups) decoded at once")
    add("--prefetch", type=int, default=1, help="units decoded ahead per thread; 0: decode while the step waits")
    add("--cache_dir", help="keeps decoded rows there, 400 bytes each, for later epochs and runs; None: nowhere")
    add("--drop_remainder", type=_flag, default=True, help="leave out the last rows that do not fill a batch")
    add("--gradient_accumulation_steps", type=int, default=4, help="micro-batches per optimiser step")
    add("--output_dir", default="./ckpt", help="checkpoints and summary.json")
    add("--log_steps", type=int, default=10, help="optimiser steps between log lines")
    add("--save_steps", type=int, default=2000, help="optimiser steps between checkpoints; one more at the end")
    add("--eval_steps", type=int, default=None, help="batches per evaluation; None: all")
    add("--max_to_keep", type=int, default=5, help="checkpoints kept")
    add(
        "--full_save_every",
        type=int,
        default=1,
        help="of so many checkpoints one is full, the others hold what changed",
    )
    add("--save_in_background", type=_flag, nargs="?", const=True, default=False, help="train on while saving")
    add("--train_steps", type=int, default=None, help="stop after so many more optimiser steps; None: after the data")
    add("--train_epoch", type=int, default=1, help="passes over the data")
    add("--sparse_lr", type=float, default=1e-3, help="learning rate of the embedding rows")
    add("--dense_lr", type=float, default=1e-3, help="learning rate of the dense parameters")
    add("--seed", type=int, default=42, help="of initial weights, and of generated data")
    add(
        "--resume",
        type=_flag,
        nargs="?",
        const=True,
        default=False,
        help="go on from the newest checkpoint in output_dir, with the rest of its data or with other data",
    )
    add("--overwrite", type=_flag, nargs="?", const=True, default=False, help="delete the checkpoints in output_dir")
    add(
        "--on_nonfinite",
        choices=["stop", "skip", "ignore"],
        default="stop",
        help="where a loss, logit or gradient is NaN or infinite: end with an error, leave the batch out, or go on",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the step runs, tables included")
    add("--steps_per_replay", type=int, default=1, help="on a GPU, micro-batches per CUDA graph launch; unmeasured")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of products of matrices; tf32: on cuda")
    add("--max_rows", type=int, default=2**26, help="most embedding rows; on cuda their memory is taken at once")
    add("--numeric", choices=["log1p", "raw"], default="log1p", help="log(1 + max(x, 0)), or the seed's own raw inputs")
    add(
        "--num_threads",
        type=int,
        default=None,
        help="threads of the step; None: torch's number, or the CPU quota",
    )
    add("--generated_dir", default="./demo/data", help="where generated files are kept")
    add("--generated_rows", type=int, default=2_000_000, help="training rows to generate, in 10 files")
    return parser.parse_args(argv)


def _flag(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got '{word}', expected true or false")
    return word.lower() == "true"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m recfx.examples.deepfm`."""
    run_program(run, parse(argv))


if __name__ == "__main__":
    main()
