"""Mistakes of somebody who knows PyTorch and not recfx: each error names what it got, what was expected and what to do.

All of it runs uncompiled; what is given to `capture` fails while it is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn

from recfx import checkpoint, metrics, optim
from recfx.capture import capture, capture_evaluation, capture_prediction, capture_steps
from recfx.data import fixedlen, hashed, reader, varlen
from recfx.embeddings import Embedding, tile
from recfx.step import Step, TrainState, train_step
from recfx.train import TrainConfig, evaluate, train
from recfx.types import Batch, Ragged, pack

OFFSETS = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
ITEM = Ragged(torch.tensor([5, 6, 7]), OFFSETS)
COLUMNS: dict[str, Any] = {"label": torch.tensor([[1.0], [0.0], [1.0]]), "item": ITEM}


def forward(params: dict[str, Tensor], emb: dict[str, Tensor], feats: dict[str, Any]) -> Tensor:
    return emb["emb"].sum((1, 2))[:, None] + params["bias"]


def make(**changed: Any) -> Step:
    arguments: dict[str, Any] = {
        "features": dict,
        "embeddings": {"emb": [Embedding("item", dim=2)]},
        "forward": forward,
        "sparse_optimizer": optim.sparse_adamw(0.1),
        "dense_optimizer": optim.adamw(0.1),
        "max_rows": 100,
    }
    return train_step(**arguments | changed)


def fresh(step: Step) -> TrainState:
    return step.init({"bias": torch.zeros(1)})


def batch_of(**changed: Any) -> Batch:
    return pack(COLUMNS | changed)


def one_step(*, columns: dict[str, Any] | None = None, **changed: Any) -> None:
    step = make(**changed)
    step.update_(fresh(step), pack(COLUMNS if columns is None else columns))


def wider() -> Step:
    return make(embeddings={"emb": [Embedding("item", dim=4)]})


@functools.cache
def good() -> Step:
    return make()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state, _ = good().update_(fresh(good()), batch_of())
    return checkpoint.save(tmp_path_factory.mktemp("runs") / "run", good(), state, number=3, loop={})


def cases(*cases: tuple[str, Callable[..., Any], type[Exception], str]) -> Any:
    """Each is recognised by its first item."""
    return pytest.mark.parametrize(
        ("mistake", "error", "message"), [case[1:] for case in cases], ids=[case[0] for case in cases]
    )


def expect(mistake: Callable[..., Any], error: type[Exception], message: str, *arguments: Any) -> None:
    with pytest.raises(error, match=message) as raised:
        mistake(*arguments)
    text = str(raised.value)
    assert "expected" in text
    assert "got" in text or "missing" in text


@cases(
    ("Module", lambda: good().init(nn.Linear(2, 2)), TypeError,
     r"params: got .*Linear, expected a dict. Give dict\(module.named_parameters\(\)\)"),
    ("generator", lambda: good().init(nn.Linear(2, 2).named_parameters()), TypeError,
     r"params: got generator, expected a dict"),
    ("nested", lambda: good().init({"dnn": {"weight": torch.zeros(1)}}), TypeError,
     r"params 'dnn': got a dict of \['weight'\], expected torch.Tensor. Flatten it: 'dnn.weight' is a name"),
    ("integers", lambda: good().init({"bias": torch.zeros(1).long()}), TypeError,
     r"params 'bias': got torch.int64, expected floats. It has no gradient"),
    ("numpy", lambda: good().init({"bias": torch.zeros(1).numpy()}), TypeError,
     r"params 'bias': got ndarray float32 \[1\], expected torch.Tensor"),
    ("numbered", lambda: good().init({0: torch.zeros(1)}), TypeError, r"params: got 0, expected str. They are tensors"),
    ("elsewhere", lambda: good().init({"bias": torch.zeros(1, device="meta")}), ValueError,
     r"params: got tensors on meta, expected cpu, as the embeddings. Move them, or build each Embedding with device="),
    ("apart", lambda: good().init({"bias": torch.zeros(1), "w": torch.zeros(1, device="meta")}), ValueError,
     r"params 'w': got a tensor on meta, expected cpu, as 'bias'. Move it"),
    ("tied", lambda: good().init(dict.fromkeys(["bias", "other"], torch.zeros(1))), ValueError,
     r"params: got 'bias' and 'other' in the same memory, expected each its own. .*use it twice in `forward`"),
    ("overlapping", lambda: good().init((lambda t: {"bias": t[:2], "w": t[1:]})(torch.zeros(3))), ValueError,
     r"params: got 'bias' and 'w' in the same memory"),
    ("expanded", lambda: good().init({"bias": torch.zeros(1).expand(3)}), ValueError,
     r"params 'bias': got an expanded tensor \[3\], expected memory for each item. .*clone"),
)  # fmt: skip
def test_parameters(mistake, error, message):
    expect(mistake, error, message)


def test_parameters_of_a_module():
    """They are trained where they are: the module has them."""
    module = nn.Linear(2, 1)

    def call(params: dict[str, Tensor], emb: dict[str, Tensor], feats: dict[str, Any]) -> Tensor:
        return torch.func.functional_call(module, params, (emb["emb"][:, 0],))

    step = make(forward=call)
    before = module.bias.detach().clone()
    state, _ = step.update_(step.init(dict(module.named_parameters())), batch_of())
    assert not any(p.requires_grad for p in state.params.values())
    assert not torch.equal(module.bias, before)
    assert torch.equal(module.bias, state.params["bias"])


def test_parameters_may_be_parts_of_one_tensor():
    """As long as each item is one parameter's: pieces of a flat one, and columns of a matrix."""
    flat, matrix = torch.zeros(3), torch.zeros(2, 2)
    state = good().init({"bias": flat[:1], "a": flat[1:], "b": matrix[:, :1], "c": matrix[:, 1:]})
    state, _ = good().update_(state, batch_of())
    assert flat[0] != 0


