"""The fourth argument of forward: random numbers that a resumed run draws again, the real samples, statistics."""

import functools
import random
import re

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from recfx import checkpoint, optim
from recfx.capture import capture, capture_evaluation, capture_prediction
from recfx.context import Context, with_context
from recfx.embeddings import Embedding
from recfx.step import train_step
from recfx.train import TrainConfig, evaluate, train
from recfx.types import Ragged, pack
from tests.loop import MemoryReader

WIDTH = 8


def context(step=1, sample=(0, 1, 2), seed=0, training=True):
    valid = torch.ones(len(sample), 1, dtype=torch.bool)
    numbers = {"step": torch.tensor(step), "sample": torch.tensor(sample)}
    return Context(training=training, valid=valid, stats={}, seed=seed, **numbers)


def test_random_numbers_are_a_function_of_seed_step_sample_and_name():
    here = context().uniform("a", WIDTH)
    assert torch.equal(here, context().uniform("a", WIDTH))
    assert torch.equal(here[1:], context(sample=(1, 2)).uniform("a", WIDTH))
    others = context(step=2).uniform("a", WIDTH), context(seed=1).uniform("a", WIDTH), context().uniform("b", WIDTH)
    for other in others:
        assert not (other == here).any()
    assert len(here.unique()) == here.numel()
    assert context().uniform("a", 2, 4).shape == (3, 2, 4)
    assert torch.equal(context().uniform("a", 2, 4).flatten(1), here)


def test_random_numbers_are_uniform_and_normal():
    many = context(sample=tuple(range(4000)))
    u, n = many.uniform("u", 25), many.normal("n", 25)
    assert 0 <= float(u.min()) < float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 45  # chi-squared, 19 degrees: 0.1 % lie above 43.8
    assert n.isfinite().all()
    assert abs(float(n.mean())) < 0.02
    assert abs(float(n.std()) - 1) < 0.02
    for lag in (1, 2):  # neither along a sample nor from one to the next
        for a, b in ((u[:, lag:], u[:, :-lag]), (u[lag:], u[:-lag])):
            assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


def test_dropout():
    x = torch.ones(4000, 5)
    kept = context(sample=tuple(range(4000))).dropout(x, 0.25, "hidden")
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(float(kept.mean()) - 1) < 0.02
    assert context(sample=tuple(range(4000)), training=False).dropout(x, 0.25, "hidden") is x
    with pytest.raises(ValueError, match=r"p: got 1, expected 0 <= p < 1"):
        context().dropout(x, 1, "hidden")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, WIDTH), (6, WIDTH), ()])
def test_dropout_of_another_first_axis_is_an_error(shape, training):
    """One row would be broadcast to a matrix in training, and stay a row in evaluation."""
    with pytest.raises(ValueError, match=rf"x: got {re.escape(str(list(shape)))}, expected \[3, ...\], a row for each"):
        context(training=training).dropout(torch.ones(shape), 0.5, "hidden")


# Which functions are given it.


class Model(torch.nn.Module):
    def forward(self, params, emb, feats, context):
        return context


class WithDefault(torch.nn.Module):
    def forward(self, params, emb, feats, context=None):
        return context


class Call:
    def __call__(self, params, emb, feats, ctx=None):
        return ctx


