"""Checkpoints of RecIS 1.0 to 1.2: how each counts steps and names blocks, step filters and dense moments."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from recfx.recis import load_recis
from recfx.rows import read
from recfx.table.policies import Life, unseen_for
from tests.recis.recis_fixture import slice_of, write_recis
from tests.recis.test_recis import (
    NAMES,
    SIZES,
    as_dict,
    by_name,
    check_rows,
    edit_blocks,
    edit_json,
    everything,
    expected,
    fresh,
    params_of,
    saved_tables,
    tf_step,
    trained_seed,
)
from tests.reference import EXTREMES

# Steps.


def test_steps_by_the_powers_of_betas(tmp_path):
    """Multiplied in float32 step by step, as there, while the counter stays at 0."""
    step, powers, betas = tf_step(), np.ones(2, np.float32), (0.9, 0.999)
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), num_steps=0)
    for t in range(87_001):
        if t in (0, 1, 2, 10, 600, 829, 10_000, 54_321, 87_000):
            write = {f"sparse_adamw_tf_beta{i}^ ": (torch.tensor(p), True) for i, p in enumerate(powers.tolist(), 1)}
            edit_blocks(lambda b, write=write: b.update(write))(folder)
            state = load_recis(folder, step, fresh(step), names=NAMES)
            assert int(state.tables[0].step) == t
        powers = (powers.astype(float) * betas).astype(np.float32)


def test_steps_of_other_betas(tmp_path):
    step, how = tf_step(), {"num_steps": 30, "betas": (0.8, 0.99)}
    folder = write_recis(tmp_path / "1.0", saved_tables(lambda _: [1]), counts_steps=False, **how)
    with pytest.raises(
        ValueError, match=r"powers of betas that are 63.54 and 301.4 steps of \(0.9, 0.999\), .* Give the b"
    ):
        load_recis(folder, step, fresh(step), names=NAMES)
    for betas, num_steps in (((0.8, 0.99), 30), ((0.0, 0.99), 30)):
        assert int(load_recis(folder, step, fresh(step), names=NAMES, betas=betas).tables[0].step) == num_steps
    folder = write_recis(tmp_path / "1.1", saved_tables(lambda _: [1]), **how)
    assert int(load_recis(folder, step, fresh(step), names=NAMES).tables[0].step) == 30  # which it counted
    for betas in ((1.0, 0.99), (0.9, 0.0)):
        with pytest.raises(ValueError, match=r"betas: got \(.*\), expected two numbers below 1"):
            load_recis(folder, step, fresh(step), names=NAMES, betas=betas)


def test_a_run_that_began_before_steps_were_counted(tmp_path):
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), num_steps=500)
    edit_blocks(lambda b: b.update({"sparse_adamw_tf_step^ ": (torch.tensor([20]), True)}))(folder)
    step = tf_step()
    assert int(load_recis(folder, step, fresh(step), names=NAMES).tables[0].step) == 20
    state = load_recis(folder, step, fresh(step), names=NAMES, betas=(0.9, 0.999))
    assert int(state.tables[0].step) == 500


# Names of blocks.


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("with_keys", [True, False])
def test_blocks_with_the_names_of_their_tensors(tmp_path, num_ranks, with_keys):
    step, tables = tf_step(), saved_tables(lambda name: [*range(-9, 9 + len(name)), *EXTREMES])
    folder = write_recis(tmp_path, tables, num_ranks=num_ranks, by_slice=True)
    if not with_keys:
        (folder / "tensorkey.json").unlink()
    state = load_recis(folder, step, fresh(step), names=NAMES)
    check_rows(as_dict(step, state), expected(step, tables, num_ranks))
    assert int(state.tables[0].step) == 7


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_slice_is_missing(tmp_path, gone):
    folder = write_recis(tmp_path, saved_tables(lambda _: [1, 2, 3, 4]), num_ranks=3, by_slice=True)
    part = re.compile(rf".*@[^@]*\^{slice_of(gone, 3)}")
    edit_json("index", lambda c: [c["block_index"].pop(k) for k in [*c["block_index"]] if part.fullmatch(k)])(folder)
    step = tf_step()
    with pytest.raises(ValueError, match=r"index: got slices \[\(.*expected \(first, end, size\) one after the other"):
        load_recis(folder, step, fresh(step), names=NAMES)


# Step filters.

HASHED = f"sparse.embedding_engine._ht.CoalescedHashtable_{'0f' * 32}._hashtable._filter_hook_impl._global_step"


def named_steps(steps):
    """As of 1.2.18: by table."""
    return {f"{table}@filter_global_step": torch.tensor([s]) for table, s in steps.items()}


def hashed_steps(steps):
    """Before: by the options of coalesced tables."""
    names = (HASHED.replace("0f", f"{i:02x}") for i in range(len(set(steps.values())) + 1))
    return dict(zip(names, (torch.tensor([s]) for s in [*steps.values(), *steps.values()]), strict=False))


def with_ages(seen_of):
    """The tables of the DeepFM step, each with a step filter."""
    tables = saved_tables(lambda _: seen_of)
    return {name: saved._replace(seen=dict(seen_of)) for name, saved in tables.items()}


@pytest.mark.parametrize("steps_of", [named_steps, hashed_steps])
@pytest.mark.parametrize(("now", "idle"), [(100, {1: 0, 2: 0, 3: 39, 4: 99}), (99, {1: 0, 2: 0, 3: 39, 4: 99})])
def test_rows_keep_the_age_of_their_step_filter(tmp_path, steps_of, now, idle):
    """A batch looks up at the filter's step and raises it after: the hook that saves may come before or after."""
    tables = with_ages({1: 99, 2: 99, 3: 60, 4: 0})
    model = {"w": torch.zeros(1), **steps_of(dict.fromkeys(tables, now))}
    step = tf_step()
    for num_ranks in (1, 2):
        folder = write_recis(tmp_path / f"{num_ranks}", tables, num_steps=70, num_ranks=num_ranks, model=model)
        state = load_recis(folder, step, fresh(step), names=NAMES)
        check_rows(as_dict(step, state), expected(step, tables, num_ranks))
        for name in NAMES:
            rows = read(step, state, name, torch.tensor([1, 2, 3, 4]))
            assert rows.last_step.tolist() == [70 - i for i in idle.values()]
            assert rows.first_step.tolist() == [70 - i for i in idle.values()]


