"""Every CTR model beside its plain module: logits, gradients, in a step, compiled."""

from functools import partial

import pytest
import torch

from recfx.capture import capture
from recfx.context import Context
from recfx.embeddings import Embedding, normal
from recfx.models import autoint, dcnv2, deepfm, dlrm, finalmlp, finalnet, fm, fwfm, lr, masknet, wide_deep
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.types import Ragged, pack
from tests.models import references as refs

B, F, N, D = 7, 4, 3, 5
SIZES = {"num_sparse": F, "dim": D}
MODELS = {
    "lr": (lr, lr.LRConfig, {}, refs.LR),
    "fm": (fm, fm.FMConfig, {"dim": D}, refs.FM),
    "fwfm": (fwfm, fwfm.FwFMConfig, SIZES, refs.FwFM),
    "wide_deep": (wide_deep, wide_deep.WideDeepConfig, {**SIZES, "hidden": (6, 4)}, refs.WideDeep),
    "deepfm": (deepfm, deepfm.DeepFMConfig, {**SIZES, "hidden": (6, 4)}, refs.DeepFM),
    "dcnv2": (dcnv2, dcnv2.DCNv2Config, {**SIZES, "hidden": (6, 4)}, refs.DCNv2),
    "dcnv2_norm": (dcnv2, dcnv2.DCNv2Config, {**SIZES, "hidden": (6, 4), "norm": "layer"}, refs.DCNv2),
    "dcnv2_mix": (dcnv2, dcnv2.DCNv2Config, {**SIZES, "rank": 3, "experts": 2, "hidden": ()}, refs.DCNv2),
    "dlrm": (dlrm, dlrm.DLRMConfig, {**SIZES, "bottom": (6,), "top": (8, 4)}, refs.DLRM),
    "autoint": (autoint, autoint.AutoIntConfig, SIZES, refs.AutoInt),
    "autoint_deep": (autoint, autoint.AutoIntConfig, {**SIZES, "hidden": (6,)}, refs.AutoInt),
    "masknet": (masknet, masknet.MaskNetConfig, {**SIZES, "width": 6, "hidden": (4,)}, refs.MaskNet),
    "masknet_serial": (masknet, masknet.MaskNetConfig, {**SIZES, "width": 6, "parallel": False}, refs.MaskNet),
    "finalmlp": (finalmlp, finalmlp.FinalMLPConfig, {**SIZES, "first": (6, 4), "second": (5, 8)}, refs.FinalMLP),
    "finalmlp_open": (
        finalmlp,
        finalmlp.FinalMLPConfig,
        {**SIZES, "first": (4,), "second": (4,), "gate": 0},
        refs.FinalMLP,
    ),
    "finalnet": (finalnet, finalnet.FinalNetConfig, {**SIZES, "blocks": ((6, 4), (5,))}, refs.FinalNet),
    "finalnet_one": (finalnet, finalnet.FinalNetConfig, {**SIZES, "blocks": ((6, 4),), "norm": None}, refs.FinalNet),
}


def config_of(name, num_numeric):
    _, config, sizes, _ = MODELS[name]
    return config(num_numeric=num_numeric, **sizes)


def case(name, num_numeric, *, dtype=torch.float64, seed=0):
    """Parameters that are not near zero, and inputs."""
    g = torch.Generator().manual_seed(seed)
    params = MODELS[name][0].init(config_of(name, num_numeric), g)
    params = {k: (p + 0.2 * torch.randn(p.shape, generator=g)).to(dtype) for k, p in params.items()}
    emb = {
        "emb": torch.randn(B, F, D, generator=g, dtype=dtype),
        "bias": torch.randn(B, F, 1, generator=g, dtype=dtype),
    }
    numeric = {"numeric": torch.randn(B, num_numeric, generator=g, dtype=dtype)} if num_numeric else {}
    return params, emb, numeric


@pytest.mark.parametrize("num_numeric", [0, N])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_plain_module(name, num_numeric):
    params, emb, feats = case(name, num_numeric)
    leaves = {k: t.clone().requires_grad_() for k, t in emb.items()}
    module, _, _, reference = MODELS[name]
    plain = reference(params)
    scale = torch.linspace(-1, 1, B, dtype=torch.float64)[:, None]

    def loss(params, emb):
        logit = module.forward(params, emb, feats)
        assert logit.shape == (B, 1)
        return (logit * scale).sum(), logit

    (of_params, of_emb), logit = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(params, emb)
    expected = plain(leaves, feats)
    torch.testing.assert_close(logit, expected, rtol=1e-9, atol=1e-10)
    (expected * scale).sum().backward()
    for key, grad in plain.grads().items():
        torch.testing.assert_close(
            of_params[key], torch.zeros_like(params[key]) if grad is None else grad, rtol=1e-8, atol=1e-9
        )
    for key, leaf in leaves.items():
        torch.testing.assert_close(
            of_emb[key], torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, rtol=1e-8, atol=1e-9
        )
    single = [{k: t.float() for k, t in part.items()} for part in (params, emb, feats)]
    torch.testing.assert_close(module.forward(*single).double(), logit, rtol=1e-5, atol=1e-4)


