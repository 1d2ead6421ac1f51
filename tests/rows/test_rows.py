"""Row surgery against a dict of vectors."""

import math
import random
import statistics as exact
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from recfx import optim, rows
from recfx.checkpoint import Saver, load
from recfx.embeddings import Embedding
from recfx.rows import arrow
from recfx.table import policies, stats
from recfx.table.policies import Life
from tests.conftest import DIM, deepfm_batches, deepfm_params, deepfm_step
from tests.reference import EXTREMES, MAX_INT64, MIN_INT64

IDS = st.sampled_from(EXTREMES) | st.integers(-9, 9)


def trained(step, num=4):
    state = step.init(deepfm_params())
    for batch in deepfm_batches(num):
        state, _ = step.update_(state, batch)
    return state


def vectors(ids, dim=DIM):
    numbers = [math.sin(i % 1000 + d) for i in ids for d in range(dim)]
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, dim)


def as_dict(step, state, table):
    """id -> weight, read from the state by hand."""
    t, plan = state.tables[0], step.plan.tables[0]
    ((v, column),) = [(v, c) for v, columns in enumerate(plan.vocabularies) for c in columns if c.name == table]
    return {
        int(t.ids[row]): t.rows[row, 0, column.first : column.first + column.dim].tolist()
        for row in range(int(t.num_rows))
        if int(t.vocabularies[row]) == v
    }


@given(
    changes=st.lists(
        st.tuples(st.sampled_from(["write", "delete"]), st.lists(IDS, unique=True, max_size=6)), max_size=8
    ),
    asked=st.lists(IDS, max_size=8),
)
@settings(max_examples=30, deadline=None)
def test_any_writes_and_deletions_are_those_of_a_dict(changes, asked):
    step = deepfm_step()
    state, oracle, other = step.init(deepfm_params()), {}, {}
    for number, (what, ids) in enumerate(changes):
        if what == "write":
            weight = vectors(ids) + number
            state = rows.write_(step, state, "emb/a", torch.tensor(ids, dtype=torch.int64), weight)
            oracle |= dict(zip(ids, weight.tolist(), strict=True))
            other |= {i: None for i in ids if i not in other}
        else:
            state = rows.delete_(step, state, "emb/a", torch.tensor(ids, dtype=torch.int64))
            for i in ids:
                oracle.pop(i, None)
        assert as_dict(step, state, "emb/a") == oracle
        assert as_dict(step, state, "bias/a").keys() == oracle.keys()
        assert as_dict(step, state, "emb/b") == {}
    got = rows.read(step, state, "emb/a", torch.tensor(asked, dtype=torch.int64))
    assert got.id.tolist() == asked
    assert got.known.tolist() == [i in oracle for i in asked]
    assert got.weight.tolist() == [oracle.get(i, [0.0] * DIM) for i in asked]
    batches = list(rows.batches(step, state, "emb/a", num_rows=2))
    assert all(1 <= len(batch) <= 2 for batch in batches)
    read = [(r["id"], r["weight"]) for batch in batches for r in batch.to_pylist()]
    assert read == list(as_dict(step, state, "emb/a").items())


def test_a_written_row_is_the_one_that_training_would_have_made_but_for_its_vector():
    step = deepfm_step()
    written, by_training = step.init(deepfm_params()), trained(step, 1)
    ids = torch.tensor(sorted(as_dict(step, by_training, "emb/a")))
    written = rows.write_(step, written, "emb/a", ids, vectors(ids.tolist()))
    untrained = deepfm_step(sparse_optimizer=optim.sparse_adamw(0.0, weight_decay=0.0))
    initial = rows.read(untrained, trained(untrained, 1), "bias/a", ids)
    torch.testing.assert_close(rows.read(step, written, "bias/a", ids).weight, initial.weight, rtol=1e-6, atol=0)
    assert not rows.read(step, written, "emb/a", ids).slots["m"].any()