@cases(
    ("swapped", lambda: make(sparse_optimizer=optim.adamw(0.1), dense_optimizer=optim.sparse_adamw(0.1)), TypeError,
     r"sparse_optimizer: got .*DenseOptimizer, expected .*SparseOptimizer.* Is the sparse one given as the dense"),
    ("torch's", lambda: make(sparse_optimizer=torch.optim.Adam), TypeError,
     r"sparse_optimizer: got the class torch.optim.adam.Adam, expected .*recfx.optim.sparse_adamw\(1e-3\)"),
    ("torch's for params", lambda: make(dense_optimizer=torch.optim.SGD([torch.zeros(1)])), TypeError,
     r"dense_optimizer: got torch.optim.sgd.SGD, expected .*DenseOptimizer. Build one: recfx.optim.adamw\(1e-3\)"),
    ("not built", lambda: make(sparse_optimizer=optim.sparse_sgd), TypeError,
     r"sparse_optimizer: got the function sparse_sgd, expected"),
    ("given parameters", lambda: optim.adamw([torch.zeros(1)]), TypeError,
     r"lr: got a list of torch.Tensor, expected a number, .* An optimiser is built without parameters: step.init"),
    ("rate as text", lambda: optim.sparse_adamw("1e-3"), TypeError, r"lr: got '1e-3', expected a number"),
    ("no rate", lambda: optim.sgd(None), TypeError, r"lr: got None, expected a number"),
    ("scheduler", lambda: optim.adamw(torch.optim.lr_scheduler.StepLR), TypeError,
     r"lr: got the class .*StepLR, expected a number, .* See recfx.optim.schedules"),
    ("rates", lambda: optim.adamw(torch.tensor([0.1, 0.2])), ValueError, r"lr: got a tensor \[2\], expected \[\]"),
    ("below zero", lambda: optim.adamw(-0.1), ValueError, r"lr: got -0.1, expected 0 <= lr < inf"),
    ("decay as text", lambda: optim.adamw(0.1, weight_decay="0"), TypeError, r"weight_decay: got '0', expected a num"),
    ("schedule of floats", lambda: one_step(dense_optimizer=optim.adamw(lambda step: 0.1)), TypeError,
     r"lr: got 0.1, expected torch.Tensor. A schedule is traced once, so it must compute: torch.full_like\(step, 0.1"),
)  # fmt: skip
def test_optimizers(mistake, error, message):
    expect(mistake, error, message)