def wrapped(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


GIVEN = {
    "plain": lambda params, emb, feats, anything: anything,
    "default": lambda params, emb, feats, context=None: context,
    "short name": lambda params, emb, feats, ctx=None: ctx,
    "module": Model(),
    "module with a default": WithDefault(),
    "object": Call(),
    "method": Model().forward,
    "partial": functools.partial(lambda scale, params, emb, feats, context=None: context, 2.0),
    "wrapped": wrapped(lambda params, emb, feats, context: context),
}
NOT_GIVEN = {
    "three": lambda params, emb, feats: None,
    "another default": lambda params, emb, feats, temperature=None: temperature,
    "default before others": lambda params, emb, feats, temperature=None, *others: temperature,
    "a wrapper without wraps": lambda *args: (lambda params, emb, feats: None)(*args),
    "names only": lambda params, emb, feats, **others: others.get("context"),
    "wrapped": wrapped(lambda params, emb, feats: None),
    "partial": functools.partial(lambda params, emb, feats, ctx: ctx, ctx=None),
    "written in C": zip,  # has no signature
}


@pytest.mark.parametrize("which", GIVEN)
def test_a_context_is_given_to(which):
    make(GIVEN[which])
    here = context()
    assert with_context(GIVEN[which])({}, {}, {}, here)[0] is here


@pytest.mark.parametrize("which", NOT_GIVEN)
def test_a_context_is_not_given_to(which):
    make(NOT_GIVEN[which])
    result, _ = with_context(NOT_GIVEN[which])({}, {}, {}, context())
    assert result is None or list(result) == []


@pytest.mark.parametrize(
    "forward",
    [lambda params, emb, feats, *, context=None: None, lambda params, emb, feats, temperature=1.0, ctx=None: None],
)
def test_a_parameter_that_would_never_be_given_the_context_is_an_error(forward):
    with pytest.raises(
        TypeError, match=r"forward: got \(params, .*, expected '(context|ctx)' as the fourth positional"
    ):
        make(forward)


def test_a_module_trains_with_dropout():
    class Dropping(torch.nn.Module):
        def forward(self, params, emb, feats, context):
            return with_dropout(params, emb, feats, context)

    a, b = make(Dropping()), make()
    same(a.update_(init(a), batch(0, 4))[0], b.update_(init(b), batch(0, 4))[0], **EXACT)


# In a step.


def with_dropout(params, emb, feats, context):
    hidden = context.dropout(params["w"].expand(len(feats["label"]), WIDTH), 0.5, "hidden")
    return hidden.sum(1, keepdim=True) + emb["e"].sum((1, 2))[:, None]


def with_torch_dropout(params, emb, feats):
    hidden = functional.dropout(params["w"].expand(len(feats["label"]), WIDTH), 0.5)
    return hidden.sum(1, keepdim=True) + emb["e"].sum((1, 2))[:, None]


def with_mean(params, emb, feats, context):
    """A running mean of the logits of valid samples, taken away from them."""
    raw = emb["e"].sum((1, 2))[:, None] + params["w"].sum()
    mean = torch.where(context.valid, raw, 0).sum() / context.valid.sum()
    used = mean if context.training else context.stats["mean"]
    return raw - used, {"mean": 0.9 * context.stats["mean"] + 0.1 * mean}


def make(forward=with_dropout, **kwargs):
    arguments = {
        "features": dict, "embeddings": {"e": [Embedding("item", dim=2)]}, "forward": forward,
        "sparse_optimizer": optim.sparse_adamw(1e-2), "dense_optimizer": optim.adamw(1e-2), "max_rows": 64,
    }  # fmt: skip
    return train_step(**arguments | kwargs)


def init(step, **kwargs):
    return step.init({"w": torch.ones(WIDTH)}, **kwargs)


def batch(first, num, capacity=None):
    items = Ragged(torch.arange(first, first + num) % 11, torch.arange(num + 1, dtype=torch.int32))
    packed = pack({"label": (torch.arange(first, first + num) % 2).float()[:, None], "item": items})
    if capacity is None:
        return packed
    return pack(dict(packed), layout=batch(0, capacity).layout)


def same(a, b, **tolerance):
    for x, y in zip(tree_leaves((a.params, a.stats, a.dense)), tree_leaves((b.params, b.stats, b.dense)), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


EXACT = {"rtol": 0, "atol": 0}


def test_a_step_draws_the_same_however_it_is_cut_into_micro_batches():
    one, many = make(), make(accumulation=3)
    a, b = init(one), init(many)
    for first in (0, 9, 18):
        a, _ = one.update_(a, batch(first, 9))
        for start, num in ((0, 4), (4, 2), (6, 3)):
            b, _ = many.update_(b, batch(first + start, num, capacity=4))
    same(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("forward", "backend"),
    [
        (with_dropout, None), (with_torch_dropout, "eager"), (with_mean, None),
        *(
            pytest.param(forward, backend, marks=pytest.mark.slow)
            for forward in (with_dropout, with_torch_dropout, with_mean)
            for backend in ("eager", "inductor")
        ),
    ],
)  # fmt: skip
def test_resumed_is_never_having_stopped(tmp_path, forward, backend):
    stats = {"mean": torch.zeros(())} if forward is with_mean else {}

    def go(folder, resume=False, stop=None):
        torch.manual_seed(3)  # what a script does first
        step = make(forward)
        state = init(step, stats={name: t.clone() for name, t in stats.items()})
        run = step.update_ if backend is None else capture(step, state, batch(0, 4), backend=backend)
        config = TrainConfig(output_dir=str(folder), train_steps=stop, save_steps=3)
        reader = MemoryReader([batch(i, 4) for i in range(10)])
        held_out = [batch(i, 4) for i in range(3)]
        evaluate_with = lambda state: evaluate(step.evaluate_, state, held_out)  # noqa: E731
        return train(step, run, state, reader, config, resume=resume, evaluate_with=evaluate_with)[0]

    whole = go(tmp_path / "a")
    go(tmp_path / "b", stop=5)
    resumed = go(tmp_path / "b", resume=True)
    same(whole, resumed, **EXACT)
    last = [checkpoint.latest(tmp_path / name) for name in "ab"]
    assert [p.name for p in last] == ["step-000000010"] * 2
    assert checkpoint.diff(*last) == []


def test_torch_draws_the_same_in_a_graph_as_without():
    step = make(with_torch_dropout)
    a, b = init(step), init(step)
    run = capture(step, b, batch(0, 4), backend="eager")
    for state, function in ((a, step.update_), (b, run)):
        torch.manual_seed(1)
        for i in range(3):
            state, _ = function(state, batch(i, 4))
    same(a, b, rtol=1e-6, atol=1e-7)


def test_the_states_of_the_generators_are_saved_only_where_a_step_draws(tmp_path):
    for name, forward in (("with", with_torch_dropout), ("without", with_dropout)):
        step = make(forward)
        state, _ = step.update_(init(step), batch(0, 4))
        path = checkpoint.save(tmp_path / name, step, state, number=1, loop={})
        assert (b"generator.cpu" in (path / "state.safetensors").read_bytes()) == (name == "with")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_evaluation_and_prediction_are_not_training(backend):
    step = make()
    state = init(step)
    logit = torch.full((4, 1), float(WIDTH))
    assert torch.equal(step.predict(state, batch(0, 4)), logit)
    assert torch.equal(step.evaluate_(state, batch(0, 4))[1].logit, logit)
    assert torch.equal(capture_prediction(step, state, batch(0, 4), backend=backend)(state, batch(0, 4)), logit)
    run = capture_evaluation(step, state, batch(0, 4), backend=backend)
    assert torch.equal(run(state, batch(0, 4))[1].logit, logit)
    assert not torch.equal(step.update_(state, batch(0, 4))[1].logit, logit)


# Statistics.


def test_statistics_are_kept_by_training_alone(tmp_path):
    step = make(with_mean)
    state = init(step, stats={"mean": torch.tensor(2.0)})
    state, _ = step.update_(state, batch(0, 4))
    assert float(state.stats["mean"]) == pytest.approx(0.9 * 2 + 0.1 * WIDTH, abs=1e-3)
    kept = state.stats["mean"].clone()
    raw = float(step.predict(state, batch(0, 1))) + float(kept)
    assert raw == pytest.approx(float(state.params["w"].sum()), abs=0.1)
    step.evaluate_(state, batch(0, 4))
    assert torch.equal(state.stats["mean"], kept)
    path = checkpoint.save(tmp_path, step, state, number=1, loop={})
    loaded, _ = checkpoint.load(path, step, init(step, stats={"mean": torch.zeros(())}))
    assert torch.equal(loaded.stats["mean"], kept)
    with pytest.raises(ValueError, match=r"no tensor 'stats.other' of shape \[\]"):
        checkpoint.load(path, step, init(step, stats={"other": torch.zeros(())}))


def test_padding_is_not_in_the_statistics():
    step = make(with_mean)
    padded, exact = (init(step, stats={"mean": torch.zeros(())}) for _ in range(2))
    padded, _ = step.update_(padded, batch(0, 3, capacity=8))
    exact, _ = step.update_(exact, batch(0, 3))
    assert torch.equal(padded.stats["mean"], exact.stats["mean"])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            lambda logit: (logit, {}),
            ValueError,
            r"forward: got stats without \['mean'\], expected \['mean'\], the",
        ),
        (
            lambda logit: (logit, {"Mean": logit}),
            ValueError,
            r"got stats without \['mean'\] and with \['Mean'\], expected \['mean'\]",
        ),
        (
            lambda logit: (logit, {"mean": logit}),
            ValueError,
            r"forward: got \[4, 1\] for stats 'mean', expected \[\], .* keeps its shape",
        ),
        (
            lambda logit: (logit, {"mean": logit.mean().double()}),
            ValueError,
            r"forward: got torch.float64 for stats 'mean', expected torch.float32, .* keeps its dtype. Return",
        ),
        (lambda logit: (logit, {"mean": 0.5}), TypeError, r"forward: stats 'mean': got 0.5, expected torch.Tensor"),
        (lambda logit: (logit, {"mean": logit}, 1), TypeError, r"forward: got a tuple \(Tensor, dict, int\), expected"),
    ],
)
def test_statistics_that_cannot_be_kept_are_an_error(returned, error, message):
    step = make(lambda params, emb, feats: returned(emb["e"].sum((1, 2))[:, None] + params["w"].sum()))
    with pytest.raises(error, match=message):
        step.update_(init(step, stats={"mean": torch.zeros(())}), batch(0, 4))


