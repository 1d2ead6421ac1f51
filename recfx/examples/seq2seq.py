"""Trains a causal transformer on sequences of items: `python -m recfx.examples.seq2seq`.

Position t predicts item t + 1, which it never sees, among the items of the batch. Without --data_paths it first writes,
once, sequences with a planted rule. After training it ranks all items for the last place of each held-out sequence:
hit_rate_1 is how often the right one is first, best_hit_rate how often the rule is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recfx import features as ops
from recfx import rows
from recfx.data import Column, Reader, reader, varlen
from recfx.dist import current
from recfx.embeddings import Embedding, normal
from recfx.examples.behaviour_data import item_sequences
from recfx.examples.frame import defaults_of, parser_of, run_example
from recfx.losses import in_batch_softmax
from recfx.metrics import Metric, retrieval_metrics
from recfx.models import sasrec
from recfx.optim import adamw, sparse_adamw
from recfx.program import Program, restore
from recfx.program.summary import run_program, write_summary
from recfx.ragged import last
from recfx.step import Step, Task, TrainState, train_step
from recfx.types import Params

__all__ = ["ARGUMENTS", "build", "features", "forward", "main", "next_item_loss", "parse", "read", "run"]

NAME = "recfx.examples.seq2seq"

COLUMNS: list[Column] = [varlen("items", torch.int64)]
LENGTH, DIM, TEMPERATURE = 20, 32, 0.3
CONTRAST = in_batch_softmax(item="next", temperature=TEMPERATURE)


def features(batch: dict) -> dict[str, Any]:
    """The last LENGTH items of each sequence, and what follows each of them."""
    items = ops.truncate(batch["items"], LENGTH, side="left")
    following = ops.to_dense(items, LENGTH)[:, 1:]
    has_next = torch.arange(1, LENGTH, device=following.device) < items.offsets.diff()[:, None]
    return {"items": items, "next": following, "has_next": has_next}


def forward(params: Params, emb: dict[str, Any], feats: dict, context: Any) -> dict[str, Tensor]:
    """query f32 [B, T, D]: what position t knows; item f32 [B, T, D]: the row of the item that follows it."""
    encoded, _ = sasrec.encode(params, emb["items"], context, dropout=0.1)
    following, _ = last(emb["items"], LENGTH)
    return {"query": encoded[:, :-1], "item": following[:, 1:]}


def positions(output: dict[str, Tensor], feats: dict, valid: Tensor) -> tuple[dict[str, Tensor], dict, Tensor]:
    """Every position as a sample: output [B T, D], features [B T, 1], and which are there, bool [B T, 1]."""
    flat = {name: t.flatten(0, 1) for name, t in output.items()}
    return flat, {"next": feats["next"].reshape(-1, 1)}, (valid & feats["has_next"]).reshape(-1, 1)


def next_item_loss(output: dict[str, Tensor], feats: dict, valid: Tensor) -> Tensor:
    """The mean loss of a sequence's positions, f32 [B, 1]."""
    losses = CONTRAST(*positions(output, feats, valid)).view(feats["next"].shape)
    return losses.sum(1, keepdim=True) / feats["has_next"].sum(1, keepdim=True).clamp(min=1)


def metrics() -> Metric:
    """Hit rates among the items of the batch, counted by position."""
    of_samples = retrieval_metrics(item="next")

    def update_(counts: Any, output: dict[str, Tensor], feats: dict, loss: Tensor, valid: Tensor) -> Any:
        flat = positions(output, feats, valid)
        return of_samples.update_(counts, flat[0], flat[1], loss.expand(feats["next"].shape).reshape(-1, 1), flat[2])

    return of_samples._replace(update_=update_)


def build(args: Any) -> Program:
    """The program, see `recfx.program`."""
    step = train_step(
        features=features,
        embeddings={"items": [Embedding("items", dim=DIM, combiner=None, init=normal(0.1), device=args.device)]},
        forward=forward,
        tasks=Task(batch_loss=next_item_loss, metrics=metrics()),
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
    config = sasrec.SASRecConfig(dim=DIM, length=LENGTH, hidden=2 * DIM)
    params = sasrec.init(config, torch.Generator().manual_seed(args.seed))
    return step.init({name: p.to(args.device) for name, p in params.items()})


def read(args: Any, paths: Any, *, drop_remainder: bool) -> Reader:
    """A reader over the files."""
    return reader(paths, COLUMNS, args.batch_size, drop_remainder=drop_remainder, shuffle_rows=10_000, seed=args.seed)


def hit_rate(output_dir: str, paths: Any, *, most: int = 10_000) -> float:
    """How often the item with the highest score, of all that were trained, is the last one of its sequence.

    Args:     most: sequences that are ranked.
    """
    program, state = restore(output_dir)
    table, hits, num = "items/items", 0, 0
    ids = torch.cat([part["id"] for part in _all_rows(program.step, state, table)])
    known = rows.read(program.step, state, table, ids)
    for batch in program.reader(paths, "evaluate"):
        if num >= most:
            break
        feats = program.step.read(batch)
        query = program.step.predict(state, batch)["query"]
        at = feats["has_next"].sum(1) - 1
        real = torch.arange(len(at)) < batch["num_samples"]
        of_last = query[torch.arange(len(at)), at.clamp(min=0)]
        best = ids[(of_last @ known.weight.T).argmax(1)]
        right = best == feats["next"][torch.arange(len(at)), at.clamp(min=0)]
        counted = real & (at >= 0)
        hits, num = hits + int((right & counted).sum()), num + int(counted.sum())
    return hits / num if num else float("nan")


def _all_rows(step: Step, state: TrainState, table: str) -> list[dict[str, Tensor]]:
    return [{"id": torch.from_numpy(b.column("id").to_numpy().copy())} for b in rows.batches(step, state, table)]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the program's arguments."""
    add = parser.add_argument
    add("--batch_size", type=int, default=64, help="sequences per micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimiser step")
    add("--sparse_lr", type=float, default=3e-3, help="learning rate of the embedding rows")
    add("--dense_lr", type=float, default=3e-3, help="learning rate of the dense parameters")
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
        output_dir="./ckpt-seq2seq",
        log_steps=50,
        generated_dir="./demo/seq2seq",
        generated_rows=40_000,
        evaluated="the generated ones, or the training files",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates, saves; returns the summary that is also written to <output_dir>/summary.json."""
    own, known = list(ARGUMENTS), ("best_hit_rate",)
    summary = run_example(NAME, args, own, generate=_generate, known=known, evaluates_training_files=True)
    if current() is None:  # a rank has the rows that it owns alone
        held_out = args.eval_paths or args.data_paths
        summary = {"hit_rate": hit_rate(args.output_dir, held_out), **summary}
        write_summary(args.output_dir, summary)
    return summary


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    return item_sequences(args.generated_dir, rows=args.generated_rows, seed=args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m recfx.examples.seq2seq`."""
    run_program(run, parse(argv))


if __name__ == "__main__":
    main()