@cases(
    ("a list", lambda: make(embeddings=[Embedding("item", dim=2)]), TypeError,
     r"embeddings: got a list of recfx.embeddings.Embedding, expected lists of .* by group name, such as \{'emb'"),
    ("not in a list", lambda: make(embeddings={"emb": Embedding("item", dim=2)}), TypeError,
     r"group 'emb': got recfx.embeddings.Embedding, expected lists of"),
    ("a name", lambda: make(embeddings={"emb": ["item"]}), TypeError, r"group 'emb': got 'item' among them, expected"),
    ("torch's", lambda: make(embeddings={"emb": [nn.Embedding(10, 2)]}), TypeError,
     r"group 'emb': got torch.nn.modules.sparse.Embedding among them, expected"),
    ("dim as a float", lambda: Embedding("item", dim=8.0), TypeError, r"feature 'item': got dim 8.0, expected an int"),
    ("dim as text", lambda: Embedding("item", dim="8"), TypeError, r"feature 'item': got dim '8', expected an int"),
    ("no feature", lambda: Embedding(3, dim=8), TypeError, r"feature: got 3, expected str. It is the name"),
    ("torch's init", lambda: Embedding("item", dim=8, init=nn.init.xavier_uniform_), TypeError,
     r"feature 'item': got init the function xavier_uniform_, expected recfx.embeddings.Initializer.* normal\(0.01\)"),
    ("a number as init", lambda: Embedding("item", dim=8, init=0.1), TypeError, r"feature 'item': got init 0.1, expec"),
    ("no device", lambda: make(embeddings={"emb": [Embedding("item", dim=2, device="gpu")]}), ValueError,
     r"feature 'item': got device 'gpu', expected one of torch's. .* Use 'cpu' or 'cuda'"),
    ("rate as text", lambda: Embedding("item", dim=8, lr_scale="1"), TypeError,
     r"feature 'item', lr_scale: got '1', expected a number"),
    ("max_rows", lambda: make(max_rows=1e3), TypeError, r"max_rows: got 1000.0, expected int. 1e3 is a float: write 1"),
    ("max_rows", lambda: make(max_rows=True), TypeError, r"max_rows: got True, expected int. It is a number"),
    ("max_bytes", lambda: make(max_bytes=True), TypeError, r"max_bytes: got True, expected int. It is a number"),
    ("tile", lambda: tile("2"), TypeError, r"length: got '2', expected an int"),
    ("max_unique", lambda: make(max_unique=1e3), TypeError, r"max_unique: got 1000.0, expected int or None"),
    ("max_bytes", lambda: make(max_bytes="1G"), TypeError, r"max_bytes: got '1G', expected int or None"),
    ("seed", lambda: make(seed="42"), TypeError, r"seed: got '42', expected int"),
)  # fmt: skip
def test_embeddings(mistake, error, message):
    expect(mistake, error, message)