def test_overwriting_changes_one_table_and_starts_its_optimiser_afresh():
    step = deepfm_step()
    state = trained(step)
    ids = torch.tensor(sorted(as_dict(step, state, "emb/b"))[:5])
    before = {name: rows.read(step, state, name, ids) for name in ("emb/b", "bias/b")}
    assert before["emb/b"].slots["m"].any()
    state = rows.write_(step, state, "emb/b", ids, vectors(ids.tolist()))
    after = {name: rows.read(step, state, name, ids) for name in before}
    assert torch.equal(after["emb/b"].weight, vectors(ids.tolist()))
    assert not any(slot.any() for slot in after["emb/b"].slots.values())
    assert torch.equal(after["bias/b"].weight, before["bias/b"].weight)
    for name in ("m", "v"):
        assert torch.equal(after["bias/b"].slots[name], before["bias/b"].slots[name])
    assert torch.equal(after["emb/b"].first_step, before["emb/b"].first_step)
    slots = {"v": torch.ones(5, DIM)}
    state = rows.write_(step, state, "emb/b", ids, vectors(ids.tolist()), slots)
    again = rows.read(step, state, "emb/b", ids).slots
    assert again["v"].eq(1).all()
    assert not again["m"].any()


def test_surgery_is_not_training_in_the_counters_and_steps_go_on():
    step = deepfm_step(life=Life())
    state, plain = trained(step), trained(step)
    hits, ids = stats(state.tables[0]), torch.tensor([10**12, 10**12 + 1])
    state = rows.write_(step, state, "emb/c", ids, vectors([1, 2]))
    after, read = stats(state.tables[0]), rows.read(step, state, "emb/c", ids)
    assert after.size == hits.size + 2
    assert after[4:] == hits[4:]
    assert 0 < after.hit_rate < 1
    assert read.first_step.tolist() == read.last_step.tolist() == [4, 4]
    assert read.num_steps.tolist() == [0, 0]
    state = rows.delete_(step, state, "emb/c", ids)
    assert torch.equal(state.tables[0].tally, plain.tables[0].tally)
    for batch in deepfm_batches(3, seed=5):
        (state, a), (plain, b) = step.update_(state, batch), step.update_(plain, batch)
        assert torch.equal(a.logit, b.logit)
    assert as_dict(step, state, "emb/a") == as_dict(step, plain, "emb/a")


def test_a_checkpoint_of_what_changed_holds_what_surgery_wrote(tmp_path):
    step = deepfm_step()
    state = trained(step)
    known = torch.tensor(sorted(as_dict(step, state, "emb/a"))[:3])
    with Saver(tmp_path / "parts", step, full_every=9) as saver:
        saver.save(state, number=4, loop={})
        state = rows.write_(
            step, state, "emb/a", torch.cat([known[:1], torch.tensor([MIN_INT64 + 5])]), vectors([3, 4])
        )
        state = rows.delete_(step, state, "emb/a", known[1:])
        state = rows.write_(step, state, "emb/b", torch.tensor([MAX_INT64]), vectors([5]))
        path = saver.save(state, number=5, loop={})
    back, _ = load(path, step, step.init(deepfm_params()))
    for table in ("emb/a", "bias/a", "emb/b", "emb/c"):
        assert as_dict(step, back, table) == as_dict(step, state, table)
    a, b = state.tables[0], back.tables[0]
    live = torch.nonzero(a.vocabularies[: int(a.num_rows)] >= 0)[:, 0]
    for name in ("ids", "vocabularies", "born", "counts", "rows"):
        assert torch.equal(getattr(a, name)[live], getattr(b, name)[live]), name
    assert torch.equal(a.free_rows[: int(a.num_free)], b.free_rows[: int(b.num_free)])


@pytest.mark.parametrize(
    "optimizer", [optim.sparse_adamw(1e-2), optim.sparse_rowwise_adagrad(1e-2), optim.sparse_sgd(1e-2)]
)
def test_parquet_and_back_is_the_same_table(tmp_path, optimizer):
    step = deepfm_step(sparse_optimizer=optimizer)
    state, other = trained(step), step.init(deepfm_params())
    file = tmp_path / "emb_a.parquet"
    rows.export_parquet(step, state, "emb/a", file)
    rows.export_parquet(step, state, "bias/a", tmp_path / "bias_a.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bias_a.parquet", "emb_a.parquet"]
    plain = parquet.read_table(file)
    assert dict(zip(plain["id"].to_pylist(), plain["weight"].to_pylist(), strict=True)) == as_dict(step, state, "emb/a")
    other = rows.import_parquet_(step, other, "emb/a", file)
    other = rows.import_parquet_(step, other, "bias/a", tmp_path / "bias_a.parquet")
    ids = torch.tensor(plain["id"].to_pylist())
    for table in ("emb/a", "bias/a"):
        a, b = rows.read(step, state, table, ids), rows.read(step, other, table, ids)
        assert torch.equal(a.weight, b.weight)
        assert a.slots.keys() == b.slots.keys() == set(step.slots)
        assert all(torch.equal(a.slots[name], b.slots[name]) for name in a.slots)


