"""Checkpoints of RecIS, as a fixture of our own writes them, against dicts of ids."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from torch import nn

from recfx import features as ops
from recfx import optim
from recfx.checkpoint import save
from recfx.dist import Group
from recfx.embeddings import Embedding
from recfx.kernels.index.owner import owner
from recfx.kernels.rows.initial import initial_values
from recfx.recis import load_recis
from recfx.rows import read
from recfx.step import train_step
from recfx.table import initializer_tensors, stats
from recfx.types import Ragged, pack
from tests.checkpoint.test_checkpoint import sha256
from tests.conftest import BATCH_SIZE, CAPACITY, DIM, FEATURES, NUM_NUMERIC, deepfm_params, deepfm_step
from tests.recis.recis_fixture import Saved, rank_of, write_blocks, write_recis
from tests.reference import EXTREMES, pack_samples, random_samples
from tests.test_readme import ROOT, blocks_of

M, V = "sparse_adamw_tf_exp_avg", "sparse_adamw_tf_exp_avg_sq"
IDS = st.sampled_from(EXTREMES) | st.integers(-9, 9)
NAMES = {f"{group}/{f}": f"{f}_{group}" for group in ("emb", "bias") for f in FEATURES}
DIMS = {"emb": DIM, "bias": 1}
ENDS = {"weight": "embedding", "m": M, "v": V}


def some_rows(ids, dim, seed=0):
    rng = random.Random(f"{seed}")
    return {i: {slot: [rng.uniform(0.01, 1) for _ in range(dim)] for slot in ("embedding", M, V)} for i in ids}


def saved_tables(ids_of):
    """Tables of the DeepFM step by their names there."""
    return {
        there: Saved(DIMS[name.split("/")[0]], some_rows(ids_of(name), DIMS[name.split("/")[0]], seed=name))
        for name, there in NAMES.items()
    }


def tf_step(**kwargs):
    return deepfm_step(**{"sparse_optimizer": optim.sparse_adamw_tf(1e-2)} | kwargs)


def fresh(step):
    return step.init(deepfm_params())


def as_dict(step, state):
    """(table, id) -> (row number, slot -> values), read from the state by hand."""
    found = {}
    for plan, t in zip(step.plan.tables, state.tables, strict=True):
        for row in range(int(t.num_rows)):
            for c in plan.vocabularies[int(t.vocabularies[row])]:
                values = t.rows[row, :, c.first : c.first + c.dim].tolist()
                found[c.name, int(t.ids[row])] = (row, dict(zip(("weight", *step.slots), values, strict=True)))
    return found


def initial(step, table, id):
    for plan in step.plan.tables:
        keys, params = initializer_tensors(plan, step.seed)
        for v, columns in enumerate(plan.vocabularies):
            for c in columns:
                if c.name == table:
                    values = initial_values(torch.tensor([id]), keys[v : v + 1], params[v : v + 1])
                    return values[0, c.first : c.first + c.dim].tolist()
    raise AssertionError(table)


def expected(step, tables, num_ranks, names=NAMES):
    """The same by the rules: tables of a feature after one another, new ids in the order of ranks and rows."""
    (plan,) = step.plan.tables
    found, row = {}, 0
    for columns in plan.vocabularies:
        order = {}
        for c in columns:
            rows = tables[names[c.name]].rows
            for rank in range(num_ranks):
                for i in rows:
                    if rank_of(i, num_ranks) == rank:
                        order.setdefault(i, len(order))
        for c in columns:
            rows = tables[names[c.name]].rows
            for i, number in order.items():
                new = {"weight": initial(step, c.name, i), "m": [0.0] * c.dim, "v": [0.0] * c.dim}
                values = {slot: f32(rows[i][end]) for slot, end in ENDS.items()} if i in rows else new
                found[c.name, i] = (row + number, values)
        row += len(order)
    return found


def check_rows(got, wanted):
    """Equal, but for initial values, which two formulas of them give to rounding."""
    assert {key: row for key, (row, _) in got.items()} == {key: row for key, (row, _) in wanted.items()}
    for key, (_, values) in wanted.items():
        assert got[key][1] == {slot: pytest.approx(row, rel=1e-5, abs=1e-7) for slot, row in values.items()}


def f32(values):
    return torch.tensor(values, dtype=torch.float32).tolist()


@given(
    ids=st.fixed_dictionaries({name: st.lists(IDS, unique=True, max_size=7) for name in NAMES}),
    num_ranks=st.integers(1, 3),
    num_writers=st.integers(1, 2),
    num_steps=st.integers(0, 10**9),
)
@settings(max_examples=30, deadline=None)
def test_any_tables_are_those_of_a_dict(tmp_path_factory, ids, num_ranks, num_writers, num_steps):
    step, tables = tf_step(), saved_tables(ids.get)
    how = {"num_ranks": num_ranks, "num_writers": num_writers, "num_steps": num_steps}
    folder = write_recis(tmp_path_factory.mktemp("recis"), tables, **how)
    state = load_recis(folder, step, fresh(step), names=NAMES)
    check_rows(as_dict(step, state), expected(step, tables, num_ranks))
    for t in state.tables:
        n = int(t.num_rows)
        assert int(t.step) == num_steps
        assert t.born[:n].tolist() == [num_steps] * n
        assert t.seen[:n].tolist() == [num_steps << 32] * n
        assert stats(t)[:1] + stats(t)[5:] == (n, 0, 0, 0, 0, 0)
    rows_here = as_dict(step, state)
    for name, there in NAMES.items():
        saved = tables[there].rows
        got = [rows_here[name, i][1] for i in saved]
        assert got == [{slot: f32(row[end]) for slot, end in ENDS.items()} for row in saved.values()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_all_rows(tmp_path, world_size):
    step, tables = tf_step(), saved_tables(lambda name: [*range(-20, 20 + len(name)), *EXTREMES])
    folder = write_recis(tmp_path, tables, num_ranks=3)
    merged, whole = {}, as_dict(step, load_recis(folder, step, fresh(step), names=NAMES))
    vocabulary = {c.name: v for v, columns in enumerate(step.plan.tables[0].vocabularies) for c in columns}
    for rank in range(world_size):
        state = load_recis(folder, step, fresh(step), names=NAMES, rank=rank, world_size=world_size)
        mine = as_dict(step, state)
        assert int(state.tables[0].step) == 7
        for name, i in mine:
            assert owner(torch.tensor([i]), torch.tensor([vocabulary[name]]).int(), world_size) == rank
        assert [key for key in whole if key in mine] == list(mine)  # in the same order
        merged |= {key: values for key, (_, values) in mine.items()}
        own = tf_step(group=Group(rank=rank, world_size=world_size, streams=world_size, deterministic=False))
        assert as_dict(own, load_recis(folder, own, fresh(own), names=NAMES)) == mine  # the default
    assert merged == {key: values for key, (_, values) in whole.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats(tmp_path, dtype):
    step, tables = tf_step(), saved_tables(lambda name: [3, 4])
    tables = {name: saved._replace(dtype=dtype) for name, saved in tables.items()}
    got = as_dict(step, load_recis(write_recis(tmp_path, tables), step, fresh(step), names=NAMES))
    for name, there in NAMES.items():
        for i, row in tables[there].rows.items():
            halves = {slot: torch.tensor(row[end]).to(dtype).float().tolist() for slot, end in ENDS.items()}
            assert got[name, i][1] == halves


def test_names_hold_what_separates_them(tmp_path):
    """Dots, at signs, and a name that is its own part's."""
    names = {name: f"shop.{name}@x/part_0_1^" for name in NAMES}
    tables = {names[name]: saved for name, saved in zip(NAMES, saved_tables(lambda _: [1]).values(), strict=True)}
    step = tf_step()
    state = load_recis(write_recis(tmp_path, tables), step, fresh(step), names=names)
    check_rows(as_dict(step, state), expected(step, tables, 1, names))


