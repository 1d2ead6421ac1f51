"""Models of several tasks and of sequences beside their plain modules: outputs, gradients, in a step, compiled."""

import pytest
import torch

from recfx.capture import capture
from recfx.context import Context
from recfx.embeddings import Embedding, normal
from recfx.losses import in_batch_softmax
from recfx.models import din, esmm, mmoe, ple, sasrec, shared_bottom, two_tower
from recfx.optim import adamw, sparse_adamw
from recfx.step import Task, train_step
from recfx.train import evaluate
from recfx.types import Ragged, pack
from tests.models import references as refs

B, F, N, D = 6, 3, 2, 4
LENGTHS = [3, 0, 5, 1, 2, 7]
SIZES = {"num_sparse": F, "num_numeric": N, "dim": D}
TASKS = {
    "shared_bottom": (shared_bottom, shared_bottom.SharedBottomConfig(**SIZES, shared=(6, 5)), refs.SharedBottom),
    "mmoe": (mmoe, mmoe.MMoEConfig(**SIZES, num_experts=3, expert=(6, 5), hidden=(4,)), refs.MMoE),
    "ple": (ple, ple.PLEConfig(**SIZES, expert=(6, 5), hidden=(4,)), refs.PLE),
    "esmm": (esmm, esmm.ESMMConfig(**SIZES, hidden=(6, 4)), refs.ESMM),
}
SEQUENCES = {
    "din": (din, din.DINConfig(**SIZES, attention=5, hidden=(6,)), refs.DIN),
    "din_alone": (din, din.DINConfig(dim=D, attention=5, hidden=(6,)), refs.DIN),
    "din_dice": (din, din.DINConfig(**SIZES, attention=5, hidden=(6,), activation="dice"), refs.DIN),
    "sasrec": (sasrec, sasrec.SASRecConfig(dim=D, length=4, hidden=5), refs.SASRec),
    "two_tower": (two_tower, two_tower.TwoTowerConfig(num_query=F, num_item=2, num_numeric=N, dim=D), refs.TwoTower),
}
MODELS = TASKS | SEQUENCES


def initial(name, generator):
    """Parameters, and statistics where the model has some."""
    result = MODELS[name][0].init(MODELS[name][1], generator)
    return result if isinstance(result, tuple) else (result, {})


def forward_of(name, *, stats=None, training=True):
    """forward(params, emb, feats) -> outputs, new statistics."""
    if name != "din_dice":
        return lambda *given: (MODELS[name][0].forward(*given), {})
    context = Context(
        training=training,
        valid=torch.ones(B, 1, dtype=torch.bool),
        stats={k: t.double() for k, t in (stats or initial(name, torch.Generator())[1]).items()},
        seed=0,
        step=torch.tensor(1),
        sample=torch.arange(B),
    )
    return lambda *given: din.forward(*given, context)


def case(name):
    g = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params, _ = initial(name, g)
    params = {k: p.double() + 0.2 * drawn(*p.shape) for k, p in params.items()}
    emb = {"emb": drawn(B, F, D)}
    if name in SEQUENCES:
        emb = {
            "target": drawn(B, 1, D),
            "history": drawn(sum(LENGTHS) + 3, D),
            "query": drawn(B, F, D),
            "item": drawn(B, 2, D),
        }
        emb |= {"emb": drawn(B, F, D)} if name in ("din", "din_dice") else {}
    return params, emb, {} if name == "din_alone" else {"numeric": drawn(B, N)}


def as_ragged(emb):
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {k: Ragged(t, offsets) if k == "history" else t for k, t in emb.items()}


def leaves_of(output):
    return list(output.values()) if isinstance(output, dict) else [output]