def test_row_slots_are_those_of_their_own_table():
    step = deepfm_step(sparse_optimizer=optim.sparse_rowwise_adagrad(1e-2))
    state = trained(step)
    ids = torch.tensor(sorted(as_dict(step, state, "emb/a")))
    emb, bias = (rows.read(step, state, name, ids).slots["sum"] for name in ("emb/a", "bias/a"))
    t = state.tables[0]
    row = [int(((t.ids[: int(t.num_rows)] == i) & (t.vocabularies[: int(t.num_rows)] == 0)).nonzero()) for i in ids]
    assert torch.equal(torch.cat([emb, bias], dim=1), t.rows[row, 0, DIM + 1 :])
    state = rows.write_(step, state, "bias/a", ids, torch.zeros(len(ids), 1))
    assert torch.equal(rows.read(step, state, "emb/a", ids).slots["sum"], emb)
    assert not rows.read(step, state, "bias/a", ids).slots["sum"].any()


def test_an_empty_table_and_a_file_of_other_types(tmp_path):
    step = deepfm_step()
    state = step.init(deepfm_params())
    rows.export_parquet(step, state, "emb/a", tmp_path / "none.parquet")
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0
    assert rows.import_parquet_(step, state, "emb/a", tmp_path / "none.parquet") is state
    assert list(rows.batches(step, state, "emb/a")) == []
    table = pa.table({"weight": [[0.5] * DIM, [1.5] * DIM], "name": ["x", "y"], "id": pa.array([3, 4], pa.int32())})
    parquet.write_table(table, tmp_path / "vectors.parquet")  # lists of float64, ids of 32 bits, a column too many
    state = rows.import_parquet_(step, state, "emb/a", tmp_path / "vectors.parquet")
    assert as_dict(step, state, "emb/a") == {3: [0.5] * DIM, 4: [1.5] * DIM}
    table = table.set_column(2, "id", pa.array([2**64 - 1, 2**63], pa.uint64()))
    parquet.write_table(table, tmp_path / "unsigned.parquet")
    state = rows.import_parquet_(step, state, "emb/a", tmp_path / "unsigned.parquet")
    assert {-1: [0.5] * DIM, -(2**63): [1.5] * DIM}.items() <= as_dict(step, state, "emb/a").items()


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"id": [1]}, r"columns \['id'\], expected 'id' and 'weight'"),
        ({"id": [1], "weight": [[1.0]]}, r"column 'weight' of list.*expected fixed_size_list"),
        ({"id": [1], "weight": [None]}, "nulls in column 'weight'"),
        ({"id": [1], "weight": [[None] * DIM]}, "nulls in column 'weight'"),
        ({"id": [None, 1], "weight": [[1.0] * DIM] * 2}, "nulls in column 'id'"),
        ({"id": ["x"], "weight": [[1.0] * DIM]}, "column 'id' of string, expected int64"),
        ({"id": [b"7"], "weight": [[1.0] * DIM]}, "column 'id' of binary, expected int64"),
        ({"id": ["7"], "weight": [[1.0] * DIM]}, "column 'id' of string, expected int64"),
        ({"id": [True], "weight": [[1.0] * DIM]}, "column 'id' of bool, expected int64"),
        ({"id": [7.0], "weight": [[1.0] * DIM]}, "column 'id' of double, expected int64"),
        ({"id": [datetime(2026, 1, 1)], "weight": [[1.0] * DIM]}, r"column 'id' of timestamp\[us\], expected int64"),
        ({"id": [1], "weight": [["1"] * DIM]}, "column 'weight' of list<.*string>, expected fixed_size_list"),
        ({"id": [0.5], "weight": [[1.0] * DIM]}, "column 'id' of double, expected int64"),
        ({"id": [1, 1], "weight": [[1.0] * DIM] * 2}, "ids: got 1 more than once"),
        ({"id": [1, 2, 3, 1], "weight": [[1.0] * DIM] * 4}, "ids: got 1 more than once"),
        ({"id": [1, 2, 3, 4], "weight": [[1.0] * DIM] * 3 + [[math.nan] * DIM]}, "weight: got values that are not"),
        ({"id": [*range(9)], "weight": [[1.0] * DIM] * 9}, "table 'emb/a': got 9 new ids, expected at most 8"),
        ({"id": [1], "weight": [[math.inf] * DIM]}, "weight: got values that are not finite"),
    ],
)
def test_wrong_files_are_named_and_nothing_of_them_is_written(tmp_path, monkeypatch, columns, error):
    monkeypatch.setattr("recfx.rows.arrow.BATCH_ROWS", 2)  # what is wrong may come after batches that are right
    step = deepfm_step(max_rows=8)
    state, file = step.init(deepfm_params()), tmp_path / "bad.parquet"
    parquet.write_table(pa.table(columns), file)
    with pytest.raises(ValueError, match=rf"bad.parquet: .*{error}"):
        rows.import_parquet_(step, state, "emb/a", file)
    assert as_dict(step, state, "emb/a") == {}