@cases(
    ("accumulation", lambda: make(accumulation=4.0), TypeError, r"accumulation: got 4.0, expected an int"),
    ("loss as a word", lambda: make(loss="bce"), TypeError,
     r"loss: got 'bce', expected a function \(logit, label\) -> loss f32 \[B, 1\]"),
    ("a mean", lambda: one_step(loss=nn.BCEWithLogitsLoss()), ValueError,
     r"loss: got \[\], expected \[3, 1\], one per sample. A mean would count padding. Use reduction='none'"),
    ("features as a dict", lambda: make(features={"item": 1}), TypeError,
     r"features: got a dict of \['item'\], expected a function \(batch\) -> dict of tensors by name"),
    ("two arguments", lambda: make(forward=lambda params, emb: emb), TypeError,
     r"forward: got the function <lambda> that takes \(params, emb\), expected a function \(params, embeddings, feat"),
    ("a Module", lambda: make(forward=nn.Linear(2, 1)), TypeError,
     r"forward: got .*Linear that takes \(input: torch.Tensor\) -> torch.Tensor, expected a function \(params,"),
    ("metrics not built", lambda: make(metrics=metrics.binary_metrics), TypeError,
     r"metrics: got the function binary_metrics, expected recfx.metrics.Metric or None. Build them"),
    ("metrics of another kind", lambda: make(metrics=metrics.Metric(dict, lambda *_: {})), TypeError,
     r"metrics.init\(\): got a dict of .*, expected recfx.metrics.BinaryCounts. That is what recfx.train reads"),
    ("metrics as words", lambda: make(metrics=["auc"]), TypeError, r"metrics: got a list of str, expected"),
    ("life as a word", lambda: make(life="evict"), TypeError, r"life: got 'evict', expected recfx.table.policies.Life"),
    ("clip as a number", lambda: make(clip=1.0), TypeError, r"clip: got 1.0, expected a function \(grads, tables, s"),
    ("label as a number", lambda: make(label=0), TypeError, r"label: got 0, expected str. It is the name of a feature"),
)  # fmt: skip
def test_parts_of_a_step(mistake, error, message):
    expect(mistake, error, message)


@cases(
    ("flat", lambda: one_step(forward=lambda p, e, f: e["emb"].sum((1, 2))), ValueError,
     r"forward: got .'logit': \[3\], 'label': \[3, 1\].*, expected \[B, 1\] for each. .*logit.unsqueeze\(1\)"),
    ("a tuple", lambda: one_step(forward=lambda p, e, f: (e["emb"], e, f)), TypeError,
     r"forward: got a tuple \(Tensor, dict, dict\), expected the logit or \(logit, stats\)"),
    ("nothing", lambda: one_step(forward=lambda p, e, f: None), TypeError, r"forward: got None returned, expected"),
    ("classes", lambda: one_step(forward=lambda p, e, f: e["emb"].sum((1, 2))[:, None] > 0), TypeError,
     r"forward: got Tensor torch.bool \[3, 1\] returned, expected the logit"),
    ("unknown group", lambda: one_step(forward=lambda p, e, f: e["bias"]), ValueError,
     r"forward: got no 'bias', expected one of params \['bias'\], embeddings \['emb'\], features \['num_samples', "),
    ("unknown feature", lambda: one_step(forward=lambda p, e, f: f["price"]), ValueError,
     r"forward: got no 'price', expected one of params"),
    ("unknown parameter", lambda: one_step(forward=lambda p, e, f: p["weight"]), ValueError,
     r"forward: got no 'weight', expected one of params \['bias'\]"),
    ("unknown column", lambda: one_step(features=lambda b: {**b, "user": b["user"]}), ValueError,
     r"features: got no 'user', expected one of columns \['item', 'label', 'num_samples'\]"),
    ("no features", lambda: one_step(features=lambda b: None), TypeError,
     r"features: got None, expected a dict. Return a dict of tensors by name"),
    ("label left out", lambda: one_step(features=lambda b: {"item": b["item"]}), ValueError,
     r"feature 'label': missing, got \['item'\], expected it among them, \[B, 1\]. .* Return it in `features`"),
    ("reserved name", lambda: one_step(columns=COLUMNS | {"counts": torch.ones(3, 1)}), TypeError,
     r"feature 'counts': got Tensor torch.float32 \[3, 1\], expected a dict of tensors by name. .*aux.counts"),
)  # fmt: skip
def test_what_a_users_functions_return(mistake, error, message):
    expect(mistake, error, message)


