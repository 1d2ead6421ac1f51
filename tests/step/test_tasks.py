"""Several tasks in one step: their losses, masks, weights and metrics, beside autograd and sums written out."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from recfx.capture import capture, capture_evaluation, capture_prediction
from recfx.embeddings import Embedding, normal
from recfx.metrics import BinaryCounts, binary_metrics
from recfx.optim import adamw, sgd, sparse_adamw, sparse_sgd
from recfx.step import Task, train_step
from recfx.train import Progress, evaluate, read_metrics
from recfx.types import Ragged, pack

B, REAL, DIM = 8, 6, 4
TASKS = {"click": Task(label="click"), "buy": Task(label="buy", weight=2.5, mask="shown", sample_weight="price")}


def batch_of(seed=0, *, real=REAL):
    g = torch.Generator().manual_seed(seed)
    shown = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1])[:, None]
    buy = torch.randint(0, 2, (B, 1), generator=g).float()
    return pack(
        {
            "click": torch.randint(0, 2, (B, 1), generator=g).float(),
            "buy": torch.where(shown > 0, buy, torch.nan),
            "shown": shown,
            "price": torch.where(shown > 0, torch.rand(B, 1, generator=g), torch.nan),
            "x": torch.randn(B, 3, generator=g),
            "item": Ragged.from_lists([[int(i)] for i in torch.randint(0, 5, (B,), generator=g)]),
            "num_samples": torch.tensor(real, dtype=torch.int32),
        }
    )


def forward(params, emb, feats):
    shared = emb["emb"].sum(1)
    return {name: shared @ params[f"{name}.w"] + feats["x"] @ params[f"{name}.x"] for name in ("click", "buy")}


def params_of(seed=1):
    g = torch.Generator().manual_seed(seed)
    sizes = {"w": DIM, "x": 3}
    return {f"{t}.{k}": torch.randn(n, 1, generator=g) for t in ("click", "buy") for k, n in sizes.items()}


def step_of(tasks=TASKS, *, forward=forward, sparse=None, dense=None, **options):
    return train_step(
        features=dict,
        embeddings={"emb": [Embedding("item", dim=DIM, init=normal(0.3))]},
        forward=forward,
        tasks=tasks,
        sparse_optimizer=sparse or sparse_adamw(1e-2),
        dense_optimizer=dense or adamw(1e-2),
        **options,
    )


def expected_loss(params, rows, batch):
    """The sum of both tasks over the real samples, in plain torch."""
    x, at = batch["x"][:REAL], batch["item"].values[:REAL]
    click, buy = ({"emb": rows[at]}["emb"] @ params[f"{t}.w"] + x @ params[f"{t}.x"] for t in ("click", "buy"))
    there = batch["shown"][:REAL, 0] > 0
    first = bce(click, batch["click"][:REAL], reduction="sum")
    second = bce(buy[there], batch["buy"][:REAL][there], weight=batch["price"][:REAL][there], reduction="sum")
    return first, second


def rows_by_id(state):
    table, n = state.tables[0], int(state.tables[0].num_rows)
    rows = torch.zeros(5, DIM)
    rows[table.ids[:n]] = table.rows[:n, 0, :DIM]
    return rows


def test_gradients_are_those_of_the_weighted_sum():
    step = step_of(sparse=sparse_sgd(1.0), dense=sgd(1.0))
    batch, params = batch_of(), params_of()
    state = step.init({name: p.clone() for name, p in params.items()})
    state, _ = step.evaluate_(step.update_(state, batch_of(real=0))[0], batch)  # nothing moves
    before = step.update(step.init(params_of()), batch)[0]
    rows = rows_by_id(step_of(sparse=sparse_sgd(0.0), dense=sgd(0.0)).update(step.init(params_of()), batch)[0])
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}, rows.clone().requires_grad_()
    first, second = expected_loss(*leaves, batch)
    ((first + 2.5 * second) / REAL).backward()
    state, aux = step.update_(step.init(params_of()), batch)
    for name, p in leaves[0].items():
        torch.testing.assert_close(state.params[name], params[name] - p.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.params[name], before.params[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows_by_id(state), rows - leaves[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux.loss, ((first + 2.5 * second) / REAL).detach())
    assert int(state.nonfinite.num_batches) == 0


def test_metrics_are_by_task_and_leave_out_samples_without_a_label():
    step, batch = step_of(), batch_of()
    state = step.init(params_of())
    logits = step.predict(state, batch)
    assert {name: list(t.shape) for name, t in logits.items()} == {"click": [B, 1], "buy": [B, 1]}
    values = evaluate(step.evaluate_, state, [batch])
    first, second = expected_loss(params_of(), torch.zeros(5, DIM), batch)
    num_shown = int((batch["shown"][:REAL] > 0).sum())
    assert (values["click/num_samples"], values["buy/num_samples"]) == (REAL, num_shown)
    assert math.isclose(values["click/log_loss"], float(first) / REAL, rel_tol=1e-5)
    assert math.isclose(values["buy/log_loss"], float(second) / num_shown, rel_tol=1e-5)
    assert "auc" not in values
    progress = Progress()
    state, aux = step.update_(state, batch)
    read_metrics(progress, state, tasks=step.tasks)
    assert set(aux.logit) == set(state.metrics) == {"click", "buy"}
    means = (progress.metrics[f"{task}/log_loss"] for task in ("click", "buy"))
    assert math.isclose(progress.loss, sum(map(float.__mul__, (1.0, 2.5), means)))
    assert math.isclose(
        progress.loss, float(aux.loss) + progress.metrics["buy/log_loss"] * 2.5 * (1 - num_shown / REAL), rel_tol=1e-5
    )
    assert progress.auc == progress.metrics["click/auc"]


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}, {"accumulation": 2}, {"precision": "bf16"}])
def test_a_captured_step_is_the_step(options):
    step = step_of(**options)
    batches = [batch_of(seed) for seed in range(4)]
    one, other = step.init(params_of()), step.init(params_of())
    run = capture(step, other, batches[0], backend="eager")
    for batch in batches:
        one, aux = step.update_(one, batch)
        other, captured = run(other, batch)
        for name, logit in aux.logit.items():
            torch.testing.assert_close(captured.logit[name], logit, rtol=0, atol=0)
    for name, p in one.params.items():
        torch.testing.assert_close(other.params[name], p, rtol=0, atol=0)
    values = evaluate(capture_evaluation(step, other, batches[0], backend="eager"), other, batches)
    assert values == evaluate(step.evaluate_, one, batches)
    predict = capture_prediction(step, other, batches[0], backend="eager")
    torch.testing.assert_close(predict(other, batches[0])["buy"], step.predict(one, batches[0])["buy"], rtol=0, atol=0)


def test_a_task_alone_is_the_short_form():
    def of(**form):
        step = train_step(
            features=dict,
            embeddings={"emb": [Embedding("item", dim=DIM)]},
            forward=lambda params, emb, feats: emb["emb"].sum(1) @ params["click.w"],
            sparse_optimizer=sparse_adamw(1e-2),
            dense_optimizer=adamw(1e-2),
            **form,
        )
        state = step.init({"click.w": params_of()["click.w"]})
        return step.update_(state, batch_of())

    one, short = of(tasks=Task(label="click", sample_weight="shown")), of(label="click", sample_weight="shown")
    assert torch.equal(one[1].logit, short[1].logit)
    assert torch.equal(one[0].params["click.w"], short[0].params["click.w"])
    assert isinstance(one[0].metrics, BinaryCounts)


def softmax_loss(output, feats, valid):
    scores = (output["query"] @ output["item"].T).masked_fill(~valid[:, 0], -1e9)
    return -scores.log_softmax(1).diagonal()[:, None]


def test_a_batch_loss_takes_a_dict_and_predict_returns_it():
    def towers(params, emb, feats):
        item = emb["emb"].sum(1)
        item = torch.where(torch.arange(B)[:, None] < REAL, item, torch.nan)  # of padding
        return {"query": feats["x"] @ params["q"], "item": item}

    task = Task(batch_loss=softmax_loss, metrics=binary_values_of_loss())
    step = step_of(task, forward=towers, sparse=sparse_sgd(0.0), dense=sgd(1.0))
    q, batch = torch.randn(3, DIM, generator=torch.Generator().manual_seed(5)), batch_of()
    state, aux = step.update_(step.init({"q": q.clone()}), batch)
    leaf = q.clone().requires_grad_()
    scores = (batch["x"] @ leaf)[:REAL] @ aux.logit["item"][:REAL].T
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(REAL))
    loss.backward()
    torch.testing.assert_close(aux.loss, loss.detach())
    torch.testing.assert_close(state.params["q"], q - leaf.grad, rtol=1e-4, atol=1e-5)
    assert set(step.predict(state, {n: c for n, c in batch.items() if n != "click"})) == {"query", "item"}
    scores = (batch["x"] @ state.params["q"])[:REAL] @ aux.logit["item"][:REAL].T
    loss = float(torch.nn.functional.cross_entropy(scores, torch.arange(REAL)))
    assert math.isclose(evaluate(step.evaluate_, state, [batch])["loss"], loss, rel_tol=1e-5)


def binary_values_of_loss():
    """Counts of a batch loss alone."""
    metric = binary_metrics(16)

    def update_(counts, output, feats, loss, valid):
        counts.sums[0].add_(valid.sum())
        counts.sums[2].add_(loss.sum())
        return counts

    return metric._replace(update_=update_, values=lambda counts: {"loss": float(counts.sums[2] / counts.sums[0])})


def test_labels_outside_are_named_by_their_task():
    batch = dict(batch_of())
    batch["buy"] = torch.where(batch["shown"] > 0, 3.0, torch.nan)
    step = step_of()
    with pytest.raises(ValueError, match=r"batches: got 4 labels of feature 'buy' outside \[0, 1\]"):
        evaluate(step.evaluate_, step.init(params_of()), [pack(batch)])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Task(), "got no label, expected the name of a feature, or a batch_loss"),
        (lambda: Task(label="click", weight=0.0), "weight: got 0.0, expected 0 < weight < inf"),
        (lambda: Task(label="click", batch_loss=softmax_loss), "got batch_loss and label, expected one of them"),
        (lambda: step_of({}), "tasks: got none, expected one at least"),
        (lambda: step_of({"a/b": Task(label="click")}), "task 'a/b': got that name, expected one without '/'"),
        (lambda: step_of({"click": "click"}), "task 'click': got 'click', expected"),
        (lambda: step_of(TASKS, label="click"), "label: got 'click' with tasks, expected one of them"),
        (lambda: step_of(TASKS, sample_weight="price"), "sample_weight: got 'price' with tasks"),
    ],
)
def test_errors_of_arguments(make, error):
    with pytest.raises((TypeError, ValueError), match=error):
        make()


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (lambda p, e, f: f["click"], "forward: got Tensor .* returned, expected a dict. It has the outputs by task"),
        (lambda p, e, f: {"click": f["click"]}, r"forward: got no output 'buy' but \['click'\], expected one"),
        (lambda p, e, f: dict.fromkeys(["click", "buy", "x"], f["click"]), "forward: got an output 'x', expected none"),
        (lambda p, e, f: {"click": f["click"], "buy": f["x"]}, r"expected \[B, 1\] for each"),
        (lambda p, e, f: {"click": f["click"], "buy": 1.0}, "forward: got 1.0 returned for task 'buy'"),
    ],
)
def test_errors_of_outputs(result, error):
    step = step_of(forward=result)
    with pytest.raises((TypeError, ValueError), match=error):
        step.update_(step.init(params_of()), batch_of())


def test_errors_of_a_batch_loss():
    task = Task(batch_loss=softmax_loss, metrics=binary_values_of_loss())
    for result, error in [
        (lambda p, e, f: f["click"], "expected a dict of tensors"),
        (lambda p, e, f: {"query": f["x"][:2], "item": f["x"]}, r"got \[2, 3\] as 'query', expected \[8, ...\]"),
        (lambda p, e, f: {"query": 1, "item": f["x"]}, "got 1 as 'query', expected a tensor of floats"),
    ]:
        step = step_of(task, forward=result)
        with pytest.raises((TypeError, ValueError), match=error):
            step.update_(step.init(params_of()), batch_of())