def test_the_newest_of_a_run(tmp_path):
    step = tf_step()
    for name, ids in (("ckpt_4", [4]), ("ckpt_10", [10])):
        write_recis(tmp_path / name, saved_tables(lambda _, ids=ids: ids))
    (tmp_path / "checkpoint").write_text("ckpt_4\nckpt_10\n")
    ids = {i for _, i in as_dict(step, load_recis(tmp_path, step, fresh(step), names=NAMES))}
    assert ids == {10}
    (tmp_path / "checkpoint").write_text("\n")
    with pytest.raises(ValueError, match=r"checkpoint: got no line, expected names of checkpoints"):
        load_recis(tmp_path, step, fresh(step), names=NAMES)


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"ckpt-1\n\xff\xfe")
    step = tf_step()
    with pytest.raises(ValueError, match=rf"{tmp_path}/.*index: FileNotFoundError"):
        load_recis(tmp_path, step, fresh(step), names=NAMES)


def test_some_tables(tmp_path):
    step, tables = tf_step(), saved_tables(lambda _: [1, 2])
    folder = write_recis(tmp_path, {"b_bias": tables["b_bias"]})
    state = load_recis(folder, step, fresh(step), tables=["bias/b"], names=NAMES)
    got = as_dict(step, state)
    assert set(got) == {(name, i) for name in ("emb/b", "bias/b") for i in (1, 2)}
    assert got["bias/b", 2][1]["m"] == f32(tables["b_bias"].rows[2][M])
    assert got["emb/b", 2][1]["weight"] == pytest.approx(initial(step, "emb/b", 2), rel=1e-5)
    none = load_recis(folder, step, fresh(step), tables=())
    assert (as_dict(step, none), int(none.tables[0].step)) == ({}, 0)


