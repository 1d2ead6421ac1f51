"""What of a checkpoint goes where: other capacities, other ranks, other names, parts of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recfx.checkpoint import held, load, save
from recfx.embeddings import Embedding, LogicalTable, TablePlan, uniform
from recfx.kernels.index.owner import owner
from recfx.kernels.rows.initial import initial_values
from recfx.optim import adagrad, sgd, sparse_adagrad, sparse_ftrl, sparse_rowwise_adagrad, sparse_sgd
from recfx.step import Step, TrainState
from recfx.table import TableState, initializer_tensors
from tests.checkpoint.test_checkpoint import fresh, sha256, some_state, steps, trained
from tests.conftest import DIM, FEATURES, deepfm_batches, deepfm_groups, deepfm_params, deepfm_step
from tests.reference import on_threads

LOOP = {"epoch": 0, "position": {"batch": 5}}
Row = tuple[list, int, int, int]


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step()


@pytest.fixture(scope="module")
def state(step: Step) -> TrainState:
    """One that has freed rows, and rows of every age."""
    state = some_state(step)
    for table in state.tables:
        free_(table, [3, 8, int(table.num_rows) - 1])
    return state


@pytest.fixture(scope="module")
def saved(step: Step, state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("ckpt"), step, state, number=8, loop=LOOP)


def free_(table: TableState, rows: list[int]) -> None:
    """What eviction leaves: rows without an id, and their numbers to be used again, the lowest first."""
    table.vocabularies[rows] = -1
    table.rows[rows] = 0
    table.free_rows[: len(rows)] = torch.tensor(sorted(rows, reverse=True))
    table.num_free.fill_(len(rows))


def content(step: Step, state: TrainState, rows_of: Callable[[int], bool] = lambda row: True) -> dict[tuple, Row]:
    """By (names of the logical tables, id): weights and slots by logical table, last seen, born, counts."""
    found: dict[tuple, Row] = {}
    for plan, table in zip(step.plan.tables, state.tables, strict=True):
        for row in range(int(table.num_rows)):
            v = int(table.vocabularies[row])
            if v >= 0:
                columns = plan.vocabularies[v]
                values = [(c.name, of_table(table.rows[row], plan, k, c)) for k, c in enumerate(columns)]
                ages = int(table.seen[row]) >> 32, int(table.born[row]), int(table.counts[row])
                found[(*[c.name for c in columns], int(table.ids[row]))] = (values, *ages)
    return found


def of_table(row: Tensor, plan: TablePlan, k: int, column: LogicalTable) -> list:
    """Weights and slots of one logical table, and its row slot after all weights, if it has one."""
    row_slot = row[:, plan.width + k : plan.width + k + 1] if row.shape[1] > plan.width else row[:, :0]
    return torch.cat([row[:, column.first : column.first + column.dim], row_slot], dim=1).tolist()


def row_numbers(table: TableState) -> dict[tuple[int, int], int]:
    rows = range(int(table.num_rows))
    return {(int(table.vocabularies[r]), int(table.ids[r])): r for r in rows if int(table.vocabularies[r]) >= 0}


def test_freed_rows_stay_free_and_are_used_again_lowest_first(step, state, saved):
    loaded, _ = load(saved, step, fresh(step))
    for a, b in zip(state.tables, loaded.tables, strict=True):
        assert row_numbers(a) == row_numbers(b)
        num_free = int(a.num_free)
        assert num_free == int(b.num_free) == 3
        assert a.free_rows[:num_free].tolist() == b.free_rows[:num_free].tolist()
        assert b.vocabularies[b.free_rows[:num_free].long()].tolist() == [-1] * 3
    freed = sorted(int(r) for r in loaded.tables[0].free_rows[:3])
    before = set(row_numbers(loaded.tables[0]))
    new = deepfm_batches(1, seed=70, ids=(5000, 5001))
    loaded = on_threads(1, trained, step, loaded, new)
    added = {key: row for key, row in row_numbers(loaded.tables[0]).items() if key not in before}
    assert sorted(added.values())[:3] == freed


@pytest.mark.parametrize("max_rows", [400, 513, 4096])
def test_another_capacity(step, state, saved, tmp_path, max_rows):
    other = deepfm_step(max_rows=max_rows)
    loaded, loop = load(saved, other, fresh(other))
    again = save(tmp_path, other, loaded, number=loop.pop("step"), loop=loop)
    assert {p.name: sha256(p) for p in again.iterdir()} == {p.name: sha256(p) for p in saved.iterdir()}


# Ranks.


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_all_rows_among_them(step, state, saved, world_size):
    parts = [load(saved, step, fresh(step), rank=r, world_size=world_size)[0] for r in range(world_size)]
    merged: dict = {}
    for rank, part in enumerate(parts):
        mine = content(step, part)
        assert not mine.keys() & merged.keys()
        merged |= mine
        (table,) = part.tables
        keys = list(row_numbers(table))
        v, ids = (torch.tensor(column) for column in zip(*keys, strict=True))
        assert owner(ids, v.int(), world_size).tolist() == [rank] * len(keys)
        order = [k for k in row_numbers(state.tables[0]) if k in set(keys)]  # renumbered in the old order
        assert [k for k, _ in sorted(row_numbers(table).items(), key=lambda item: item[1])] == order
        assert (int(table.num_rows), int(table.num_free)) == (len(keys), 0)
        assert int(table.step) == int(state.tables[0].step)
        assert len(keys) > len(content(step, state)) / world_size / 2
    assert merged == content(step, state)
    assert sum(int(p.tables[0].tally[0]) for p in parts) == int(state.tables[0].tally[0])


def test_from_ranks_to_ranks(step, state, saved, tmp_path):
    """1 -> 2 -> 3 -> 1: nothing lost, nothing invented, dense state and counters as they were."""
    folders = [saved]
    for world_size in (2, 3, 1):
        states = [load(folders, step, fresh(step), rank=r, world_size=world_size)[0] for r in range(world_size)]
        folders = [save(tmp_path / f"{world_size}-{r}", step, s, number=8, loop=LOOP) for r, s in enumerate(states)]
    loaded, loop = load(folders, step, fresh(step))
    assert content(step, loaded) == content(step, state)
    assert loop == LOOP | {"step": 8}
    for name in ("m", "v"):
        a, b = getattr(state.dense, name), getattr(loaded.dense, name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert int(loaded.tables[0].tally[0]) == int(state.tables[0].tally[0])


# Names, and parts of a model.


def renamed_groups(new: dict[str, str]) -> dict[str, list[Embedding]]:
    """The groups with other logical names, in another order of features: other vocabulary numbers."""
    groups = deepfm_groups()
    return {
        g: [Embedding(e.feature, dim=e.dim, init=e.init, shared_name=new.get(f"{g}/{e.feature}")) for e in es[::-1]]
        for g, es in groups.items()
    }


def by_names(found: dict[tuple, Row], names: dict[str, str]) -> dict[tuple, Row]:
    """`content` with logical names replaced."""
    return {
        (*[names.get(n, n) for n in key[:-1]], key[-1]): ([(names.get(n, n), x) for n, x in values], *ages)
        for key, (values, *ages) in found.items()
    }


def test_renamed_tables(step, state, saved):
    names = {"emb/a": "emb/user", "bias/a": "bias/user", "emb/b": "emb/shop"}
    other = deepfm_step(embeddings=renamed_groups(names))
    assert other.plan.tables[0].vocabularies[0][0].name == "emb/c"
    back = {new: old for old, new in names.items()}
    loaded, _ = load(saved, other, fresh(other), names=back)
    assert by_names(content(other, loaded), back) == content(step, state)
    numbers = [sorted(row_numbers(s.tables[0]).values()) for s in (state, loaded)]
    assert numbers[0] == numbers[1]  # all of the table was taken: rows stay where they are
    with pytest.raises(ValueError, match=r"no table 'emb/shop' of width 4 for 'emb/shop', only emb/a of width 4,"):
        load(saved, other, fresh(other))


def test_renamed_tables_on_other_ranks_and_back(step, state, saved, tmp_path):
    names = {"emb/a": "emb/user", "bias/a": "bias/user", "emb/b": "emb/shop"}
    other = deepfm_step(embeddings=renamed_groups(names))
    back, merged, folders = {new: old for old, new in names.items()}, {}, []
    for rank in range(3):
        part, _ = load(saved, other, fresh(other), names=back, rank=rank, world_size=3)
        mine = by_names(content(other, part), back)
        assert mine
        assert not mine.keys() & merged.keys()
        merged |= mine
        folders.append(save(tmp_path / str(rank), other, part, number=8, loop=LOOP))
    assert merged == content(step, state)
    whole, _ = load(folders, step, fresh(step), names=names)
    assert content(step, whole) == content(step, state)


def test_a_renamed_dense_parameter(saved, state):
    def forward(params: dict, emb: dict, feats: dict) -> Tensor:
        return emb["bias"].sum((1, 2))[:, None] + params["offset"].sum()

    other = deepfm_step(forward=forward)
    params = {"offset": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"no tensor 'params.offset' of shape \[8\]. It is of another model"):
        load(saved, other, other.init(dict(params)))
    loaded, _ = load(saved, other, other.init(dict(params)), names={"offset": "dnn.0.bias"})
    assert torch.equal(loaded.params["offset"], state.params["dnn.0.bias"])
    assert torch.equal(loaded.dense.v["offset"], state.dense.v["dnn.0.bias"])
    assert int(loaded.dense.step) == int(state.dense.step)


def taken(found: dict[tuple, Row], keep: Callable[[str], bool]) -> dict[tuple, Row]:
    """`content` of some logical tables alone."""
    kept = {}
    for key, (values, *ages) in found.items():
        names = tuple(n for n in key[:-1] if keep(n))
        if names:
            kept[(*names, key[-1])] = ([(n, x) for n, x in values if n in names], *ages)
    return kept


def test_a_subset_of_features(step, state, saved):
    """A model that reads fewer features takes their rows alone."""
    groups = {g: [e for e in es if e.feature != "b"] for g, es in deepfm_groups().items()}
    other = deepfm_step(embeddings=groups)
    params = deepfm_params(num_sparse=2)
    with pytest.raises(ValueError, match=r"no tensor 'params.dnn.0.weight' of shape"):
        load(saved, other, other.init(params))
    loaded, _ = load(saved, other, other.init(params), dense=["dnn.0.bias"])
    assert content(other, loaded) == taken(content(step, state), lambda name: not name.endswith("/b"))
    assert torch.equal(loaded.params["dnn.0.bias"], state.params["dnn.0.bias"])
    assert torch.equal(loaded.params["dnn.0.weight"], params["dnn.0.weight"])
    assert not loaded.dense.m["dnn.0.weight"].any()
    assert int(loaded.tables[0].num_free) == 0


def test_what_fits_another_model(saved):
    """One with a feature more, another one less, and one dense layer of another shape."""
    groups = {
        "emb": [Embedding(f, dim=DIM) for f in ("a", "b", "new")],
        "bias": [Embedding(f, dim=1) for f in ("a", "b", "new")],
    }
    step = deepfm_step(embeddings=groups)
    state = step.init(deepfm_params(len(groups["emb"])) | {"other": torch.zeros(2)})
    there = held(saved)
    assert there.tables == {f"{g}/{f}": dim for g, dim in (("emb", DIM), ("bias", 1)) for f in FEATURES}
    assert there.dense == {name: p.shape for name, p in deepfm_params().items()}
    dense = [name for name, p in state.params.items() if there.dense.get(name) == p.shape]
    assert set(state.params) - set(dense) == {"other"}
    state, _ = load(saved, step, state, tables=there.tables.keys() & step.plan.widths.keys(), dense=dense)
    assert int(state.tables[0].num_rows) > 0
    assert {"emb/new", "bias/new"} == step.plan.widths.keys() - there.tables.keys()


def test_an_added_feature(step, state, saved):
    """The old features keep their rows, the new one starts empty; its table must be left out by name."""
    groups = {g: [*es, Embedding("d", dim=es[0].dim, init=es[0].init)] for g, es in deepfm_groups().items()}
    other = deepfm_step(embeddings=groups)
    old = [f"{g}/{f}" for g in groups for f in FEATURES]
    with pytest.raises(ValueError, match=r"no table 'emb/d' of width 4"):
        load(saved, other, fresh(other), dense=())
    loaded, _ = load(saved, other, fresh(other), dense=(), tables=old)
    assert content(other, loaded) == content(step, state)
    assert int(loaded.dense.step) == 0


def test_an_added_table_over_an_old_feature(step, state, saved):
    """A wider row: the new columns of old rows are drawn as those of new rows are, their moments are zero."""
    groups = deepfm_groups() | {"wide": [Embedding("b", dim=2, init=uniform(-1, 1))]}
    other = deepfm_step(embeddings=groups)
    old = [f"{g}/{f}" for g in ("emb", "bias") for f in FEATURES]
    loaded, _ = load(saved, other, fresh(other), tables=old)
    found = content(other, loaded)
    assert taken(found, lambda name: name != "wide/b") == content(step, state)
    known = [key for key in found if "wide/b" in key]
    assert len(known) > 20
    first = uniform_of(other, [key[-1] for key in known])
    for key, values in zip(known, first, strict=True):
        (weight, *moments) = dict(found[key][0])["wide/b"]
        assert weight == pytest.approx(values, abs=1e-6)
        assert all(abs(x) < 1 for x in weight)
        assert moments == [[0.0, 0.0]] * 2


def uniform_of(step: Step, ids: list[int]) -> list[list[float]]:
    """What 'wide/b' of a new row is."""
    ((plan, v),) = [(t, v) for t in step.plan.tables for v, columns in enumerate(t.vocabularies) if len(columns) == 3]
    keys, params = (x[v].expand(len(ids), *x[v].shape) for x in initializer_tensors(plan, step.seed))
    column = plan.vocabularies[v][2]
    assert column.name == "wide/b"
    return initial_values(torch.tensor(ids), keys, params)[:, column.first : column.first + column.dim].tolist()


def test_one_of_two_tables_of_a_row(step, state, saved):
    """Embeddings without biases: the biases of known ids are as in a new row."""
    loaded, _ = load(saved, step, fresh(step), tables=[f"emb/{f}" for f in FEATURES])
    found = content(step, loaded)
    assert taken(found, lambda n: n.startswith("emb")) == taken(content(step, state), lambda n: n.startswith("emb"))
    biases = [dict(values)[key[1]] for key, (values, *_) in found.items()]
    assert all(m == [0.0] and v == [0.0] for _, m, v in biases)
    assert len({w for (w,), _, _ in biases}) > 100


@pytest.mark.parametrize(
    "sparse", [sparse_sgd(1e-2), sparse_adagrad(1e-2), sparse_rowwise_adagrad(1e-2), sparse_ftrl(1e-2)]
)
@pytest.mark.parametrize("dense", [sgd(1e-2), adagrad(1e-2)])
def test_every_optimiser_s_state(tmp_path, sparse, dense):
    """Saved, and taken on by a model with one table more in its rows: all that was kept is where it belongs."""
    step = deepfm_step(sparse_optimizer=sparse, dense_optimizer=dense)
    state = some_state(step)
    saved = save(tmp_path / "a", step, state, number=8, loop=LOOP)
    loaded, _ = load(saved, step, fresh(step))
    again = save(tmp_path / "b", step, loaded, number=8, loop=LOOP)
    assert {p.name: sha256(p) for p in again.iterdir()} == {p.name: sha256(p) for p in saved.iterdir()}
    groups = {"wide": [Embedding("b", dim=2, init=uniform(-1, 1))]} | deepfm_groups()
    other = deepfm_step(embeddings=groups, sparse_optimizer=sparse, dense_optimizer=dense)
    names = [f"{g}/{f}" for g in ("emb", "bias") for f in FEATURES]
    wider, _ = load(saved, other, fresh(other), tables=names)
    back, _ = load(save(tmp_path / "c", other, wider, number=8, loop=LOOP), step, fresh(step))
    assert content(step, back) == content(step, state)
    for table, plan in zip(wider.tables, other.plan.tables, strict=True):
        assert table.rows.shape[2] == plan.width + len(sparse.row_slots) * len(plan.dims)


def test_every_table_has_steps_of_its_own(saved, tmp_path):
    """One that was taken from a checkpoint, and one that began later."""
    groups = deepfm_groups() | {"wide": [Embedding("b", dim=2)]}
    step = deepfm_step(embeddings=groups)
    state, _ = load(saved, step, fresh(step), tables=[f"{g}/{f}" for g in ("emb", "bias") for f in "ac"])
    state = on_threads(1, trained, step, state, deepfm_batches(2))
    assert [int(t.step) for t in state.tables] == [10, 2]
    loaded, _ = load(save(tmp_path, step, state, number=10, loop=LOOP), step, fresh(step))
    assert [int(t.step) for t in loaded.tables] == [10, 2]
    assert content(step, loaded) == content(step, state)


def test_dense_alone(state, saved, step):
    loaded, loop = load(saved, step, fresh(step), tables=())
    assert all(torch.equal(loaded.params[n], state.params[n]) for n in state.params)
    assert (int(loaded.dense.step), int(loaded.tables[0].num_rows), int(loaded.tables[0].step)) == (8, 0, 0)
    assert loop["step"] == 8


def test_tables_alone(state, saved, step):
    loaded, _ = load(saved, step, fresh(step), dense=())
    assert content(step, loaded) == content(step, state)
    assert all(torch.equal(loaded.params[n], p) for n, p in deepfm_params().items())
    assert int(loaded.dense.step) == 0


def test_rows_that_lived_apart_cannot_share(saved):
    """'emb/a' was read by one feature and 'emb/b' by another; a model that keeps both in one row cannot have them."""
    groups = {"emb": [Embedding("a", dim=DIM)], "more": [Embedding("a", dim=DIM)]}
    other = deepfm_step(embeddings=groups, forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None])
    with pytest.raises(ValueError, match=r"got other ids for each of \['emb/a', 'more/a'\], expected the same"):
        load(saved, other, fresh(other), names={"more/a": "emb/b"})


def test_two_tables_from_one(saved):
    groups = {"emb": [Embedding("a", dim=DIM)], "more": [Embedding("b", dim=DIM)]}
    other = deepfm_step(embeddings=groups, forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None])
    with pytest.raises(ValueError, match=r"table 'more/b' shares its rows there with another table"):
        load(saved, other, fresh(other), names={"more/b": "emb/a"})


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ("tables", r"tables: got \['x'\], expected some of \['bias/a'"),
        ("dense", r"dense: got \['x'\], expected some of \['dnn.0.bias'"),
    ],
)
def test_unknown_names(saved, step, argument, match):
    arguments: dict[str, Any] = {argument: ["x"]}
    with pytest.raises(ValueError, match=match):
        load(saved, step, fresh(step), **arguments)


def test_loading_writes_nothing(saved, step):
    before = [(p.name, sha256(p)) for p in saved.iterdir()]
    load(saved, step, fresh(step))
    assert [(p.name, sha256(p)) for p in saved.iterdir()] == before
    assert steps(saved.parent) == [saved]
