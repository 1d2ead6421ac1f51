"""DeepFM trained by a loop written by hand around the captured step.

python examples/own_loop.py
"""

import torch

from recfx import features as ops
from recfx.capture import capture
from recfx.embeddings import Embedding
from recfx.models import deepfm
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.train import check_finite
from recfx.types import Ragged, pack

CATEGORICAL = ["user", "item"]


def features(batch):
    """A pure function of the batch, traced into the step."""
    return {
        "label": batch["label"],
        "numeric": ops.log1p(ops.select_dense(batch["price"])),
        **{name: ops.select_ragged(batch[name]) for name in CATEGORICAL},
    }


step = train_step(
    features=features,
    embeddings={
        "emb": [Embedding(name, dim=8) for name in CATEGORICAL],
        "bias": [Embedding(name, dim=1) for name in CATEGORICAL],
    },
    forward=deepfm.forward,
    sparse_optimizer=sparse_adamw(lr=3e-3),
    dense_optimizer=adamw(lr=3e-3),
)
config = deepfm.DeepFMConfig(num_numeric=1, num_sparse=2)
state = step.init(deepfm.init(config, torch.Generator().manual_seed(0)))


def batches(number, size):
    """Each list holds one id here; lists may have any length. Ids are any 64-bit integers and are not remapped."""
    random = torch.Generator().manual_seed(1)
    offsets = torch.arange(size + 1, dtype=torch.int32)
    for _ in range(number):
        ids = {name: torch.randint(0, 200, (size,), generator=random) * 2**40 for name in CATEGORICAL}
        label = (ids["user"] // 2**40 % 2 == ids["item"] // 2**40 % 2).float()[:, None]
        price = torch.rand(size, generator=random)
        columns = {name: Ragged(id, offsets) for name, id in ids.items()}
        yield pack({"label": label, "price": Ragged(price, offsets), **columns})


first = next(batches(1, 256))
run = capture(step, state, first)  # compiles now; `run = step.update_` trains the same, uncompiled
for number, batch in enumerate(batches(400, 256), start=1):
    state, aux = run(state, batch)  # writes into the state passed in: use the one that comes back
    if number % 100 == 0:
        check_finite(step, state)  # raises if a step since the last call met NaN or infinity
        print(f"step {number}  loss {float(aux.loss):.4f}  rows {int(state.tables[0].num_rows)}")