def test_ids_cut_to_52_bits(tmp_path):
    """What a coalesced table saved is found through the same cut."""
    ids = torch.tensor((*EXTREMES, 2**52 + 5, -(2**60)))
    step = tf_step()
    cut = [i % 2**52 for i in ids.tolist()]
    folder = write_recis(tmp_path, saved_tables(lambda _: list(dict.fromkeys(cut))))
    state = load_recis(folder, step, fresh(step), names=NAMES)
    assert ops.mod(ids, 2**52).tolist() == cut
    assert {i for _, i in as_dict(step, state)} == set(ops.mod(ids, 2**52).tolist())


# Optimisers.


def item_step(optimizer):
    """logit = sum of the item's two weights, so that a weight's gradient is (p - label) / B."""
    return train_step(
        features=dict,
        embeddings={"emb": [Embedding("item", dim=2)]},
        forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None] + 0 * params["w"],
        sparse_optimizer=optimizer,
        dense_optimizer=optim.adamw(0.0),
        max_rows=64,
    )


def trained_by_hand(rows, num_steps, batches, *, lr, wd, variant, b1=0.9, b2=0.999, eps=1e-8):
    """`rows`: id -> (w, m, v), each a list of two, in double precision, one step per batch of (id, label)."""
    rows = {i: [list(part) for part in row] for i, row in rows.items()}
    for t, batch in enumerate(batches, num_steps + 1):
        grads = {}
        for i, label in batch:
            p = 1 / (1 + math.exp(-sum(rows[i][0])))
            grads[i] = grads.get(i, 0.0) + (p - label) / len(batch)
        for i, g in grads.items():
            w, m, v = rows[i]
            for d in range(2):
                m[d], v[d] = b1 * m[d] + (1 - b1) * g, b2 * v[d] + (1 - b2) * g * g
                kept = {"tf": 1 - wd, "recis": 1 - lr * wd, "adam": 1.0}[variant]
                alpha = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
                w[d] = kept * w[d] - alpha * m[d] / (math.sqrt(v[d]) + eps)
    return rows


VARIANTS = {  # by their slots' names there
    "sparse_adamw": ("recis", partial(optim.sparse_adamw_recis, weight_decay=0.1)),
    "sparse_adamw_tf": ("tf", partial(optim.sparse_adamw_tf, weight_decay=0.1)),
    "sparse_adam": ("adam", optim.sparse_adam_recis),
}


@pytest.mark.parametrize("counts_steps", [True, False])
@pytest.mark.parametrize("prefix", VARIANTS)
def test_training_goes_on_from_the_moments(tmp_path, prefix, counts_steps):
    """By RecIS's one formula, with eps so large that torch's would show; also where its counter stayed at 0 (1.0)."""
    rng, (variant, make) = random.Random(1), VARIANTS[prefix]
    slots = ("embedding", f"{prefix}_exp_avg", f"{prefix}_exp_avg_sq")
    rows = {
        i: [[rng.uniform(-s, s) if s == 1 else rng.uniform(0, s) for _ in range(2)] for s in (1, 0.1, 0.01)]
        for i in (5, -6, 7)
    }
    saved = Saved(2, {i: dict(zip(slots, row, strict=True)) for i, row in rows.items()})
    how = {"num_steps": 9, "optimizer": prefix, "slots": slots, "counts_steps": counts_steps}
    folder = write_recis(tmp_path, {"items": saved}, **how)
    step = item_step(make(1e-2, eps=1e-3))
    state = load_recis(folder, step, step.init({"w": torch.zeros(1)}), names={"emb/item": "items"})

    rows[99] = [initial(step, "emb/item", 99), [0.0] * 2, [0.0] * 2]  # an id that comes later
    batches = [[(5, 1.0), (-6, 0.0), (5, 0.0)], [(7, 1.0), (99, 1.0)], [(99, 0.0), (5, 1.0)]]
    for batch in batches:
        ids, labels = zip(*batch, strict=True)
        offsets = torch.arange(len(ids) + 1, dtype=torch.int32)
        columns = {"label": torch.tensor(labels)[:, None], "item": Ragged(torch.tensor(ids), offsets)}
        state, _ = step.update_(state, pack(columns))
    wanted = trained_by_hand(rows, 9, batches, lr=1e-2, wd=0.1, variant=variant, eps=1e-3)
    assert int(state.tables[0].step) == 12
    for (_, i), (_, values) in as_dict(step, state).items():
        for slot, row in zip(("weight", "m", "v"), wanted[i], strict=True):
            assert values[slot] == pytest.approx(row, rel=2e-5), (i, slot)


