"""The functions of lists of rows, beside a loop over the samples; eager, traced and compiled; their gradients."""

import itertools

import pytest
import torch

from recfx.capture import capture
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_sgd
from recfx.ragged import last, segment_softmax, segment_sum, spread
from recfx.step import train_step
from recfx.types import Ragged, pack

LENGTHS = [3, 0, 1, 6, 0, 2]
PADDING = 4


def rows_of(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return torch.randn(int(offsets[-1]) + PADDING, *shape, generator=g), offsets


def lists(values, offsets):
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def pad(t, like):
    return torch.cat([t, like.new_zeros(len(like) - len(t), *t.shape[1:])])


def looped_sum(values, offsets):
    return torch.stack([one.sum(0) for one in lists(values, offsets)])


def looped_spread(x, offsets, num):
    return pad(torch.cat([x[i].expand(n, *x.shape[1:]) for i, n in enumerate(LENGTHS)]), x.new_zeros(num, *x.shape[1:]))


def looped_softmax(scores, offsets):
    return pad(torch.cat([one.softmax(0) for one in lists(scores, offsets)]), scores)


def looped_last(values, offsets, n):
    out = values.new_zeros(len(LENGTHS), n, *values.shape[1:])
    return torch.stack([pad(one[-n:], out[0]) for one in lists(values, offsets)])


PAIRS = {
    "sum": (lambda v, x, o: segment_sum(v, o), lambda v, x, o: looped_sum(v, o)),
    "softmax": (lambda v, x, o: segment_softmax(v, o), lambda v, x, o: looped_softmax(v, o)),
    "spread": (lambda v, x, o: spread(x, o, len(v)), lambda v, x, o: looped_spread(x, o, len(v))),
    "last": (lambda v, x, o: last(Ragged(v, o), 4)[0], lambda v, x, o: looped_last(v, o, 4)),
    "attention": (
        lambda v, x, o: segment_sum(segment_softmax(v * spread(x, o, len(v)), o) * v, o),
        lambda v, x, o: looped_sum(looped_softmax(v * looped_spread(x, o, len(v)), o) * v, o),
    ),
}


def value_and_grads(function):
    def weighted(v, x, o):
        out = function(v, x, o)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()

    return torch.func.grad_and_value(weighted, argnums=(0, 1))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_a_loop(name, shape):
    values, offsets = rows_of(*shape)
    per_sample = torch.randn(len(LENGTHS), *shape, generator=torch.Generator().manual_seed(1))
    ours, looped = PAIRS[name]
    grads, value = value_and_grads(ours)(values, per_sample, offsets)
    expected_grads, expected = value_and_grads(looped)(values, per_sample, offsets)
    torch.testing.assert_close(ours(values, per_sample, offsets), looped(values, per_sample, offsets))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("name", PAIRS)
def test_values_after_the_last_list_do_not_matter(name):
    values, offsets = rows_of(2)
    per_sample, dirty = torch.ones(len(LENGTHS), 2), values.clone()
    dirty[-PADDING:] = torch.nan
    ours = value_and_grads(PAIRS[name][0])
    for grads in (ours(dirty, per_sample, offsets), ours(values, per_sample, offsets)):
        assert not bool(grads[0][0][-PADDING:].any())
    torch.testing.assert_close(ours(dirty, per_sample, offsets), ours(values, per_sample, offsets))


def test_compiled_attention_is_the_eager_one():
    def forward(params, emb, feats):
        rows = emb["history"]
        return PAIRS["attention"][0](rows.values, emb["item"][:, 0], rows.offsets).sum(1, keepdim=True) + params["b"]

    step = train_step(
        features=dict,
        embeddings={
            "item": [Embedding("item", dim=4, shared_name="items")],
            "history": [Embedding("history", dim=4, shared_name="items", combiner=None)],
        },
        forward=forward,
        sparse_optimizer=sparse_sgd(1.0),
        dense_optimizer=adamw(1e-2),
        max_rows=64,
    )
    ids, offsets = torch.randint(0, 9, (sum(LENGTHS) + PADDING,)), rows_of()[1]
    item = torch.arange(len(LENGTHS))[:, None]
    batch = pack({"label": torch.ones(len(LENGTHS), 1), "item": item, "history": Ragged(ids, offsets)})
    eager, compiled = (step.init({"b": torch.zeros(1)}) for _ in range(2))
    run = capture(step, compiled, batch)
    for _ in range(3):
        eager, expected = step.update_(eager, batch)
        compiled, aux = run(compiled, batch)
        torch.testing.assert_close(aux.logit, expected.logit)
    num = int(eager.tables[0].num_rows)
    torch.testing.assert_close(compiled.tables[0].rows[:num], eager.tables[0].rows[:num])


def test_no_lists_and_no_values():
    offsets = torch.zeros(3, dtype=torch.int32)
    assert segment_sum(torch.zeros(0, 2), offsets).tolist() == [[0, 0], [0, 0]]
    assert segment_softmax(torch.zeros(0), offsets).tolist() == []
    assert last(Ragged(torch.zeros(0, 2), offsets), 3)[0].shape == (2, 3, 2)
    assert segment_softmax(torch.full((2,), -torch.inf), torch.tensor([0, 2]).int()).tolist() == [0, 0]