def total(output):
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in leaves_of(output))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_plain_module(name):
    params, emb, feats = case(name)
    reference, forward = MODELS[name][2], forward_of(name)
    emb["history"] = emb.get("history", torch.zeros(0, D))
    emb["history"][sum(LENGTHS) :] = 9.0  # after the last list

    def loss(params, emb):
        output, _ = forward(params, as_ragged(emb), feats)
        return total(output), output

    (of_params, of_emb), output = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(params, emb)
    plain, leaves = reference(params), {k: t.clone().requires_grad_() for k, t in emb.items()}
    expected = plain(as_ragged(leaves), feats)
    for got, want in zip(leaves_of(output), leaves_of(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    total(expected).backward()
    for got, grads in ((of_params, plain.grads()), (of_emb, {k: leaf.grad for k, leaf in leaves.items()})):
        for key, grad in grads.items():
            grad = torch.zeros_like(got[key]) if grad is None else grad
            torch.testing.assert_close(got[key], grad, rtol=1e-7, atol=1e-8)


def batch_of(seed, *, real=B):
    g = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(0, 6, shape, generator=g)

    lengths = torch.tensor([n if b < real else 0 for b, n in enumerate(LENGTHS)])
    history = Ragged(ids(sum(LENGTHS)), torch.cat([torch.zeros(1), lengths.cumsum(0)]).int())
    click = ids(B, 1) % 2
    labels = {"click": click.float(), "buy": (click * (ids(B, 1) % 2)).float()}
    sparse = {f"c{i}": ids(B, 1) for i in range(F)}
    count = torch.tensor(real, dtype=torch.int32)
    return pack(
        {
            **labels,
            **sparse,
            "item": ids(B, 1),
            "history": history,
            "numeric": torch.randn(B, N, generator=g),
            "num_samples": count,
        }
    )


def step_of(name):
    params, stats = initial(name, torch.Generator().manual_seed(1))

    def on(feature, **how):
        return Embedding(feature, dim=D, init=normal(0.3), **how)

    sparse = [on(f"c{i}") for i in range(F)]
    if name in TASKS:
        groups, tasks = {"emb": sparse}, {task: Task(label=task) for task in ("click", "buy")}
    elif name == "two_tower":
        groups = {"query": sparse, "item": [on("item"), on("c0", shared_name="item/item")]}
        tasks = Task(batch_loss=in_batch_softmax(item="item", temperature=0.2))
    else:
        groups = {
            "target": [on("item", shared_name="items")],
            "history": [on("history", shared_name="items", combiner=None)],
        }
        groups |= {"emb": sparse} if name in ("din", "din_dice") else {}
        tasks = Task(label="click")
    step = train_step(
        features=dict,
        embeddings=groups,
        forward=MODELS[name][0].forward,
        tasks=tasks,
        sparse_optimizer=sparse_adamw(2e-2),
        dense_optimizer=adamw(2e-2),
        max_rows=64,
    )
    return step, lambda: step.init({k: p.clone() for k, p in params.items()}, stats=stats)


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_step_is_the_step_and_learns(name):
    step, init = step_of(name)
    one, other = init(), init()
    run = capture(step, other, batch_of(0), backend="eager")
    losses = []
    for i in range(40):
        batch = batch_of(i % 2, real=B - i % 2)
        one, aux = step.update_(one, batch)
        losses.append(float(aux.loss))
        if i < 3:
            other, traced = run(other, batch)
            for a, b in zip(leaves_of(traced.logit), leaves_of(aux.logit), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert evaluate(step.evaluate_, one, [batch_of(0)])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_is_the_step(name):
    step, init = step_of(name)
    one, other = init(), init()
    run = capture(step, other, batch_of(0))
    for seed in range(3):
        one, aux = step.update_(one, batch_of(seed))
        other, compiled = run(other, batch_of(seed))
        for a, b in zip(leaves_of(compiled.logit), leaves_of(aux.logit), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dice_keeps_the_moments_of_what_is_there_and_uses_them_in_evaluation():
    params, emb, feats = case("din_dice")
    emb["history"][sum(LENGTHS) :] = torch.nan  # after the last list
    logit, stats = forward_of("din_dice")(params, as_ragged(emb), feats)
    assert bool(logit.isfinite().all())
    owners = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS))
    rows, target = emb["history"][: sum(LENGTHS)], emb["target"][owners, 0]
    both = torch.cat([rows, target, rows - target, rows * target], dim=1)
    hidden = both @ params["attention.0.weight"] + params["attention.0.bias"]
    torch.testing.assert_close(stats["attention.0.dice.mean"], 0.1 * hidden.mean(0))
    torch.testing.assert_close(stats["attention.0.dice.var"], 0.9 + 0.1 * hidden.var(0))
    evaluated, same = forward_of("din_dice", stats=stats, training=False)(params, as_ragged(emb), feats)
    assert all(torch.equal(same[name], t) for name, t in stats.items())
    moments = stats["attention.0.dice.mean"], stats["attention.0.dice.var"]
    torch.testing.assert_close(evaluated, refs.DIN(params)(as_ragged(emb), feats, moments).detach())


def test_dice_without_a_single_item_keeps_its_moments():
    params, emb, feats = case("din_dice")
    emb["history"] = Ragged(emb["history"], torch.zeros(B + 1, dtype=torch.int32))
    before = {"attention.0.dice.mean": torch.full((5,), 0.3), "attention.0.dice.var": torch.full((5,), 2.0)}
    logit, stats = forward_of("din_dice", stats=before)(params, emb, feats)
    assert bool(logit.isfinite().all())
    assert all(torch.equal(stats[name], t.double()) for name, t in before.items())
    with pytest.raises(ValueError, match="context: got None, expected the context of the step"):
        din.forward(params, emb, feats)


def test_position_t_of_sasrec_does_not_see_what_follows():
    params, emb, _ = case("sasrec")
    rows = emb["history"][: sum(LENGTHS)]
    changed = rows.clone()
    changed[5] += 1  # the third of five items
    encoded, there = sasrec.encode(params, as_ragged({"history": rows})["history"])
    other, _ = sasrec.encode(params, as_ragged({"history": changed})["history"])
    assert there[2].tolist() == [True] * 4
    torch.testing.assert_close(encoded[2, :1], other[2, :1], rtol=0, atol=0)  # the last four begin with the second
    assert not torch.equal(encoded[2, 1:], other[2, 1:])
    torch.testing.assert_close(encoded[[0, 1, 3, 4, 5]], other[[0, 1, 3, 4, 5]], rtol=0, atol=0)


def test_the_product_of_probabilities_far_out():
    a = torch.tensor([-80.0, 80.0, -80.0, 80.0, 0.3], dtype=torch.float64)
    b = torch.tensor([-80.0, -80.0, 80.0, 80.0, -0.7], dtype=torch.float64)
    got = esmm.logit_of_product(a, b)
    p = torch.sigmoid(a[-1]) * torch.sigmoid(b[-1])
    torch.testing.assert_close(got[-1], torch.log(p / (1 - p)))
    torch.testing.assert_close(
        got[:4], torch.tensor([-160.0, -80.0, -80.0, 80.0 - 0.6931471805599453], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: sasrec.SASRecConfig(dim=5, heads=2), "dim: got 5, expected a multiple of heads=2"),
        (lambda: ple.PLEConfig(num_sparse=1, tasks=("shared", "buy")), "tasks: got 'shared', expected another name"),
    ],
)
def test_errors(make, error):
    with pytest.raises(ValueError, match=error):
        make()