@cases(
    ("no label", lambda: one_step(columns={"item": ITEM}), ValueError,
     r"feature 'label': missing, got \['item', 'num_samples'\], expected it .* train_step\(label=...\)"),
    ("no label to evaluate", lambda: good().evaluate_(fresh(good()), pack({"item": ITEM})), ValueError,
     r"feature 'label': missing"),
    ("another label", lambda: one_step(label="click"), ValueError, r"feature 'click': missing, got .* It is the label"),
    ("no weight", lambda: one_step(sample_weight="w"), ValueError, r"feature 'w': missing, .* It is the sample_weight"),
    ("flat label", lambda: one_step(columns=COLUMNS | {"label": torch.ones(3)}), ValueError,
     r"forward: got .*'label': \[3\].*, expected \[B, 1\] for each. .*label.unsqueeze\(1\)"),
    ("ragged label", lambda: one_step(columns=COLUMNS | {"label": ITEM}), TypeError,
     r"feature 'label': got recfx.types.Ragged, expected a tensor \[B, 1\]. .*fixedlen\('label', \[0.0\]\)"),
    ("no ids", lambda: one_step(columns={"label": COLUMNS["label"], "user": ITEM}), ValueError,
     r"feature 'item': missing, expected Ragged i64 ids. Known features: \['label', 'num_samples', 'user'\]"),
    ("ids as floats", lambda: one_step(columns=COLUMNS | {"item": torch.ones(3, 1)}), TypeError,
     r"feature 'item': got torch.float32 ids, expected torch.int64"),
    ("ids of 32 bits", lambda: one_step(columns=COLUMNS | {"item": torch.ones(3, 1).int()}), TypeError,
     r"feature 'item': got torch.int32 ids, expected torch.int64"),
    ("flat ids", lambda: one_step(columns=COLUMNS | {"item": torch.tensor([1, 2, 3])}), TypeError,
     r"feature 'item': got Tensor of shape \[3\], expected Ragged i64 ids, or a dense \[B, n\]"),
    ("plain dict", lambda: good().update_(fresh(good()), COLUMNS), ValueError,
     r"batch: got a dict of \['label', 'item'\] without 'num_samples', expected recfx.types.Batch. .*recfx.types.pack"),
    ("plain dict to predict", lambda: good().predict(fresh(good()), COLUMNS), ValueError, r"batch: got a dict of"),
    ("a tensor", lambda: good().update_(fresh(good()), COLUMNS["label"]), TypeError,
     r"batch: got Tensor torch.float32 \[3, 1\], expected recfx.types.Batch"),
)  # fmt: skip
def test_batches(mistake, error, message):
    expect(mistake, error, message)


@cases(
    ("swapped", lambda: good().update_(batch_of(), fresh(good())), TypeError,
     r"state: got recfx.types.Batch of .*, expected recfx.step.TrainState. .*The order is \(state, batch\)"),
    ("parameters", lambda: good().update_({"bias": torch.zeros(1)}, batch_of()), TypeError,
     r"state: got a dict of \['bias'\], expected recfx.step.TrainState. Make one by step.init\(params\)"),
    ("parameters to predict", lambda: good().predict({"bias": torch.zeros(1)}, batch_of()), TypeError, r"state: got a"),
    ("not unpacked", lambda: good().update_(good().update_(fresh(good()), batch_of()), batch_of()), TypeError,
     r"state: got a tuple of recfx.step.TrainState, recfx.step.Aux, expected .* Unpack what a step returns: state, au"),
    ("other embeddings", lambda: wider().update_(fresh(good()), batch_of()), ValueError,
     r"state: got tables of rows \[\(3, 2\)\], expected \[\(3, 4\)\]. .*Use the state of this step's init"),
    ("other row optimiser", lambda: make(sparse_optimizer=optim.sparse_sgd(0.1)).update_(fresh(good()), batch_of()),
     ValueError, r"state: got tables of rows \[\(3, 2\)\], expected \[\(1, 2\)\]. .*another sparse optimiser"),
    ("other optimiser", lambda: make(dense_optimizer=optim.sgd(0.1)).update_(fresh(good()), batch_of()),
     TypeError, r"state.dense: got .*AdamState, expected SgdState. .*another dense optimiser"),
    ("other accumulation", lambda: make(accumulation=2).update_(fresh(good()), batch_of()), ValueError,
     r"state: got one without sums of gradients, expected it for accumulation 2"),
    ("accumulation elsewhere", lambda: good().update_(fresh(make(accumulation=2)), batch_of()), ValueError,
     r"state: got one with sums of gradients, expected it for accumulation 1"),
)  # fmt: skip
def test_states(mistake, error, message):
    expect(mistake, error, message)