def test_an_import_takes_a_file_to_where_the_table_is(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"id": [1, 2], "weight": [[0.5] * DIM] * 2}), tmp_path / "a.parquet")
    elsewhere, seen = torch.zeros(0, DIM, dtype=torch.int64, device="meta"), []
    view = SimpleNamespace(table=SimpleNamespace(ids=elsewhere), tensors={"weight": elsewhere})
    monkeypatch.setattr(arrow, "view_of", lambda *_: view)
    monkeypatch.setattr(arrow, "check_values", lambda _, ids, values: seen.extend([ids, *values.values()]))
    monkeypatch.setattr(arrow, "check_ids", lambda *given: seen.append(given[-1]))
    monkeypatch.setattr(arrow, "write_", lambda *given: seen.extend(given[-3:-1]))
    rows.import_parquet_(None, None, "emb/a", tmp_path / "a.parquet")
    assert [(t.device.type, len(t)) for t in seen] == [("meta", 2)] * 5


def test_an_import_into_a_full_table_overwrites_and_brings_nothing_new(tmp_path):
    step, file = deepfm_step(max_rows=8), tmp_path / "rows.parquet"
    full = rows.write_(step, step.init(deepfm_params()), "emb/a", torch.arange(8), vectors(range(8)))
    rows.export_parquet(step, full, "emb/a", file)
    other = rows.write_(step, step.init(deepfm_params()), "emb/a", torch.arange(8), torch.zeros(8, DIM))
    other = rows.import_parquet_(step, other, "emb/a", file)
    assert as_dict(step, other, "emb/a") == as_dict(step, full, "emb/a")
    other = rows.write_(
        step, rows.delete_(step, other, "emb/a", torch.tensor([7])), "emb/b", torch.tensor([1]), vectors([1])
    )
    before = as_dict(step, other, "emb/a")
    with pytest.raises(ValueError, match=r"rows.parquet: table 'emb/a': got 1 new ids, expected at most 0"):
        rows.import_parquet_(step, other, "emb/a", file)
    assert as_dict(step, other, "emb/a") == before