def batch_of(seed=0, *, real=B, garbage=0.0):
    g = torch.Generator().manual_seed(seed)
    numeric = torch.randn(B, N, generator=g)
    numeric[real:] = garbage
    ids = {
        f"c{i}": Ragged.from_lists([[int(j)] for j in torch.randint(0, 6, (real,), generator=g)] + [[]] * (B - real))
        for i in range(F)
    }
    label = torch.randint(0, 2, (B, 1), generator=g).float()
    return pack({"label": label, "numeric": numeric, **ids, "num_samples": torch.tensor(real, dtype=torch.int32)})


def step_of(name, *, forward=None, **changed):
    module, config, sizes, _ = MODELS[name]
    made = module.init(config(num_numeric=N, **{**sizes, **changed}), torch.Generator().manual_seed(1))
    params, stats = made if isinstance(made, tuple) else (made, {})
    names = [f"c{i}" for i in range(F)]
    step = train_step(
        features=dict,
        embeddings={
            "emb": [Embedding(c, dim=D, init=normal(0.1)) for c in names],
            "bias": [Embedding(c, dim=1, init=normal(0.1)) for c in names],
        },
        forward=forward or module.forward,
        sparse_optimizer=sparse_adamw(1e-2),
        dense_optimizer=adamw(1e-2),
        max_rows=64,
    )
    return step, lambda: step.init({k: p.clone() for k, p in params.items()}, stats=stats)


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_step_is_the_step_and_padding_does_not_matter(name):
    step, init = step_of(name)
    one, other, dirty = init(), init(), init()
    run = capture(step, other, batch_of(), backend="eager")
    for seed in range(3):
        real = B if seed else 4
        batch = batch_of(seed, real=real)
        one, aux = step.update_(one, batch)
        other, traced = run(other, batch)
        dirty, _ = step.update_(dirty, batch_of(seed, real=real, garbage=3.0))
        torch.testing.assert_close(traced.logit, aux.logit, rtol=0, atol=0)
    for key, p in one.params.items():
        torch.testing.assert_close(other.params[key], p, rtol=0, atol=0)
        torch.testing.assert_close(dirty.params[key], p, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(p, init().params[key]) for key, p in one.params.items())


@pytest.mark.parametrize("name", ["dcnv2", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "dcnv2")])
def test_a_compiled_step_is_the_step(name):
    step, init = step_of(name)
    one, other = init(), init()
    run = capture(step, other, batch_of())
    for seed in range(3):
        one, aux = step.update_(one, batch_of(seed))
        other, compiled = run(other, batch_of(seed))
        torch.testing.assert_close(compiled.logit, aux.logit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wide_deep", "dcnv2", "autoint_deep", "finalmlp", "finalnet"])
def test_batch_norm_is_that_of_torch_and_dropout_is_of_training(name):
    """Its first hidden layer sees the real samples alone; in evaluation, what training kept."""
    module = MODELS[name][0]
    step, init = step_of(name, norm="batch", forward=partial(module.forward, dropout=0.5))
    state = init()
    kept = {k: t.clone() for k, t in state.stats.items()}
    state, _ = step.update_(state, batch_of(0, real=5, garbage=100.0))
    assert kept
    assert all(bool(t.isfinite().all()) and not torch.equal(t, kept[k]) for k, t in state.stats.items())
    assert max(float(t.abs().max()) for t in state.stats.values()) < 10
    assert torch.equal(step.predict(state, batch_of(3)), step.predict(state, batch_of(3)))
    steps = [step.update(state, batch_of(3))[1].logit for _ in range(2)]
    assert torch.equal(*steps)
    assert not torch.equal(steps[0], step.predict(state, batch_of(3)))


def test_batch_norm_layer_is_that_of_torch():
    from recfx.layers import batch_norm

    g = torch.Generator().manual_seed(0)
    x, real = torch.randn(6, 3, generator=g), 4
    plain = torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(3, generator=g))
    params = {"n.scale": plain.weight.detach(), "n.shift": plain.bias.detach()}
    stats = {"n.mean": torch.zeros(3), "n.var": torch.ones(3)}
    how = {"valid": torch.arange(6)[:, None] < real, "seed": 0, "step": torch.tensor(1), "sample": torch.arange(6)}
    y, stats = batch_norm(params, "n", x, Context(training=True, stats=stats, **how))
    torch.testing.assert_close(y[:real], plain(x[:real]))
    torch.testing.assert_close(stats["n.mean"], plain.running_mean)
    torch.testing.assert_close(stats["n.var"], plain.running_var)
    y, same = batch_norm(params, "n", x, Context(training=False, stats=stats, **how))
    torch.testing.assert_close(y, plain.eval()(x))
    assert same == stats


def test_batch_norm_without_a_context_is_an_error():
    params, stats = dcnv2.init(dcnv2.DCNv2Config(**SIZES, norm="batch"), torch.Generator())
    assert len(stats) == 2
    with pytest.raises(ValueError, match="context: got None, expected the context of the step"):
        dcnv2.forward(params, {"emb": torch.zeros(2, F, D)}, {})


def test_heads_divide_the_last_layers():
    with pytest.raises(ValueError, match=r"second: got \(6, 5\), expected a last layer that heads=4 divides"):
        finalmlp.init(finalmlp.FinalMLPConfig(**SIZES, first=(4,), second=(6, 5)), torch.Generator())