@pytest.mark.parametrize("make_run", [capture, capture_evaluation, capture_prediction])
def test_capture_is_given_things_in_another_order(make_run):
    state, batch = fresh(good()), batch_of()
    order = r"The order is \(step, state, batch\)"
    expect(
        make_run,
        TypeError,
        rf"step: got recfx.step.TrainState, expected recfx.step.Step. .*{order}",
        state,
        good(),
        batch,
    )
    expect(make_run, TypeError, rf"step: got the function update_, .*{order}", good().update_, state, batch)
    expect(make_run, TypeError, rf"state: got recfx.types.Batch of .*, expected .*{order}", good(), batch, state)
    expect(make_run, TypeError, r"batch: got dict, expected recfx.types.Batch", good(), state, COLUMNS)


def test_capture_steps_is_given_things_in_another_order():
    expect(
        lambda: capture_steps(fresh(good()), good(), batch_of(), steps_per_replay=2),
        TypeError,
        r"step: got recfx.step.TrainState, expected recfx.step.Step",
    )


@cases(
    ("flat logit", lambda: make(forward=lambda p, e, f: e["emb"].sum((1, 2))), ValueError, r"^forward: got .'logit'"),
    ("unknown group", lambda: make(forward=lambda p, e, f: e["bias"]), ValueError, r"^forward: got no 'bias', exp"),
    ("no features", lambda: make(features=lambda b: None), TypeError, r"^features: got None, expected a dict"),
    ("an unknown attribute", lambda: make(forward=lambda p, e, f: f["item"].shape), AttributeError, r"^'Ragged' obj"),
    ("a product", lambda: make(forward=lambda p, e, f: e["emb"][:, 0] @ e["emb"][:, 0]), RuntimeError, r"^a and b"),
    ("a mean", lambda: make(loss=lambda logit, label: (logit - label).mean()), ValueError, r"^loss: got \[\], exp"),
)  # fmt: skip
def test_a_captured_step_shows_the_mistake_itself(mistake, error, message):
    """Not torch.compile's account of it, and at once."""
    step = mistake()
    state, batch = fresh(step), batch_of()
    with pytest.raises(error, match=message) as raised:
        capture(step, state, batch)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert int(state.tables[0].num_rows) == 0


def test_a_captured_step_is_given_no_state():
    run = capture(good(), fresh(good()), batch_of(), backend="eager")
    expect(run, TypeError, r"state: got a dict of \['bias'\], expected recfx.step.TrainState", {"bias": 1}, batch_of())


def loop(folder: Path, **changed: Any) -> None:
    config = TrainConfig(output_dir=str(folder))
    arguments = {"step": good(), "run": good().update_, "state": fresh(good()), "reader": None, "config": config}
    train(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reader": [1]}, r"reader: got a list of int, expected one with the methods `epoch` and `start_at`"),
        ({"reader": iter("a")}, r"reader: got str_\w*iterator, expected one .* Use recfx.data.reading"),
        (
            {"run": 3},
            r"run: got 3, expected a function \(state, batch\) -> state, aux. Use step.update_ or its capture",
        ),
        ({"state": {"bias": 1}}, r"state: got a dict of \['bias'\], expected recfx.step.TrainState"),
        ({"step": 3}, r"step: got 3, expected recfx.step.Step. Build one: .* The order is \(step, run, state, reader"),
    ],
)
def test_training(tmp_path, changed, message):
    expect(lambda: loop(tmp_path, **changed), TypeError, message)
    assert list(tmp_path.iterdir()) == []