def test_a_mean_of_bf16_products_says_what_to_do():
    def with_products(mean):
        def forward(params, emb, feats, context):
            raw = emb["e"].flatten(1) @ params["w"].reshape(2, -1)
            return raw.sum(1, keepdim=True), {"mean": mean(raw)}

        return make(forward, precision="bf16")

    step = with_products(lambda raw: raw.mean(0))
    with pytest.raises(ValueError, match=r"got torch.bfloat16 for stats 'mean', .*Under precision=.*\.float\(\)"):
        step.update_(init(step, stats={"mean": torch.zeros(4)}), batch(0, 4))
    step = with_products(lambda raw: raw.float().mean(0))
    state, _ = step.update_(init(step, stats={"mean": torch.zeros(4)}), batch(0, 4))
    assert state.stats["mean"].dtype == torch.float32


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"m": 0.0}, r"stats 'm': got 0.0, expected torch.Tensor. Use torch.tensor"),
        ({"fc": {"mean": torch.zeros(2)}}, r"stats 'fc': got a dict of \['mean'\], expected .*Flatten it: 'fc.mean'"),
        ([torch.zeros(2)], r"stats: got a list of torch.Tensor, expected a dict. They are tensors by name"),
        ([], r"stats: got a list of nothing, expected a dict"),
        ({1: torch.zeros(2)}, r"stats: got 1, expected str"),
    ],
)
def test_statistics_that_are_not_tensors_by_name_are_an_error(stats, message):
    with pytest.raises(TypeError, match=message):
        init(make(), stats=stats)