def test_ages_are_batches_there_and_steps_here(tmp_path):
    tables = with_ages({1: 99, 2: 96, 3: 95, 4: 11})
    folder = write_recis(tmp_path, tables, filter_slot="mine", model=named_steps(dict.fromkeys(tables, 100)))
    step = tf_step(accumulation=4)
    state = load_recis(folder, step, fresh(step), names=NAMES)
    rows = read(step, state, "emb/b", torch.tensor([1, 2, 3, 4]))
    assert rows.last_step.tolist() == [7, 7, 6, 7 - 22]
    state = load_recis(folder, step, fresh(step), names=NAMES, moments=False)  # which counts from 0
    assert read(step, state, "emb/b", torch.tensor([1, 4])).last_step.tolist() == [0, -22]


def test_an_old_row_is_evicted_when_it_would_have_been(tmp_path):
    """Seen last at step 60 of 100, it goes at the check after 110, if rows unseen for 50 steps go."""
    tables = with_ages({1: 99, 3: 59})
    folder = write_recis(tmp_path, tables, num_steps=100, model=named_steps(dict.fromkeys(tables, 100)))
    step = tf_step(life=Life(expire=unseen_for(50), every=1))
    state = load_recis(folder, step, fresh(step), names=NAMES)
    for now, known in ((109, [True, True]), (110, [True, False]), (149, [True, False]), (150, [False, False])):
        for t in state.tables:
            t.step.fill_(now)
        state = step.sweep_(state, now)
        assert read(step, state, "emb/b", torch.tensor([1, 3])).known.tolist() == known


def test_rows_that_two_tables_share_are_as_young_as_the_younger(tmp_path):
    tables = with_ages({1: 10, 2: 60})
    tables["b_bias"] = tables["b_bias"]._replace(seen={1: 30, 2: 20})
    tables["c_bias"] = tables["c_bias"]._replace(seen=None)  # without a filter: touched by the last step
    folder = write_recis(tmp_path, tables, num_steps=100, model=named_steps(dict.fromkeys(tables, 100)))
    step = tf_step()
    state = load_recis(folder, step, fresh(step), names=NAMES)
    for table, last in (("emb/a", [11, 61]), ("emb/b", [31, 61]), ("bias/b", [31, 61]), ("emb/c", [100, 100])):
        assert read(step, state, table, torch.tensor([1, 2])).last_step.tolist() == last
    some = load_recis(folder, step, fresh(step), names=NAMES, tables=["bias/b"])
    assert read(step, some, "bias/b", torch.tensor([1, 2])).last_step.tolist() == [31, 21]


def test_filters_of_several_steps(tmp_path):
    """By name each table has its own; a hash does not say whose it is."""
    tables = with_ages({1: 50})
    steps = {name: 100 if name == "b_emb" else 90 for name in tables}
    folder = write_recis(tmp_path / "named", tables, num_steps=100, model=named_steps(steps))
    step = tf_step()
    state = load_recis(folder, step, fresh(step), names=NAMES, tables=["emb/a", "emb/b"])
    assert [read(step, state, f"emb/{f}", torch.tensor([1])).last_step.tolist() for f in "ab"] == [[61], [51]]
    folder = write_recis(tmp_path / "hashed", tables, num_steps=100, model=hashed_steps(steps))
    with pytest.raises(
        ValueError, match=r"model.pt: table 'a_emb': got steps .* expected 'a_emb@filter_global_step' or"
    ):
        load_recis(folder, step, fresh(step), names=NAMES)