def test_training_is_given_the_step_to_run(tmp_path):
    expect(lambda: loop(tmp_path, run=good()), TypeError, r"run: got recfx.step.Step, expected a function \(state, ba")


@cases(
    ("nothing", lambda: evaluate(good().evaluate_, fresh(good()), []), ValueError,
     r"batches: got none from .*, expected one at least. There is nothing to evaluate"),
    ("None", lambda: evaluate(good().evaluate_, fresh(good()), None), TypeError, r"batches: got None, expected"),
    ("the step", lambda: evaluate(good(), fresh(good()), [batch_of()]), TypeError,
     r"run: got recfx.step.Step, expected a function .* Use step.evaluate_ or its capture"),
    ("plain dicts", lambda: evaluate(good().evaluate_, fresh(good()), [COLUMNS]), ValueError, r"batch: got a dict of"),
    ("the training step", lambda: evaluate(good().update_, fresh(good()), [batch_of()]), ValueError,
     r"run: got one that trains, expected step.evaluate_ or its capture. The state has learnt the batches"),
    ("zero epochs", lambda: TrainConfig(train_epoch=0), ValueError, r"train_epoch: got 0, expected at least 1"),
    ("AUC of a state", lambda: metrics.auc(fresh(good())), TypeError,
     r"counts: got recfx.step.TrainState, expected recfx.metrics.BinaryCounts. .* state.metrics"),
    ("AUC of logits", lambda: metrics.auc(torch.ones(3, 1)), TypeError, r"counts: got Tensor torch.float32 \[3, 1\]"),
    ("loss of a state", lambda: metrics.log_loss(fresh(good())), TypeError, r"counts: got recfx.step.TrainState"),
    ("calibration of a state", lambda: metrics.calibration(fresh(good())), TypeError, r"counts: got recfx.step.TrainS"),
    ("GAUC of lists", lambda: metrics.gauc([1], [0.5], [1.0]), TypeError, r"group: got a list of int, expected torch."),
)  # fmt: skip
def test_evaluation(mistake, error, message):
    expect(mistake, error, message)


@cases(
    ("none found", lambda saved: checkpoint.load(checkpoint.latest(saved / "x"), good(), fresh(good())), TypeError,
     r"path: got None, expected str or pathlib.Path. `latest` returns None where it finds no checkpoint"),
    ("a run's folder", lambda saved: checkpoint.load(saved.parent, good(), fresh(good())), ValueError,
     r"manifest.json: got FileNotFound.*, expected a checkpoint's manifest. .* checkpoints \['step-000000003'\]. Give"),
    ("an empty folder", lambda saved: checkpoint.load(saved.parents[1], good(), fresh(good())), ValueError,
     r"expected a checkpoint's manifest. The folder holds no checkpoint. `latest` finds"),
    ("no folder", lambda saved: checkpoint.load(saved / "x", good(), fresh(good())), ValueError,
     r"expected a checkpoint's manifest. The folder does not exist"),
    ("a file", lambda saved: checkpoint.load(saved / "state.safetensors", good(), fresh(good())), ValueError,
     r"expected a checkpoint's manifest. Give the folder that `save` returned"),
    ("swapped", lambda saved: checkpoint.load(saved, fresh(good()), good()), TypeError,
     r"step: got recfx.step.TrainState, expected recfx.step.Step. .*The order is \(path, step, state\)"),
    ("parameters", lambda saved: checkpoint.load(saved, good(), {"bias": 1}), TypeError,
     r"state: got a dict of \['bias'\], expected recfx.step.TrainState"),
    ("another state", lambda saved: checkpoint.load(saved, wider(), fresh(good())), ValueError,
     r"state: got tables of widths \[2\], expected \[4\]. Use the state of this step"),
    ("another optimiser", lambda saved: checkpoint.load(saved, *(lambda s: (s, fresh(s)))(
        make(sparse_optimizer=optim.sparse_sgd(0.1)))), ValueError,
     r"step-000000003: got an optimiser that keeps \['m', 'v'\] .*, expected \[\]. Use the optimiser"),
    ("a second time", lambda saved: checkpoint.load(saved, good(), checkpoint.load(saved, good(), fresh(good()))[0]),
     ValueError, r"state: got one with 3 rows, expected a new one. They would be lost. Use step.init"),
    ("saved in another order", lambda saved: checkpoint.save(good(), saved, fresh(good()), number=1, loop={}),
     TypeError, r"folder: got recfx.step.Step, expected str or pathlib.Path. The order is"),
    ("parameters saved", lambda saved: checkpoint.save(saved.parent, good(), {"bias": 1}, number=1, loop={}), TypeError,
     r"state: got a dict of \['bias'\], expected recfx.step.TrainState. .*Save the state that a step returned"),
)  # fmt: skip
def test_checkpoints(saved, mistake, error, message):
    expect(mistake, error, message, saved)