def test_without_moments(tmp_path):
    """Any optimiser may take the weights alone."""
    tables = saved_tables(lambda _: [1, 2])
    folder = write_recis(tmp_path, tables, slots=("embedding",), num_steps=None)
    for optimizer in (optim.sparse_adamw(1e-3), optim.sparse_rowwise_adagrad(0.1), optim.sparse_ftrl(0.1)):
        step = deepfm_step(sparse_optimizer=optimizer)
        state = load_recis(folder, step, fresh(step), names=NAMES, moments=False)
        assert int(state.tables[0].step) == 0
        for name, there in NAMES.items():
            got = read(step, state, name, torch.tensor([1, 2]))
            assert got.weight.tolist() == [f32(tables[there].rows[i]["embedding"]) for i in (1, 2)]
            assert not any(slot.any() for slot in got.slots.values())
    step = deepfm_step(sparse_optimizer=optim.sparse_sgd(0.1))  # which keeps nothing
    state = load_recis(folder, step, fresh(step), names=NAMES)
    assert as_dict(step, state)["emb/b", 2][1] == {"weight": f32(tables["b_emb"].rows[2]["embedding"])}


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        (optim.sparse_adagrad(0.1), ("embedding", M, V)),
        (optim.sparse_ftrl(0.1), ("embedding", M, V)),
        (optim.sparse_adamw(0.1), ("embedding",)),
        (optim.sparse_adamw(0.1), ("embedding", "adagrad_sum")),
    ],
)
def test_another_optimizer(tmp_path, optimizer, slots):
    tables = saved_tables(lambda _: [1])
    for saved in tables.values():
        saved.rows[1]["adagrad_sum"] = saved.rows[1]["embedding"]
    step = deepfm_step(sparse_optimizer=optimizer)
    folder = write_recis(tmp_path, tables, slots=slots)
    with pytest.raises(ValueError, match=r"got an optimiser that keeps \[.*\] for one that keeps .*moments=False"):
        load_recis(folder, step, fresh(step), names=NAMES)


# The dense part.


class Dense(nn.Module):
    """The seed's dense model: its names and its formula, before the sigmoid."""

    def __init__(self, num_sparse, dim, hidden, num_numeric):
        super().__init__()
        self.numeric_embs = nn.Parameter(torch.randn(num_numeric, dim))
        self.numeric_biases = nn.Parameter(torch.randn(num_numeric, 1))
        sizes = [(num_numeric + num_sparse) * dim, *hidden]
        layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(sizes)]
        self.dnn = nn.Sequential(*itertools.chain(*layers), nn.Linear(sizes[-1], 1))

    def forward(self, emb, bias, numeric):
        n = len(numeric)
        emb = torch.cat([self.numeric_embs.repeat(n, 1, 1), emb], dim=1)
        bias = torch.cat([self.numeric_biases.repeat(n, 1, 1), bias], dim=1)
        weight = torch.cat([numeric, torch.ones(n, bias.shape[1] - numeric.shape[1])], dim=1)[:, :, None]
        second = ((emb * weight).sum(1) ** 2 - (emb**2 * weight**2).sum(1)).sum(1, keepdim=True) / 2
        return (weight * bias).sum(1) + second + self.dnn(emb.flatten(1))


class Seed(nn.Module):
    """The place of the dense model in the whole model, from which the names in model.pt follow."""

    def __init__(self, **sizes):
        super().__init__()
        self.dense_model = Dense(**sizes)


