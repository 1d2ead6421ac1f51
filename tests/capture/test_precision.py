"""Products in bf16: near the fp32 step, not equal to it, captured as eager, and no worse at learning."""

from __future__ import annotations

import ast
import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recfx.capture import capture, capture_evaluation, trace
from recfx.capture.captured import _f32_products
from recfx.layers import in_bf16, linear, products
from recfx.metrics import auc, binary_metrics
from recfx.step import Step
from recfx.types import Batch
from tests.conftest import FEATURES, NUM_NUMERIC, SMALL_IDS, deepfm_batches, deepfm_params, deepfm_step
from tests.reference import pack_samples, random_samples
from tests.step.test_step import assert_same_state

ROUNDING = 2.0**-8  # of a number to bf16, relative


@pytest.fixture(scope="module")
def bf16() -> Step:
    return deepfm_step(precision="bf16")


def fresh(step: Step) -> Any:
    return step.init({name: p.clone() for name, p in deepfm_params().items()})


def run(function: Any, step: Step, batches: list[Batch]) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    state, losses, logits = step.grow_(fresh(step), (1000,)), [], []
    for batch in batches:
        state, aux = function(state, batch)
        losses.append(aux.loss.clone())
        logits.append(aux.logit.clone())
    return state, losses, logits


def test_bf16_is_near_fp32_and_not_equal(bf16):
    """The first step, as later ones compare different weights; Adam's normalised steps keep those near all the same."""
    batches = deepfm_batches(20)
    fp32 = deepfm_step()
    state, losses, logits = run(bf16.update_, bf16, batches)
    expected, expected_losses, expected_logits = run(fp32.update_, fp32, batches)
    torch.testing.assert_close(logits[0], expected_logits[0], rtol=4 * ROUNDING, atol=4 * ROUNDING)
    assert not torch.equal(logits[0], expected_logits[0])
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected_losses), rtol=0.05, atol=0.02)
    assert torch.equal(state.tables[0].ids, expected.tables[0].ids)


def test_all_but_products_stays_f32(bf16):
    """Gradients, rows, optimiser states, metrics, loss and logit; every product but the narrow ones is bf16."""
    state, batch = fresh(bf16), deepfm_batches(1)[0]
    after, aux = bf16.update_(bf16.grow_(fresh(bf16), bf16.ids_in(batch)), batch)
    assert aux.logit.dtype == aux.loss.dtype == torch.float32
    assert [t.dtype for t in tree_leaves(after)] == [t.dtype for t in tree_leaves(state)]
    assert all(t.dtype != torch.bfloat16 for t in tree_leaves(after))
    graph = trace(bf16.in_graph_, state, batch).graph
    products = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    dtypes = [node.meta["val"].dtype for node in products]
    assert dtypes.count(torch.bfloat16) == 6  # two wide layers, each with two gradients
    assert dtypes.count(torch.float32) == 7  # the last layer; numeric terms and the sum over fields: one gradient each