def test_saving_in_an_accumulation_window(tmp_path):
    step = make(accumulation=2)
    state, _ = step.update_(fresh(step), batch_of())
    expect(
        lambda: checkpoint.save(tmp_path, step, state, number=1, loop={}),
        ValueError,
        r"state: got an open accumulation window, expected none. Save between optimiser steps",
    )


@cases(
    ("a number", lambda path: fixedlen("label", 0.0), TypeError,
     r"column 'label': got default 0.0, expected a list, .* Use \[0.0\] for one"),
    ("a dtype", lambda path: fixedlen("label", torch.float32), TypeError, r"column 'label': got default torch.dtype"),
    ("a range", lambda path: fixedlen("label", [0.0], valid=(0, 1)), TypeError,
     r"column 'label': got valid=\(0, 1\), expected OneOf\(...\), Between\(low, high\) or None"),
    ("32 bits", lambda path: varlen("item", torch.int32), ValueError, r"column 'item': got dtype torch.int32, exp"),
    ("dtype as text", lambda path: varlen("item", "int64"), ValueError, r"column 'item': got dtype 'int64', expected"),
    ("depth as text", lambda path: varlen("item", torch.int64, depth="2"), TypeError,
     r"column 'item', depth: got '2', expected int"),
    ("hash as a word", lambda path: hashed("item", "farm"), TypeError,
     r"column 'item', string_hash: got 'farm', expected a function \(bytes, offsets\) -> hashes. Use farm_hashes"),
    ("no column", lambda path: reader(path, "item"), TypeError, r"columns: got 'item', expected list or tuple"),
    ("one column", lambda path: reader(path, varlen("item", torch.int64)), TypeError,
     r"columns: got VarLen\(name='item'.*, expected a list of columns. Put it into a list"),
    ("no file", lambda path: reader("nowhere/*.orc", [varlen("item", torch.int64)]), ValueError,
     r"paths: got 'nowhere/\*.orc', which matches no file, expected a file, a folder"),
    ("misspelt", lambda path: next(iter(reader(path, [varlen("itme", torch.int64)], 2))), ValueError,
     r"column 'itme' of .*: got no such column, expected one of \['label', 'item', 'shop'\]"),
    ("text as ids", lambda path: next(iter(reader(path, [varlen("shop", torch.int64)], 2))), ValueError,
     r"column 'shop' of .*: got string, expected list<int64> .* Strings are read by `hashed`"),
    ("batch_size", lambda path: reader(path, [varlen("item", torch.int64)], 1e3), TypeError,
     r"batch_size: got 1000.0, expected an int"),
)  # fmt: skip
def test_readers(tmp_path, mistake, error, message):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"label": [1.0, 0.0], "item": [[1], [2]], "shop": ["a", "b"]}), path)
    expect(mistake, error, message, path)