def trained_seed(num_steps=3, **sizes):
    """The model and its optimiser after some steps on noise."""
    torch.manual_seed(5)
    model = Seed(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        f, d, n = sizes["num_sparse"], sizes["dim"], sizes["num_numeric"]
        logit = model.dense_model(torch.randn(4, f, d), torch.randn(4, f, 1), torch.randn(4, n))
        torch_step(optimizer, logit, torch.randint(2, (4, 1)).float())
    return model, optimizer


def torch_step(optimizer, logit, label):
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(logit, label).backward()
    optimizer.step()


SIZES = {"num_sparse": len(FEATURES), "dim": DIM, "hidden": (8, 4), "num_numeric": NUM_NUMERIC}


def params_of(there):
    """Of the dense model of `SIZES`, and of anything that has its names."""
    named = {"numeric_emb": there["dense_model.numeric_embs"], "numeric_bias": there["dense_model.numeric_biases"]}
    for i, kind in itertools.product(range(3), ("weight", "bias")):
        named[f"dnn.{i}.{kind}"] = there[f"dense_model.dnn.{2 * i}.{kind}"].t()
    return named


def by_name(model, optimizer, slot):
    return {name: optimizer.state[p][slot] for name, p in model.named_parameters()}


@pytest.mark.parametrize("key", ["recis.dense.optim.", "dense_optimizer", "mine"])
def test_the_seeds_deepfm_goes_on(tmp_path, key):
    model, optimizer = trained_seed(**SIZES)
    samples = random_samples(random.Random(0), BATCH_SIZE, features=FEATURES, num_numeric=NUM_NUMERIC, ids=(1, 2, 3))
    tables = saved_tables(lambda _: [1, 2, 3])
    extra = {"global_step": torch.tensor(12), "train_epoch": torch.tensor(0), key: optimizer.state_dict()}
    folder = write_recis(tmp_path, tables, model=model.state_dict(), extra=extra)
    step = tf_step()
    state = load_recis(folder, step, fresh(step), names=NAMES, dense=params_of)
    check_rows(as_dict(step, state), expected(step, tables, 1))
    for got, wanted in (
        (state.params, dict(model.named_parameters())),
        (state.dense.m, by_name(model, optimizer, "exp_avg")),
        (state.dense.v, by_name(model, optimizer, "exp_avg_sq")),
    ):
        assert all(torch.equal(got[name], value) for name, value in params_of(wanted).items())
        assert got.keys() == params_of(wanted).keys()
    assert int(state.dense.step) == 3

    def pooled(group):
        rows = [[tables[f"{f}_{group}"].rows[i]["embedding"] for i in s.ids[f]] for s in samples for f in FEATURES]
        sums = [[sum(row[d] for row in cell) for d in range(DIMS[group])] for cell in rows]
        return torch.tensor(sums).reshape(BATCH_SIZE, len(FEATURES), DIMS[group])

    logit = model.dense_model(pooled("emb"), pooled("bias"), torch.tensor([s.numeric for s in samples]))
    state, aux = step.update_(state, pack_samples(samples, BATCH_SIZE, capacity=CAPACITY))
    assert torch.allclose(aux.logit, logit, rtol=1e-5, atol=1e-5)
    torch_step(optimizer, logit, torch.tensor([[s.label] for s in samples]))
    for name, value in params_of(dict(model.named_parameters())).items():
        assert torch.allclose(state.params[name], value, rtol=1e-5, atol=1e-6), name


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    """Under the names, sizes and optimiser of the seed's program."""
    page = ROOT / "docs" / "coming-from-recis.md"
    (block,) = [b for b in blocks_of(page.read_text()) if "load_recis(" in b.code]
    sizes = {"num_sparse": 26, "dim": 8, "hidden": (64, 16), "num_numeric": 13}
    model, optimizer = trained_seed(1, **sizes)
    groups = {"emb": 8, "bias": 1}
    tables = {f"c{i}_{g}": Saved(d, some_rows([i, -i], d, seed=i)) for i in range(1, 27) for g, d in groups.items()}
    for saved in tables.values():
        for row in saved.rows.values():
            row |= {"sparse_adamw_exp_avg": row[M], "sparse_adamw_exp_avg_sq": row[V]}
    slots = ("embedding", "sparse_adamw_exp_avg", "sparse_adamw_exp_avg_sq")
    how = {"model": model.state_dict(), "extra": {"recis.dense.optim.": optimizer.state_dict()}, "num_ranks": 2}
    how |= {"slots": slots, "optimizer": "sparse_adamw", "counts_steps": False}
    write_recis(tmp_path / "ckpt" / "ckpt_0", tables, **how)
    (tmp_path / "ckpt" / "checkpoint").write_text("ckpt_0\n")
    monkeypatch.chdir(tmp_path)
    ran = {}
    exec(compile(block.code, page.name, "exec"), ran)
    got, model_params = as_dict(ran["step"], ran["state"]), params_of(dict(model.named_parameters()))
    assert len(got) == 2 * 2 * 26
    for i in range(1, 27):
        for group in groups:
            row = tables[f"c{i}_{group}"].rows[-i]
            assert got[f"{group}/c{i}", -i][1] == {slot: f32(row[end]) for slot, end in ENDS.items()}
    assert ran["state"].params.keys() == model_params.keys()
    assert all(torch.equal(ran["state"].params[name], value) for name, value in model_params.items())
    assert int(ran["state"].dense.step) == 1
    assert int(ran["state"].tables[0].step) == 7


def test_dense_alone_and_in_part(tmp_path):
    """Weights without moments, from a checkpoint without an optimiser's state; then the tables, in another call."""
    model, _ = trained_seed(**SIZES)
    model.register_buffer("seen", torch.zeros(3))
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), model=model.state_dict())
    step = tf_step()
    state, before = fresh(step), deepfm_params()
    state = load_recis(
        folder,
        step,
        state,
        tables=(),
        moments=False,
        dense=lambda there: {"dnn.1.bias": params_of(there)["dnn.1.bias"]},
    )
    assert torch.equal(state.params["dnn.1.bias"], model.dense_model.dnn[2].bias)
    assert torch.equal(state.params["dnn.1.weight"], before["dnn.1.weight"])
    assert int(state.dense.step) == 0
    state = load_recis(folder, step, state, names=NAMES)
    assert int(state.tables[0].step) == 7
    assert torch.equal(state.params["dnn.1.bias"], model.dense_model.dnn[2].bias)


