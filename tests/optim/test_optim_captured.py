"""Everything an embedding can be told, in one captured step: as uncompiled, and as pure functions."""

import math
import random

import torch

from recfx import optim
from recfx.capture import capture
from recfx.embeddings import Embedding, normal, tile, xavier_uniform
from recfx.optim import schedules
from recfx.step import train_step
from recfx.types import pack
from tests.reference import ragged
from tests.table.test_combiners import FEATURES, logit, random_feature

GROUPS = {
    "emb": [
        Embedding("a", dim=4, init=xavier_uniform(), combiner="mean", lr_scale=0.5),
        Embedding("b", dim=4, init=normal(0.1), combiner=tile(2), shared_name="x"),
        Embedding("c", dim=4, init=normal(0.1), combiner="sqrtn", shared_name="x", read_only=True),
    ],
    "bias": [Embedding("a", dim=1, weight_decay=0.3), Embedding("dense", dim=1, frozen=True)],
}


def batches(num):
    rng, g = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(num):
        columns = {f: random_feature(rng, f == "a", 5) for f in FEATURES}
        columns["dense"] = torch.randint(0, 9, (5, 2), generator=g)
        yield pack({"label": torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]]), **columns})


def test_one_captured_step_with_everything():
    lr = schedules.warm_up(schedules.cosine(0.2, 10), 3)
    step = train_step(
        features=dict,
        embeddings=GROUPS,
        forward=logit,
        sparse_optimizer=optim.sparse_clip_row_norm(
            optim.sparse_clip_value(optim.sparse_rowwise_adagrad(lr), 0.4), 0.5
        ),
        dense_optimizer=optim.clip_value(optim.adagrad(lr), 0.3),
        clip=optim.clip_global_norm(0.6),
        max_rows=64,
    )
    every = list(batches(5))
    a, b, c = (step.init({"w": torch.ones(1)}) for _ in range(3))
    run = capture(step, a, every[0])
    run(step.init({"w": torch.ones(1)}), every[0])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in every:
        a, aux = run(a, batch)
        b, expected = step.update_(b, batch)
        c, pure = step.update(c, batch)
        torch.testing.assert_close(aux.logit, expected.logit, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pure.logit, expected.logit, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled  # whatever the schedules say
    for one, two, three in zip(a.tables, b.tables, c.tables, strict=True):
        num_rows = int(one.num_rows)
        assert num_rows == int(two.num_rows) == int(three.num_rows) > 0
        torch.testing.assert_close(one.rows[:num_rows], two.rows[:num_rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(three.rows[:num_rows], two.rows[:num_rows], rtol=1e-5, atol=1e-6)
        assert not one.rows[:num_rows].isnan().any()
    torch.testing.assert_close(a.params["w"], b.params["w"])
    assert not math.isclose(float(a.params["w"]), 1.0)


def test_row_wise_adagrad_takes_a_float_per_row_where_adagrad_takes_one_per_weight():
    def bytes_per_row(optimizer, dim):
        step = train_step(
            features=dict,
            embeddings={"emb": [Embedding("a", dim=dim)]},
            forward=logit,
            sparse_optimizer=optimizer,
            dense_optimizer=optim.sgd(0.1),
            max_rows=64,
        )
        state = step.init({"w": torch.ones(1)})
        step.update_(state, pack({"label": torch.ones(1, 1), "a": ragged([[7]])}))
        return state.tables[0].rows.stride(0) * 4

    used = [
        bytes_per_row(build(0.1), 63)
        for build in (optim.sparse_sgd, optim.sparse_rowwise_adagrad, optim.sparse_adagrad, optim.sparse_adamw)
    ]
    assert used == [256, 256, 512, 768]
