"""The training step of one rank of several: its operators as counts, and what it exchanges. `python -m graphs.rank`

It is traced with torch's fake process group, which sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from graphs.dataflow import is_op, is_view, short, tensors
from graphs.render import BATCH_SIZE, EXAMPLES, FOLDER
from recfx.capture import trace
from recfx.dist import Group

__all__ = ["EXCHANGES", "FILE", "WORLD_SIZE", "captured", "ops_text"]

FILE, WORLD_SIZE = "deepfm_rank.ops.txt", 8
EXCHANGES = ("all_to_all_single", "all_reduce", "all_gather_into_tensor")
MEANINGS = ("ids, and what ranks agree about", "rows", "dense gradients and small numbers", "row gradients")


def captured() -> torch.fx.GraphModule:
    """The graph of rank 0 of WORLD_SIZE, for a batch of BATCH_SIZE samples on each rank."""
    with _fake_group() as group:
        module, batch = EXAMPLES["deepfm"].module, EXAMPLES["deepfm"].batch()
        step, state = module.build_step(module.parse(["--gradient_accumulation_steps=1"]), group=group)
        step.ids_in(batch)  # sets the capacities
        return trace(step.in_graph_, state, batch)


def ops_text() -> str:
    """The file."""
    ops = [n for n in captured().graph.nodes if is_op(n)]
    counts = Counter(str(n.target) for n in ops)
    num_views = sum(map(is_view, ops))
    lines = [
        f"# DeepFM, one training step of one of {WORLD_SIZE} ranks: the ATen graph of Step.in_graph_.",
        f"# batch:  {BATCH_SIZE} samples of each rank, {EXAMPLES['deepfm'].columns} with room for one value per sample",
        "",
        f"{len(ops) - num_views} ops and {num_views} views",
        "",
        "exchanges, in their order, and the bytes of each that a rank sends or reduces",
    ]
    exchanges = [n for n in ops if n.target._opname in EXCHANGES]
    for node, meaning in zip(exchanges, MEANINGS, strict=True):
        (sent,) = tensors(node.args[0])
        num_bytes = sent.numel() * sent.element_size()
        lines.append(f"{num_bytes:>8}  {node.target._opname} {short(sent)}: {meaning}")
    lines += ["", "custom ops"] + [f"{counts[op]:>6}  {op}" for op in sorted(counts) if op.startswith("recfx.")]
    lines += ["", "ops"] + [f"{counts[op]:>6}  {op}" for op in sorted(counts) if not op.startswith("recfx.")]
    return "\n".join(lines) + "\n"


@contextmanager
def _fake_group() -> Iterator[Group]:
    distributed.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    try:
        world = distributed.group.WORLD
        yield Group(rank=0, world_size=WORLD_SIZE, streams=WORLD_SIZE, deterministic=False, exchange=world)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    (FOLDER / FILE).write_text(ops_text())