def test_a_parameter_without_a_gradient(tmp_path):
    model, optimizer = trained_seed(**SIZES)
    saved = optimizer.state_dict()
    del saved["state"][0]
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), model=model.state_dict(), extra={"o": saved})
    step = tf_step()
    state = load_recis(folder, step, fresh(step), names=NAMES, dense=params_of)
    assert not state.dense.m["numeric_emb"].any()
    assert state.dense.m["numeric_bias"].any()
    assert int(state.dense.step) == 3


BIAS = "dense_model.dnn.2.bias"
DENSE_DAMAGE = {
    "no model": (lambda m, e: None, r"model.pt: .*FileNotFoundError.*, expected a dict"),
    "no tensor": (
        lambda m, e: {n: x for n, x in m.items() if n != BIAS},
        rf"model.pt: no tensor '{BIAS}', only \['dense_model.numeric_embs'",
    ),
    "another shape": (
        lambda m, e: m | {BIAS: torch.zeros(5)},
        r"model.pt: parameter 'dnn.1.bias': got \[5\], expected \[4\]",
    ),
    "no numbers": (
        lambda m, e: m | {BIAS: torch.full((4,), math.nan)},
        r"model.pt: parameter 'dnn.1.bias': got values that are",
    ),
    "a list": (lambda m, e: [1], r"model.pt: TypeError.'got list'"),
    "code": (lambda m, e: {"x": Seed}, r"model.pt: UnpicklingError"),
    "no optimiser": (lambda m, e: e.clear() or m, "extra.pt: got 0 states of dense optimisers, expected one"),
    "two optimisers": (lambda m, e: e.update(p=e["o"]) or m, "extra.pt: got 2 states of dense optimisers"),
    "two groups": (
        lambda m, e: e["o"].update(param_groups=[{"params": [0, 1]}, {"params": [2, 3, 4, 5, 6, 7]}]) or m,
        r"extra.pt: got \[\[0, 1\], \[2, .*expected one group of the 8 tensors of model.pt. .*bles=\(\), moments=False",
    ),
    "a buffer": (lambda m, e: m | {"mean": torch.ones(2)}, "expected one group of the 9 tensors of model.pt"),
    "in another order": (
        lambda m, e: dict(sorted(m.items())),
        r"parameter 0: got moments of shapes .*expected \[8\], that of 'dense_mod",
    ),
    "without second moments": (
        lambda m, e: e["o"]["state"][1].pop("exp_avg_sq") is None or m,
        r"parameter 1: got .*None.*of 'dense_model.num",
    ),
    "steps differ": (
        lambda m, e: e["o"]["state"][1].update(step=torch.tensor(9.0)) or m,
        r"extra.pt: got steps \[3, 9\], expected",
    ),
}


@pytest.mark.parametrize("what", DENSE_DAMAGE)
def test_damage_of_the_dense_part(tmp_path, what):
    damage, message = DENSE_DAMAGE[what]
    model, optimizer = trained_seed(**SIZES)
    extra = {"global_step": torch.tensor(3), "o": optimizer.state_dict()}
    damaged = damage(dict(model.state_dict()), extra)
    folder = write_recis(tmp_path / "there", saved_tables(lambda _: [1]), model=damaged, extra=extra)
    step = tf_step()
    state = fresh(step)
    with pytest.raises(ValueError, match=message):
        load_recis(folder, step, state, names=NAMES, dense=params_of)
    assert everything(step, state, tmp_path / "a") == everything(step, fresh(step), tmp_path / "b")


def test_moments_for_another_dense_optimizer(tmp_path):
    model, optimizer = trained_seed(**SIZES)
    extra = {"o": optimizer.state_dict()}
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), model=model.state_dict(), extra=extra)
    step = tf_step(dense_optimizer=optim.sgd(0.1))
    with pytest.raises(ValueError, match=r"extra.pt: got AdamW's moments for \w+, expected an optimiser that"):
        load_recis(folder, step, fresh(step), names=NAMES, dense=params_of)
    load_recis(folder, step, fresh(step), names=NAMES, dense=params_of, moments=False)
    with pytest.raises(ValueError, match=r"dense: got \['x'\], expected some of"):
        load_recis(folder, step, fresh(step), dense=lambda there: {"x": torch.zeros(1)}, tables=(), moments=False)


# Damage.