def test_statistics_on_another_device_are_an_error():
    with pytest.raises(ValueError, match=r"stats 'm': got a tensor on meta, expected cpu, as the parameters.* Move it"):
        init(make(), stats={"m": torch.zeros(2, device="meta")})


def test_a_state_has_a_copy_of_the_statistics():
    step = make(with_mean)
    given = {"mean": torch.zeros((), requires_grad=True)}
    one, other = init(step, stats=given), init(step, stats=given)
    one, _ = step.update_(one, batch(0, 4))
    assert float(one.stats["mean"]) > 0
    assert float(other.stats["mean"]) == given["mean"].item() == 0
    expanded = torch.zeros(1).expand(3)
    pair = init(make(), stats={"a": expanded, "b": expanded}).stats
    pair["a"][0] = 1
    assert (pair["a"].tolist(), pair["b"].tolist()) == ([1, 0, 0], [0, 0, 0])
    assert not one.stats["mean"].requires_grad


def test_a_model_without_dense_parameters_trains(tmp_path):
    step = make(lambda params, emb, feats: emb["e"].sum((1, 2))[:, None], clip=optim.clip_global_norm(1.0))
    state = step.init({})
    losses = []
    for _ in range(30):
        state, aux = step.update_(state, batch(0, 8))
        losses.append(float(aux.loss))
    assert losses[-1] < losses[0] - 0.05
    path = checkpoint.save(tmp_path, step, state, number=30, loop={})
    loaded, _ = checkpoint.load(path, step, step.init({}))
    assert (int(loaded.step), int(loaded.dense.step)) == (30, 30)
    run = capture(step, state, batch(0, 8), backend="eager")
    assert float(run(state, batch(0, 8))[1].loss) < losses[-1]


# What a graph would freeze.


GENERATOR = torch.Generator()
DRAWS = {
    "Python": lambda: random.random(),
    "numpy": lambda: float(np.random.rand()),
    "own generator": lambda: torch.rand(1, generator=GENERATOR),
}


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_numbers_that_a_graph_would_repeat_are_an_error(how, backend):
    step = make(lambda params, emb, feats: emb["e"].sum((1, 2))[:, None] + params["w"].sum() * DRAWS[how]())
    state = init(step)
    before = random.getstate()
    with pytest.raises((ValueError, RuntimeError), match=None if backend == "inductor" else "forward: got numbers"):
        capture(step, state, batch(0, 4), backend=backend)
    assert random.getstate() == before
