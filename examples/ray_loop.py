"""Ranks as Ray tasks: two processes share the tables of one model.

pip install ray; python examples/ray_loop.py
"""

import os
import socket

import ray
import torch

from recfx.capture import capture
from recfx.data import fixedlen, from_arrays, varlen
from recfx.dist import join, leave
from recfx.dist.streams import deal
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step

COLUMNS = [fixedlen("label", [0.0]), varlen("user", torch.int64), varlen("item", torch.int64)]
RANKS = 2


def clicks(number):
    """A user clicks on items of the same parity."""
    user, item = torch.randint(0, 100, (2, number), generator=torch.Generator().manual_seed(0))
    return {"label": (user % 2 == item % 2).float().numpy(), "user": user.numpy(), "item": item.numpy()}


@ray.remote(num_cpus=1)
def train(rank, port):
    """One rank: what torchrun puts into the environment, then a loop as in one process."""
    where = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = join()
    step = train_step(
        features=dict,
        embeddings={"emb": [Embedding("user", dim=8), Embedding("item", dim=8)]},
        forward=lambda params, emb, feats: emb["emb"].prod(1).sum(1, keepdim=True) + params["bias"],
        sparse_optimizer=sparse_adamw(lr=3e-2),
        dense_optimizer=adamw(lr=3e-2),
        group=group,
    )
    batches = deal(from_arrays(clicks(20_000), COLUMNS, 500), group)
    state = step.init({"bias": torch.zeros(1)})
    run = capture(step, state, batches.first(), backend="eager")
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            state, aux = run(state, batch)
    found = float(aux.loss), int(state.tables[0].num_rows)
    leave()
    return found


def main():
    """Starts the ranks and prints what each of them holds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=RANKS, include_dashboard=False, log_to_driver=False)
    try:
        for rank, (loss, num_rows) in enumerate(ray.get([train.remote(rank, port) for rank in range(RANKS)])):
            print(f"rank {rank}: loss {loss:.3f}, {num_rows} rows")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