def test_an_export_names_the_path_that_it_was_given(tmp_path):
    step = deepfm_step()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    state = step.init(deepfm_params())
    for path, error in (
        (tmp_path / "nowhere" / "a.parquet", FileNotFoundError),
        (tmp_path / "file" / "a.parquet", NotADirectoryError),
        (tmp_path / "folder", IsADirectoryError),
    ):
        with pytest.raises(error, match=rf"path: got {path}, expected a file that can be written") as raised:
            rows.export_parquet(step, state, "emb/a", path)
        assert "unfinished" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("emb/x", torch.tensor([1]), torch.zeros(1, DIM)),
            ValueError,
            "table: got 'emb/x', expected one of .*'emb/a'",
        ),
        (("emb/a", torch.tensor([1.0]), torch.zeros(1, DIM)), TypeError, r"ids: got torch.float32 \[1\], expected"),
        (("emb/a", [1], torch.zeros(1, DIM)), TypeError, "ids: got list, expected torch.int64"),
        (("emb/a", torch.tensor([1]), torch.zeros(1, 3)), ValueError, rf"weight: got \[1, 3\], expected \[1, {DIM}\]"),
        (("emb/a", torch.tensor([1]), torch.zeros(1, DIM).double()), TypeError, "weight: got torch.float64"),
        (
            ("emb/a", torch.tensor([1], device="meta"), torch.zeros(1, DIM)),
            ValueError,
            "ids: got a tensor on meta, expected cpu, where the table is",
        ),
        (("emb/a", torch.tensor([1]), torch.zeros(1, DIM, device="meta")), ValueError, "weight: got a tensor on meta"),
        (
            ("emb/a", torch.tensor([1]), torch.zeros(1, DIM), {"x": torch.zeros(1, DIM)}),
            ValueError,
            r"slots: got 'x', expected some of \['m', 'v'\]",
        ),
        (
            ("emb/a", torch.arange(9), torch.zeros(9, DIM)),
            ValueError,
            "table 'emb/a': got 9 new ids, expected at most 8. Raise max_rows",
        ),
    ],
)
def test_wrong_writes_are_named_and_write_nothing(arguments, error, message):
    step = deepfm_step(max_rows=8)
    state = step.init(deepfm_params())
    with pytest.raises(error, match=message):
        rows.write_(step, state, *arguments)
    assert int(state.tables[0].num_rows) == 0


def test_rows_are_written_only_between_steps():
    step = deepfm_step(accumulation=2)
    state, _ = step.update_(step.init(deepfm_params()), deepfm_batches(1)[0])
    with pytest.raises(ValueError, match="state: got a step in progress, expected none"):
        rows.write_(step, state, "emb/a", torch.tensor([1]), torch.zeros(1, DIM))
    with pytest.raises(ValueError, match="state: got a step in progress, expected none"):
        rows.delete_(step, state, "emb/a", torch.tensor([1]))


def test_more_rows_than_a_step_may_touch_fit_in_one_write():
    step = deepfm_step(max_unique=4)
    ids = torch.arange(50)
    state = rows.write_(step, step.init(deepfm_params()), "emb/a", ids, vectors(range(50)))
    assert torch.equal(rows.read(step, state, "emb/a", ids).weight, vectors(range(50)))
    assert stats(state.tables[0]).refused == 0


def test_statistics_are_those_of_the_rows_one_by_one():
    step = deepfm_step(life=Life(expire=policies.unseen_for(3), every=1))
    state = step.init(deepfm_params())
    for number, batch in enumerate(deepfm_batches(6), start=1):
        state, _ = step.update_(state, batch)
        state = step.sweep_(state, number)
    got = rows.statistics(step, state, "emb/a")
    read = [row for batch in rows.batches(step, state, "emb/a") for row in batch.to_pylist()]
    assert got.num_rows == len(read) > 5
    numbers = {
        "norm": [float(np.linalg.norm(np.array(row["weight"]))) for row in read],
        "age": [6 - row["first_step"] for row in read],
        "idle": [6 - row["last_step"] for row in read],
        "num_steps": [row["num_steps"] for row in read],
    }
    assert max(numbers["num_steps"]) > 1
    for name, values in numbers.items():
        rising = sorted(values)
        expected = exact.fmean(values), rising[0], exact.median_low(values), rising[math.ceil(0.99 * len(read)) - 1]
        assert getattr(got, name) == pytest.approx((*expected, rising[-1]), rel=1e-6)
    nothing = rows.statistics(step, step.init(deepfm_params()), "emb/a")
    assert nothing.num_rows == 0
    assert math.isnan(nothing.norm.mean)


def test_tables_of_another_shape_are_found_by_name():
    groups = {
        "wide": [Embedding("a", dim=5), Embedding("b", dim=3)],
        "shared": [Embedding("c", dim=3, shared_name="s")],
    }
    step = deepfm_step(embeddings=groups)
    state, rng = step.init(deepfm_params()), random.Random(0)
    expected = {}
    for table, dim in (("wide/a", 5), ("wide/b", 3), ("s", 3)):
        ids = rng.sample(range(100), 20)
        state = rows.write_(step, state, table, torch.tensor(ids), vectors(ids, dim))
        expected[table] = ids, vectors(ids, dim)
    for table, (ids, weight) in expected.items():
        assert torch.equal(rows.read(step, state, table, torch.tensor(ids)).weight, weight)
        assert rows.statistics(step, state, table).num_rows == 20