def edit_json(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def edit_blocks(change, file="model-*"):
    """A file with another content: change(name -> (value, dense))."""

    def damage(folder):
        (path,) = folder.glob(file)
        blocks = {name: (value, False) for name, value in load_tensors(path.read_bytes()).items()}
        change(blocks)
        write_blocks(path, blocks)

    return damage


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def unfinished(folder):
    (folder / "index").rename(folder / "ckpt-0000000.index")


FILE = "model-000000-of-000001.safetensors"
BLOCK = "a_emb.embedding/part_0_1"
DAMAGE = {
    "no index": (remove("index"), r"index: FileNotFoundError.*expected JSON of a RecIS checkpoint"),
    "unfinished": (unfinished, r"index: FileNotFoundError.*It was not finished; use another"),
    "no keys": (remove("tensorkey.json"), r"tensorkey.json: FileNotFoundError"),
    "no file": (remove(FILE), rf"{FILE}: tensor '.*': .* The file is missing or damaged"),
    "index is a list": (lambda f: (f / "index").write_text("[]"), "index: TypeError.'list'"),
    "half an index": (lambda f: (f / "index").write_text('{"block'), "index: JSONDecodeError"),
    "index without files": (edit_json("index", lambda c: c.pop("file_index")), "index: KeyError.'file_index'"),
    "index of an absent file": (
        edit_json("index", lambda c: c["block_index"].update({BLOCK: 3})),
        r"index: KeyError.3.*expected the files",
    ),
    "index without the block": (
        edit_json("index", lambda c: c["block_index"].pop(BLOCK)),
        rf"index: no block '{BLOCK}'",
    ),
    "another name in the index": (
        edit_json("index", lambda c: c.update(file_index={"gone.safetensors": 0})),
        r"gone.safetensors: tensor '.*'",
    ),
    "a key of no form": (edit_json("tensorkey.json", lambda c: c.update(x="y")), "got 'x': 'y', expected"),
    "a part of another world": (
        edit_json("tensorkey.json", lambda c: c.update({"t.id/part_1_3": "t@id^"})),
        r"got parts of ranks \[0, 1\] of \[1, 3\]",
    ),
    "a world without end": (
        edit_json(
            "tensorkey.json", lambda c: [c.pop(k) for k in [*c]] + [c.update({f"t.id/part_0_{10**12}": "t@id^"})]
        ),
        r"got parts of ranks \[0\] of \[1000000000000\]",
    ),
    "no embedding of a part": (
        edit_json("tensorkey.json", lambda c: c.pop(BLOCK)),
        r"tensorkey.json: table 'a_emb': got 'embedding' of ranks \[\], ids of \[0\]",
    ),
    "no ids of a part": (
        edit_json("tensorkey.json", lambda c: c.pop("a_emb.id/part_0_1")),
        r"table 'a_emb': got 'embedding' of ranks \[0\], ids of \[\]",
    ),
    "no table": (
        edit_json("tensorkey.json", lambda c: [c.pop(k) for k in [*c] if k.startswith("a_emb.")]),
        r"tensorkey.json: no table 'a_emb', only a_bias, b_bias, b_emb, c_bias, c_emb. Give its name",
    ),
    "no step": (
        edit_json("index", lambda c: c["block_index"].pop("sparse_adamw_tf_step^ ")),
        "no block 'sparse_adamw_tf_step",
    ),
    "two steps": (
        edit_blocks(lambda b: b.update({"sparse_adamw_tf_step^ ": (torch.tensor([1, 2]), True)})),
        r"tensor 'sparse_adamw_tf_step\^ ': got tensor\(\[1, 2\]\), expected a number of steps",
    ),
    "a tensor gone": (edit_blocks(lambda b: b.pop(BLOCK)), rf"{FILE}: tensor '{BLOCK}'"),
    "another width": (
        edit_blocks(lambda b: b.update({BLOCK: (torch.zeros(3, 5), False)})),
        rf"{FILE}: tensor '{BLOCK}': got torch.float32 \[3, 5\], expected f32, f16 or bf16 \[3, 4\]",
    ),
    "fewer embeddings than ids": (
        edit_blocks(lambda b: b.update({BLOCK: (torch.zeros(2, 4), False)})),
        r"got torch.float32 \[2, 4\], expected",
    ),
    "embeddings of integers": (
        edit_blocks(lambda b: b.update({BLOCK: (torch.zeros(3, 4).long(), False)})),
        r"got torch.int64 \[3, 4\]",
    ),
    "ids of floats": (
        edit_blocks(lambda b: b.update({"a_emb.id/part_0_1": (torch.zeros(3), False)})),
        r"tensor 'a_emb.id/part_0_1': got torch.float32 \[3\], expected torch.int64",
    ),
    "no numbers": (
        edit_blocks(lambda b: b[BLOCK][0].__setitem__((1, 2), math.nan)),
        rf"tensor '{BLOCK}': got values that are not",
    ),
    "no numbers among moments": (
        edit_blocks(lambda b: b[f"c_bias.{V}/part_0_1"][0].__setitem__((0, 0), math.inf)),
        rf"'c_bias.{V}/part_0_1'",
    ),
    "an id twice": (
        edit_blocks(lambda b: b.update({"a_emb.id/part_0_1": (torch.tensor([8, 9, 8]), False)})),
        r"tensor 'a_emb.id/part_0_1': got id 8, which 'a_emb.id/part_0_1' has too",
    ),
}


def everything(step, state, folder):
    """All that a checkpoint of the state holds."""
    path = save(folder, step, state, number=0, loop={})
    return {p.name: sha256(p) for p in path.iterdir()}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage(tmp_path, what):
    damage, message = DAMAGE[what]
    step = tf_step()
    folder = write_recis(tmp_path / "there", saved_tables(lambda _: [1, -2, 3]))
    load_recis(folder, step, fresh(step), names=NAMES)
    damage(folder)
    state = fresh(step)
    with pytest.raises(ValueError, match=message):
        load_recis(folder, step, state, names=NAMES)
    assert everything(step, state, tmp_path / "a") == everything(step, fresh(step), tmp_path / "b")


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_file_cut_anywhere(tmp_path_factory, data):
    step = tf_step()
    folder = write_recis(tmp_path_factory.mktemp("recis"), saved_tables(lambda _: [1, -2, 3]))
    name = data.draw(st.sampled_from([FILE, "index", "tensorkey.json"]))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=name):
        load_recis(folder, step, fresh(step), names=NAMES)