def test_gradients_are_those_of_the_formula():
    """Of one linear layer: operands rounded to bf16, multiplied exactly, rounded once."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((16, 8), (8, 3)))
    grad = torch.randn(16, 3, generator=generator)
    forward = in_bf16(lambda params, emb, feats: feats @ params["w"])
    out, vjp = torch.func.vjp(lambda w, x: forward({"w": w}, {}, x), weight, x)
    by_weight, by_x = vjp(grad)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.bfloat16().double() @ b.bfloat16().double()

    for got, expected in ((out, product(x, weight)), (by_weight, product(x.T, grad)), (by_x, product(grad, weight.T))):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=ROUNDING, atol=1e-5)


@pytest.mark.parametrize("loops_on", [(), ("cpu",)], ids=["as on a CPU", "as on CUDA"])
def test_a_single_output_is_not_rounded(loops_on, monkeypatch):
    monkeypatch.setattr(products, "LOOPS_ON", loops_on)
    params = {"w.weight": torch.randn(8, 1), "w.bias": torch.randn(1)}
    x = torch.randn(16, 8)
    forward = in_bf16(lambda params, emb, feats: linear(params, "w", feats))
    assert torch.equal(forward(params, {}, x), linear(params, "w", x))
    torch.testing.assert_close(forward(params, {}, x), x @ params["w.weight"] + params["w.bias"])


def test_captured_is_eager(bf16):
    batches = deepfm_batches(6, short_last=True)
    call = capture(bf16, fresh(bf16), batches[0])
    captured, losses, logits = run(call, bf16, batches)
    eager, eager_losses, eager_logits = run(bf16.update_, bf16, batches)
    assert torch.equal(captured.tables[0].ids, eager.tables[0].ids)
    # The compiler may leave out a rounding to bf16 between a product and what follows.
    torch.testing.assert_close(torch.stack(losses), torch.stack(eager_losses), rtol=0.02, atol=0.01)
    torch.testing.assert_close(logits[0], eager_logits[0], rtol=4 * ROUNDING, atol=4 * ROUNDING)
    again, losses_again, _ = run(call, bf16, batches)
    assert_same_state(captured, again)
    assert torch.equal(torch.stack(losses), torch.stack(losses_again))


def test_evaluation_is_in_the_precision_of_training(bf16):
    batch = deepfm_batches(1)[0]
    state = fresh(bf16)
    _, aux = capture_evaluation(bf16, state, batch)(state, batch)
    _, expected = bf16.evaluate_(fresh(bf16), batch)
    torch.testing.assert_close(aux.logit, expected.logit, rtol=4 * ROUNDING, atol=4 * ROUNDING)
    _, other = deepfm_step().evaluate_(fresh(bf16), batch)
    assert not torch.equal(expected.logit, other.logit)


def test_tf32_holds_while_recording_alone():
    """And is put back when recording fails."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with _f32_products("tf32"):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError, match="out of memory"), _f32_products("tf32"):
        raise RuntimeError("out of memory")
    assert matmul.fp32_precision == before
    for other in ("fp32", "bf16"):
        with _f32_products(other):
            assert matmul.fp32_precision == before


def said() -> list[Any]:
    """What torch says of products in f32, the new way and the old: "mixed" where the old one raises."""
    backends, answers = torch.backends, []
    for ask in (
        lambda: backends.fp32_precision, lambda: backends.cudnn.fp32_precision,
        lambda: backends.cudnn.conv.fp32_precision, lambda: backends.cuda.matmul.fp32_precision,
        lambda: backends.mkldnn.matmul.fp32_precision, lambda: backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):  # fmt: skip
        try:
            answers.append(ask())
        except RuntimeError:
            answers.append("mixed")
    return answers


@pytest.mark.parametrize("name", ["get_float32_matmul_precision", "set_float32_matmul_precision"])
def test_tf32_puts_back_what_it_has_changed_before_an_error(name, monkeypatch):
    """Of torch's two ways the new one is changed first: the old one then fails, when it is read or when it is set."""

    def fails(*args, change=torch.set_float32_matmul_precision):
        if args in [(), ("high",)]:
            raise RuntimeError("no such precision")
        change(*args)

    matmul = torch.backends.cuda.matmul
    unset, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        before = said()
        with monkeypatch.context() as patched:
            patched.setattr(torch, name, fails)
            with pytest.raises(RuntimeError, match="no such precision"), _f32_products("tf32"):
                pytest.fail("a step would run in a precision that nobody asked for")
        assert said() == before
    finally:
        matmul.fp32_precision = unset


SETTINGS = {
    "nothing": "",
    "old, highest": "torch.set_float32_matmul_precision('highest')",
    "old, high": "torch.set_float32_matmul_precision('high')",
    "old, medium": "torch.set_float32_matmul_precision('medium')",
    "old, allowed": "torch.backends.cuda.matmul.allow_tf32 = True",
    "new, tf32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "new, ieee": "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "new, everywhere": "torch.backends.fp32_precision = 'tf32'",
    "new, everywhere in bf16": "torch.backends.fp32_precision = 'bf16'",
    "new, on CUDA": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "both": "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
}