FILTER_DAMAGE = {
    "no model": (lambda m: None, r"model.pt: .*FileNotFoundError"),
    "no step": (lambda m: m.pop("b_emb@filter_global_step"), r"table 'b_emb': got steps \{\} of step filters"),
    "a float": (
        lambda m: m.update({"a_emb@filter_global_step": torch.ones(1)}),
        r"'a_emb@filter_global_step': got tensor",
    ),
    "two": (
        lambda m: m.update({"a_emb@filter_global_step": torch.ones(2).long()}),
        r"'a_emb@filter_global_step': got tens",
    ),
}


@pytest.mark.parametrize("what", FILTER_DAMAGE)
def test_damage_of_filter_steps(tmp_path, what):
    damage, message = FILTER_DAMAGE[what]
    tables = with_ages({1: 50, 2: 60})
    model = named_steps(dict.fromkeys(tables, 100))
    damage(model)
    folder = write_recis(tmp_path / "there", tables, model=None if what == "no model" else model)
    step = tf_step()
    state = fresh(step)
    with pytest.raises(ValueError, match=message):
        load_recis(folder, step, state, names=NAMES)
    assert everything(step, state, tmp_path / "a") == everything(step, fresh(step), tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b, n: b.update({n: (torch.zeros(2, dtype=torch.int64), False)}),
            r"torch.int64 \[2\], expected .*\[2, 1\]",
        ),
        (lambda b, n: b.update({n: (torch.tensor([[-1], [3]]), False)}), "got step -1, expected at least 0"),
        (lambda b, n: b.pop(n), r"tensor 'a_emb.step_filter/part_0_1'"),
    ],
)
def test_damage_of_filter_slots(tmp_path, change, message):
    tables = with_ages({1: 50, 2: 60})
    folder = write_recis(tmp_path, tables, model=named_steps(dict.fromkeys(tables, 100)))
    edit_blocks(lambda b: change(b, "a_emb.step_filter/part_0_1"))(folder)
    step = tf_step()
    with pytest.raises(ValueError, match=message):
        load_recis(folder, step, fresh(step), names=NAMES)


# The dense part.


def named_in_groups(model, optimizer, *, names_for_keys):
    """What a named AdamW saves, in two groups and in another order than the model's: RecIS's by name, torch's by number
    with names next to it."""
    names = [name for name, _ in model.named_parameters()][::-1]
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    keys = {name: name if names_for_keys else i for i, name in enumerate(names)}
    groups = [{"params": [keys[n] for n in part], "param_names": part, "lr": 1e-2} for part in (names[:3], names[3:])]
    return {"state": {keys[name]: state[name] for name in names if name in state}, "param_groups": groups}


@pytest.mark.parametrize("names_for_keys", [True, False])
@pytest.mark.parametrize("steps_of", [named_steps, hashed_steps])
def test_dense_moments_by_name(tmp_path, names_for_keys, steps_of):
    """With step filters and a buffer in model.pt, which no optimiser knows."""
    model, optimizer = trained_seed(**SIZES)
    saved = {"seen": torch.zeros(3), **steps_of({"a_emb": 5}), **model.state_dict()}
    extra = {"recis.dense.optim.": named_in_groups(model, optimizer, names_for_keys=names_for_keys), "other": {}}
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), model=saved, extra=extra)
    step, given = tf_step(), []
    state = load_recis(
        folder, step, fresh(step), names=NAMES, dense=lambda there: given.append(there) or params_of(there)
    )
    for got, slot in ((state.dense.m, "exp_avg"), (state.dense.v, "exp_avg_sq")):
        wanted = params_of(by_name(model, optimizer, slot))
        assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert int(state.dense.step) == 3
    assert all(there.keys() == {"seen", *model.state_dict()} for there in given)


@pytest.mark.parametrize("steps_of", [named_steps, hashed_steps])
def test_dense_moments_by_number_next_to_step_filters(tmp_path, steps_of):
    model, optimizer = trained_seed(**SIZES)
    saved = {**steps_of({"a_emb": 5}), **model.state_dict()}
    extra = {"dense_optimizer": optimizer.state_dict(), "recis.dense.optim.": {"state": {}, "param_groups": []}}
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), model=saved, extra=extra)
    step = tf_step()
    state = load_recis(folder, step, fresh(step), names=NAMES, dense=params_of)
    wanted = params_of(by_name(model, optimizer, "exp_avg"))
    assert all(torch.equal(state.dense.m[name], value) for name, value in wanted.items())


def test_names_of_dense_moments_that_the_model_lacks(tmp_path):
    model, optimizer = trained_seed(**SIZES)
    saved = named_in_groups(model, optimizer, names_for_keys=True)
    saved["param_groups"][0]["param_names"] = ["x", *saved["param_groups"][0]["param_names"][1:]]
    folder = write_recis(tmp_path, saved_tables(lambda _: [1]), model=model.state_dict(), extra={"o": saved})
    step = tf_step()
    with pytest.raises(ValueError, match=r"extra.pt: got names \['x', .* of 8 parameters, .* \['x'\] are not there"):
        load_recis(folder, step, fresh(step), names=NAMES, dense=params_of)