def test_an_id_in_two_parts(tmp_path):
    folder = write_recis(tmp_path, saved_tables(lambda _: [1, 2, 3, 4]), num_ranks=2)
    ids = load_tensors((folder / "model-000000-of-000002.safetensors").read_bytes())["a_emb.id/part_0_2"]
    edit_blocks(lambda b: b["a_emb.id/part_1_2"][0].copy_(ids[:1]), "model-000001-*")(folder)
    step = tf_step()
    with pytest.raises(ValueError, match=r"part_1_2': got id \d, which 'a_emb.id/part_0_2' has too"):
        load_recis(folder, step, fresh(step), names=NAMES)


def test_a_rank_is_missing(tmp_path):
    folder = write_recis(tmp_path, saved_tables(lambda _: [1, 2, 3, 4]), num_ranks=2)
    edit_json("tensorkey.json", lambda c: [c.pop(k) for k in [*c] if k.endswith("part_1_2")])(folder)
    step = tf_step()
    with pytest.raises(
        ValueError, match=r"tensorkey.json: got parts of ranks \[0\] of \[2\], expected all of one number"
    ):
        load_recis(folder, step, fresh(step), names=NAMES)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_missing_from_one_table(tmp_path, rank):
    """One that holds none of its ids saves an empty part."""
    folder = write_recis(tmp_path, saved_tables(lambda _: [1, 2, 3, 4]), num_ranks=2)
    gone = re.compile(rf"a_bias\..*/part_{rank}_2")
    edit_json("tensorkey.json", lambda c: [c.pop(k) for k in [*c] if gone.fullmatch(k)])(folder)
    step = tf_step()
    with pytest.raises(
        ValueError,
        match=rf"tensorkey.json: table 'a_bias': got parts of ranks \[{1 - rank}\], expected those of \[0, 1\]",
    ):
        load_recis(folder, step, fresh(step), names=NAMES)


def test_too_little_room_leaves_the_state_as_it_was(tmp_path):
    step = tf_step(max_rows=8)
    folder = write_recis(tmp_path / "there", saved_tables(lambda name: [1, -2, 3] if name != "bias/c" else [5, 6, 7]))
    state = fresh(step)
    with pytest.raises(ValueError, match=r"table 'emb/c': got 3 new ids, expected at most 2. Raise max_rows"):
        load_recis(folder, step, state, names=NAMES)
    assert everything(step, state, tmp_path / "a") == everything(step, fresh(step), tmp_path / "b")
    folder = write_recis(tmp_path / "smaller", saved_tables(lambda _: [1]))
    check_rows(
        as_dict(step, load_recis(folder, step, state, names=NAMES)), expected(step, saved_tables(lambda _: [1]), 1)
    )


def test_misuse(tmp_path):
    step = tf_step()
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]))
    state = load_recis(folder, step, fresh(step), names=NAMES)
    with pytest.raises(ValueError, match=r"state: got one with 3 rows, expected a new one"):
        load_recis(folder, step, state, names=NAMES)
    with pytest.raises(ValueError, match=r"tables: got \['emb/z'\], expected some of"):
        load_recis(folder, step, fresh(step), tables=["emb/z"])
    with pytest.raises(ValueError, match=r"names: got \['a_emb'\], expected some of"):
        load_recis(folder, step, fresh(step), names={"a_emb": "emb/a"})
    with pytest.raises(ValueError, match=r"rank: got 2 of world_size 2"):
        load_recis(folder, step, fresh(step), names=NAMES, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"no table 'emb/a', only a_bias, a_emb"):
        load_recis(folder, step, fresh(step))