def test_tf32_leaves_what_the_program_has_set():
    """In a process of its own, a child of it for each setting: torch keeps them for a whole process."""
    program = """
import os, sys, torch
from recfx.capture.captured import _f32_products
from tests.capture.test_precision import SETTINGS, said
for name, setting in SETTINGS.items():
    if os.fork() == 0:
        exec(setting)
        before = said()
        with _f32_products("tf32"):
            inside = said()
        inherits = []
        for word in ("ieee", "tf32"):  # who says nothing still follows
            torch.backends.fp32_precision = word
            inherits.append(torch.backends.cuda.matmul.fp32_precision)
        torch.backends.fp32_precision = before[0]
        print([name, before, inside, said(), inherits], flush=True)
        os._exit(0)
    os.wait()
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    lines = [ast.literal_eval(line) for line in child.stdout.splitlines()]
    assert [name for name, *_ in lines] == [*SETTINGS]
    for name, before, inside, after, inherits in lines:
        assert after == before, name
        assert inside == [*before[:3], "tf32", "ieee", True, "high"], name  # both ways, as Inductor reads either
        assert (inherits == ["ieee", "tf32"]) == (name in ("nothing", "new, everywhere", "new, everywhere in bf16"))


def test_tf32_changes_nothing_on_a_cpu():
    batches = deepfm_batches(3)
    fp32, tf32 = deepfm_step(), deepfm_step(precision="tf32")
    a, b = run(fp32.update_, fp32, batches), run(tf32.update_, tf32, batches)
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def test_another_word_is_an_error():
    with pytest.raises(ValueError, match=r"precision: got 'fp16', expected one of \('fp32', 'tf32', 'bf16'\)"):
        deepfm_step(precision="fp16")


def planted(num: int, *, seed: int) -> list[Batch]:
    """Batches of 64 samples whose click is drawn from a logit that their ids and first number decide."""
    rng, batches = random.Random(seed), []
    for _ in range(num):
        samples = random_samples(rng, 64, features=FEATURES, num_numeric=NUM_NUMERIC, ids=SMALL_IDS)
        logits = [s.numeric[0] + sum(2 * math.sin(id) for name in FEATURES for id in s.ids[name]) for s in samples]
        clicked = [float(rng.random() < 1 / (1 + math.exp(-x))) for x in logits]
        samples = [s._replace(label=label) for s, label in zip(samples, clicked, strict=True)]
        batches.append(pack_samples(samples, 64, capacity=128))
    return batches


def test_bf16_learns_as_well_as_fp32(bf16):
    """AUC on held-out samples of a planted problem, within 0.005; an untrained model has about 0.5."""
    aucs = []
    for step in (deepfm_step(), bf16):
        state, _, _ = run(step.update_, step, planted(100, seed=1))
        state = state._replace(metrics=binary_metrics().init())
        for batch in planted(40, seed=2):
            state, _ = step.evaluate_(state, batch)
        aucs.append(auc(state.metrics))
    assert aucs[0] > 0.8
    assert abs(aucs[1] - aucs[0]) < 0.005
    assert aucs[1] != aucs[0]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 5, 4), (0, 4)])
def test_one_output_as_a_loop_takes_the_shapes_that_a_product_takes(monkeypatch, shape):
    generator = torch.Generator().manual_seed(0)
    params = {"out.weight": torch.randn(4, 1, generator=generator), "out.bias": torch.ones(1)}
    x = torch.randn(shape, generator=generator)
    product = linear(params, "out", x)
    monkeypatch.setattr(products, "LOOPS_ON", ("cpu",))
    torch.testing.assert_close(linear(params, "out", x), product)
