"""Checkpoints and rows in the hands of a hostile user: errors name what is wrong, and nothing is lost or written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import safetensors.torch
import torch
from pyarrow import parquet
from torch.utils._pytree import tree_leaves

from recfx import optim, rows
from recfx.checkpoint import Saver, compact, diff, latest, load, save
from recfx.checkpoint.files import write_file
from recfx.checkpoint.folders import MANIFEST, STATE
from recfx.cli import main
from recfx.embeddings import Embedding
from recfx.optim import sparse_adamw
from recfx.step import Step, TrainState
from recfx.table import ROW_FIELDS, num_live
from tests.checkpoint.test_checkpoint import (
    LOOP,
    SHARD,
    digests,
    flip,
    fresh,
    rewrite_manifest,
    some_state,
    steps,
    trained,
)
from tests.conftest import DIM, deepfm_batches, deepfm_groups, deepfm_params, deepfm_step


@pytest.fixture(scope="module")
def step() -> Step:
    return deepfm_step()


@pytest.fixture(scope="module")
def state(step: Step) -> TrainState:
    return some_state(step)


@pytest.fixture
def saved(step: Step, state: TrainState, tmp_path: Path) -> Path:
    return save(tmp_path / "wie é " / "ckpt", step, state, number=8, loop=LOOP)


def everything_in(state: TrainState) -> list[torch.Tensor]:
    """All that a failed load might have written: copies."""
    held = [getattr(t, name) for t in state.tables for name in (*ROW_FIELDS, "num_rows", "num_free", "tally", "step")]
    return [x.clone() for x in (*held, *state.params.values(), *state.dense.m.values(), state.dense.step)]


# A checkpoint that is not what it should be.


def test_an_open_accumulation_window_is_refused(tmp_path):
    step = deepfm_step(accumulation=2)
    state = trained(step, fresh(step), deepfm_batches(3))
    with pytest.raises(ValueError, match=r"state: got an open accumulation window, expected none"):
        save(tmp_path, step, state, number=1, loop={})
    assert steps(tmp_path) == []
    save(tmp_path, step, step.flush_(state), number=2, loop={})


@pytest.mark.parametrize("place", [0, 9, 200, -1])
def test_a_damaged_byte(step, saved, place):
    for name in (STATE, SHARD):
        whole = (saved / name).read_bytes()
        flip(saved / name, place)
        with pytest.raises(ValueError, match=rf"{name}: checksum differs .* damaged"):
            load(saved, step, fresh(step))
        (saved / name).write_bytes(whole)


def test_a_damaged_byte_of_the_manifest(step, saved):
    """At any place: no byte of the manifest can change without an error."""
    whole = (saved / MANIFEST).read_bytes()
    for place in range(0, len(whole), 7):
        flip(saved / MANIFEST, place)
        if json_of(saved / MANIFEST) != json.loads(whole):  # white space means nothing
            with pytest.raises(ValueError, match=r"manifest.json: "):
                load(saved, step, fresh(step))
        (saved / MANIFEST).write_bytes(whole)
    load(saved, step, fresh(step))


def json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": "new"}', '{"format": 2}', "\x00"])
def test_a_manifest_that_is_none(step, saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json: .*(expected a checkpoint's manifest|checksum differs)"):
        load(saved, step, fresh(step))


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_truncated_file(step, saved, size):
    os.truncate(saved / SHARD, size)
    with pytest.raises(ValueError, match=rf"{SHARD}: checksum differs"):
        load(saved, step, fresh(step))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (STATE, r"state.safetensors: missing, expected the file"),
        (SHARD, r"table-0.00000.safetensors: missing, expected the file"),
        (MANIFEST, r"manifest.json: got FileNotFoundError"),
    ],
)
def test_a_missing_file(step, saved, name, message):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=message):
        load(saved, step, fresh(step))


def test_a_folder_that_is_not_there(step, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/manifest.json: .* expected a checkpoint's manifest"):
        load(tmp_path / "nowhere", step, fresh(step))


@pytest.mark.parametrize(("format", "advice"), [(3, "Update recfx"), (1, "before its first release")])
def test_another_format(step, saved, format, advice):
    rewrite_manifest(saved, format=format)
    with pytest.raises(ValueError, match=rf"manifest.json: got format {format}, expected 2. .*{advice}"):
        load(saved, step, fresh(step))


def test_another_seed(saved):
    other = deepfm_step(seed=4)
    with pytest.raises(
        ValueError, match=r"step-000000008: got seed 3, expected the step's, 4. New rows would be drawn"
    ):
        load(saved, other, fresh(other))


def test_tables_of_another_model(saved):
    groups = deepfm_groups()
    groups["emb"][0] = Embedding("a", dim=4, init=groups["emb"][0].init, shared_name="renamed")
    other = deepfm_step(embeddings=groups)
    with pytest.raises(ValueError, match=r"step-000000008: no table 'renamed' of width 4 .* only emb/a of width 4,"):
        load(saved, other, fresh(other))


def test_tables_of_other_widths_that_add_up_to_the_same(saved):
    groups = deepfm_groups()
    widths = {"emb": 3, "bias": 2}
    groups = {name: [Embedding(e.feature, dim=widths[name], init=e.init) for e in g] for name, g in groups.items()}
    other = deepfm_step(embeddings=groups, forward=lambda params, emb, feats: emb["bias"].sum((1, 2))[:, None])
    with pytest.raises(ValueError, match=r"no table 'emb/a' of width 3 for 'emb/a', only emb/a of width 4"):
        load(saved, other, fresh(other))


def test_dense_parameters_of_another_model(step, saved):
    params = {name: p.clone() for name, p in deepfm_params().items()}
    state = step.init(params | {"dnn.0.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"no tensor 'params.dnn.0.bias' of shape \[9\]. It is of another model"):
        load(saved, step, state)
    with pytest.raises(ValueError, match=r"no tensor 'params.extra' of shape \[2\]"):
        load(saved, step, step.init(params | {"extra": torch.zeros(2)}))


def test_too_few_rows(saved):
    small = deepfm_step(max_rows=64)
    with pytest.raises(ValueError, match=r"table 0: got \d+ rows or more, expected at most 64. Raise max_rows"):
        load(saved, small, fresh(small))


def test_an_optimiser_with_other_slots(saved):
    other = deepfm_step(sparse_optimizer=sparse_adamw(1e-2)._replace(slots=("m",)))
    with pytest.raises(
        ValueError, match=r"got an optimiser that keeps \['m', 'v'\] next to the weights, expected \['m'\]"
    ):
        load(saved, other, fresh(other))


@pytest.mark.parametrize(
    ("kept", "model", "message"),
    [
        (
            optim.adamw(0.1),
            optim.sgd(0.1),
            r"keeps 'dense.m.\S+', expected one that keeps \['dense.step'\] and no more",
        ),
        (
            optim.adamw(0.1),
            optim.adagrad(0.1),
            r"keeps 'dense.m.\S+', expected one that keeps \['dense.step', 'dense.su",
        ),
        (optim.sgd(0.1), optim.adamw(0.1), r"no tensor 'dense.m.\S+' of shape .*It is of another model or optimiser"),
    ],
)
def test_another_dense_optimiser(tmp_path, kept, model, message):
    path = save(tmp_path, step := deepfm_step(dense_optimizer=kept), some_state(step), number=8, loop=LOOP)
    other = deepfm_step(dense_optimizer=model)
    for dense in (None, ["dnn.0.bias"]):
        new = fresh(other)
        before = [t.clone() for t in tree_leaves((new.params, new.dense, new.tables))]
        with pytest.raises(ValueError, match=rf"step-000000008/{STATE}: .*{message}"):
            load(path, other, new, dense=dense)
        assert all(map(torch.equal, tree_leaves((new.params, new.dense, new.tables)), before))
    load(path, other, fresh(other), dense=())


def test_a_state_file_that_lacks_a_tensor(step, saved):
    tensors = safetensors.torch.load_file(saved / STATE)
    del tensors["dense.v.dnn.0.bias"]
    files = json.loads((saved / MANIFEST).read_text())["files"]
    files[STATE] = write_file(saved / STATE, [safetensors.torch.save(tensors)])
    rewrite_manifest(saved, files=files)
    with pytest.raises(ValueError, match=r"no tensor 'dense.v.dnn.0.bias' of shape"):
        load(saved, step, fresh(step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({key: None}, f"got NoneType as '{key}'") for key in ("files", "parts", "tables", "slots", "loop", "seed")],
        ({"parts": 3}, "got int as 'parts', expected list"),
        ({"parts": [[3]]}, "expected lists in 'parts' and 'tables'"),
        ({"parts": []}, "expected each of 'files' once"),
        ({"parts": [[[SHARD, SHARD]]]}, "expected each of 'files' once"),
        ({"parts": [[[]]]}, "expected each of 'files' once"),
        ({"tables": []}, "expected .*one list a part"),
        ({"tables": [[[["emb/a", "0", 4]]]]}, "expected .*one list a part"),
        ({"loop": {}}, "got loop {}, expected the number of its step"),
        ({"format": 2.5}, "format 2.5"),
    ],
)
@pytest.mark.parametrize(
    "use", [lambda p, step: load(p, step, fresh(step)), lambda p, _: compact(p), lambda p, _: diff(p, p)]
)
def test_a_manifest_edited_by_hand(step, saved, changes, message, use: Callable):
    rewrite_manifest(saved, **changes)
    before = digests(saved)
    with pytest.raises(ValueError, match=rf"manifest.json: .*{message}"):
        use(saved, step)
    assert digests(saved) == before


def test_no_file_outside_the_folder_is_read(step, saved):
    outside = saved.parent / SHARD
    shutil.copy(saved / SHARD, outside)
    checksums = json.loads((saved / MANIFEST).read_text())["files"]
    name = f"../{SHARD}"
    rewrite_manifest(saved, files={STATE: checksums[STATE], name: checksums[SHARD]}, parts=[[[name]]])
    with pytest.raises(ValueError, match=r"manifest.json: got file '../table-0.00000.safetensors', expected names"):
        load(saved, step, fresh(step))


def test_a_failed_load_leaves_the_state_as_it_was(step, state, tmp_path, monkeypatch):
    """Whatever part is damaged: the shards before it had been put into the table already."""
    monkeypatch.setattr("recfx.checkpoint.contents.SHARD_BYTES", 4096)
    path = save(tmp_path, step, state, number=8, loop=LOOP)
    shards = sorted(path.glob("table-*"))
    assert len(shards) > 3
    new = fresh(step)
    before = everything_in(new)
    for shard in (shards[0], shards[-1]):
        flip(shard, -1)
        with pytest.raises(ValueError, match=f"{shard.name}: checksum differs"):
            load(path, step, new)
        assert all(map(torch.equal, everything_in(new), before))
        flip(shard, -1)
    load(path, step, new)  # it is still good for this
    again = save(tmp_path / "again", step, new, number=8, loop=LOOP)
    assert digests(again) == digests(path)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("laid_over", [False, True])
def test_any_damaged_byte_is_found_before_its_rows_are_in_use(step, state, tmp_path, world_size, laid_over):
    """In the header, in the numbers, ids and vocabularies that say where a row goes, and in what goes there."""
    with Saver(tmp_path, step, full_every=2) as saver:
        path = saver.save(state, number=8, loop=LOOP)
        if laid_over:
            path = saver.save(trained(step, state, deepfm_batches(2)), number=10, loop=LOOP)
    new = fresh(step)
    before = everything_in(new)
    size = (path / SHARD).stat().st_size
    for place in [*range(0, 512, 23), *range(512, size, size // 97), -1]:
        flip(path / SHARD, place)
        with pytest.raises(ValueError, match=f"{SHARD}: checksum differs .* damaged"):
            load(path, step, new, rank=world_size - 1, world_size=world_size)
        flip(path / SHARD, place)
    assert all(map(torch.equal, everything_in(new), before))
    content = (path / SHARD).read_bytes()
    for wrong in (content[: size // 2], content[:-1], content[:5], b"", content + b"\0"):
        (path / SHARD).write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{SHARD}: checksum differs .* damaged"):
            load(path, step, new, rank=world_size - 1, world_size=world_size)
    assert all(map(torch.equal, everything_in(new), before))


def test_too_few_rows_for_a_rank_leave_the_state_as_it_was(state, saved):
    small = deepfm_step(max_rows=64)
    new = fresh(small)
    before = everything_in(new)
    with pytest.raises(ValueError, match=r"table 0: got \d+ rows or more, expected at most 64. Raise max_rows"):
        load(saved, small, new, rank=0, world_size=2)
    assert all(map(torch.equal, everything_in(new), before))


def test_a_slot_per_weight_is_not_one_per_row(tmp_path):
    """Both kinds of Adagrad name theirs 'sum'."""
    kinds = [deepfm_step(sparse_optimizer=o(0.1)) for o in (optim.sparse_adagrad, optim.sparse_rowwise_adagrad)]
    for one, other in (kinds, kinds[::-1]):
        path = save(tmp_path, one, some_state(one), number=8, loop=LOOP)
        with pytest.raises(ValueError, match=r"step-000000008: got rows of shape \[\d, \d+\], expected \[\d, \d+\]"):
            load(path, other, fresh(other))


def test_a_variant_of_adamw_goes_on_with_the_moments_of_another(tmp_path):
    """They differ in how moments are used, not in what they are."""
    one = deepfm_step(sparse_optimizer=sparse_adamw(1e-2), dense_optimizer=optim.adamw(1e-2))
    other = deepfm_step(sparse_optimizer=optim.sparse_adamw_recis(1e-2), dense_optimizer=optim.adamw_recis(1e-2))
    batches = deepfm_batches(1)
    a, b = (trained(s, fresh(s), batches) for s in (one, other))  # from zero, with equal gradients
    (t,), (u,) = a.tables, b.tables
    assert torch.equal(t.rows[:, 1:], u.rows[:, 1:])
    assert not torch.equal(t.rows[:, 0], u.rows[:, 0])
    assert all(torch.equal(a.dense.v[n], b.dense.v[n]) for n in a.params)
    loaded, _ = load(save(tmp_path, one, a, number=1, loop=LOOP), other, fresh(other))
    assert torch.equal(loaded.tables[0].rows, t.rows)


def test_a_big_endian_machine_is_refused(step, state, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(NotImplementedError, match="save: got a big-endian machine, expected a little-endian one"):
        save(tmp_path, step, state, number=8, loop=LOOP)


# Arguments of `load`.


def test_a_state_that_has_rows_is_not_loaded_over(step, state, saved):
    before = everything_in(state)
    with pytest.raises(ValueError, match=r"state: got one with \d+ rows, expected a new one"):
        load(saved, step, state)
    assert all(map(torch.equal, everything_in(state), before))


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0), (2, 2), (0, 1.5)])
def test_a_rank_outside_its_world(step, saved, rank, world_size):
    with pytest.raises(ValueError, match=rf"rank: got {rank} of world_size {world_size}, expected"):
        load(saved, step, fresh(step), rank=rank, world_size=world_size)


def test_folders_of_ranks_are_distinct(step, saved):
    """A folder given twice would give each id two rows."""
    for paths in ([], [saved, saved.parent / "." / saved.name]):
        with pytest.raises(ValueError, match=r"path: got \[.*expected one folder or more, each once"):
            load(paths, step, fresh(step))


def test_names_that_nothing_has(step, saved):
    with pytest.raises(ValueError, match=r"names: got \['emb/zzz'\], expected some of"):
        load(saved, step, fresh(step), names={"emb/zzz": "emb/a"})
    for argument in ("tables", "dense"):
        with pytest.raises(TypeError, match=rf"{argument}: got the str 'emb/a', expected a list"):
            load(saved, step, fresh(step), **{argument: "emb/a"})


# Arguments of `save` and `compact`.


@pytest.mark.parametrize("number", [-1, 1.5, "8", True, 10**9, None])
def test_a_number_that_no_folder_can_have(step, state, tmp_path, number):
    with pytest.raises(ValueError, match=rf"number: got {number!r}, expected an int"):
        save(tmp_path, step, state, number=number, loop={})
    assert steps(tmp_path) == []


@pytest.mark.parametrize("loop", [None, [], {"a": object()}, {"a": float("nan")}, {1: 2}])
def test_a_loop_that_json_cannot_hold(step, state, tmp_path, loop):
    with Saver(tmp_path, step) as saver:
        for write in (saver.save, saver.save_in_background):
            with pytest.raises(TypeError, match=r"loop: got .*expected a dict that JSON can hold"):
                write(state, number=1, loop=loop)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("count", [1.5, "2", True, -1])
def test_counts_that_are_none(step, tmp_path, count):
    error, expected = (ValueError, "at least 1") if type(count) is int else (TypeError, "an int")
    with pytest.raises(error, match=rf"max_to_keep: got {count!r}, expected {expected}"):
        Saver(tmp_path, step, max_to_keep=count)


def test_a_folder_that_is_a_file(step, state, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=rf"folder: got {folder}, a file or below one"):
            save(folder, step, state, number=1, loop={})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("background", [False, True])
def test_a_save_over_a_damaged_one_leaves_nothing_behind(step, state, tmp_path, background):
    with Saver(tmp_path, step, full_every=2) as saver:
        path = saver.save(state, number=1, loop={})
        flip(path / MANIFEST, 100)
        if background:
            saver.save_in_background(state, number=2, loop={})
            with pytest.raises(RuntimeError, match=r"background save: ValueError.*manifest.json"):
                saver.finish()
        else:
            with pytest.raises(ValueError, match=r"manifest.json"):
                saver.save(state, number=2, loop={})
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", path.name]


def test_leftovers_that_are_no_folders(step, state, tmp_path):
    """A link is removed, what it points to is not; names that no save gives are left alone."""
    folder = tmp_path / "ckpt"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").write_text("mine")
    folder.mkdir()
    for name in (".unfinished-000000001", ".unfinished-000000009"):
        (folder / name).write_text("")
    (folder / ".unfinished-step-000000003").symlink_to(tmp_path / "kept")
    others = [".unfinished-file", ".unfinished-9", ".unfinished-step-000000003.bak", ".unfinished-0000000090"]
    for name in others:
        (folder / name).mkdir()
    path = save(folder, step, state, number=1, loop={})
    assert sorted(p.name for p in folder.iterdir()) == sorted([*others, ".lock", path.name])
    assert (tmp_path / "kept" / "mine").read_text() == "mine"


def test_compaction_stays_in_its_place(step, saved, tmp_path, monkeypatch, capsys):
    """Through a link or from inside: the checkpoint itself. A renamed one would fall on the one of its number."""
    before = digests(saved)
    (tmp_path / "best").symlink_to(saved)
    assert compact(tmp_path / "best") == saved
    monkeypatch.chdir(saved)
    assert compact(".") == saved
    copy = shutil.copytree(saved, saved.parent / "copy")
    with pytest.raises(ValueError, match=r"copy: got a renamed checkpoint, expected step-000000008"):
        compact(copy)
    assert main(["compact", str(copy)]) == 2
    assert "error: " in capsys.readouterr().err
    assert digests(saved) == before == digests(copy)
    assert latest(saved.parent) == saved


def test_a_checkpoint_of_no_rows(step, tmp_path):
    path = save(tmp_path, step, fresh(step), number=0, loop={})
    before = digests(path)
    assert digests(compact(path)) == before
    assert diff(path, path) == []
    assert num_live(load(path, step, fresh(step))[0].tables[0]) == 0


# Rows.


@pytest.mark.parametrize(
    ("weight", "slots", "error", "message"),
    [
        ([[0.0] * DIM], None, TypeError, "weight: got list, expected torch.float32"),
        (None, None, TypeError, "weight: got NoneType, expected torch.float32"),
        (torch.zeros(1, DIM), {"m": 0}, TypeError, "m: got int, expected torch.float32"),
        (torch.zeros(1, DIM), {"weight": torch.ones(1, DIM)}, ValueError, r"slots: got \['weight'\], expected"),
        (torch.zeros(1, DIM), [torch.ones(1, DIM)], ValueError, "slots: got list, expected tensors by some"),
    ],
)
def test_what_is_no_row(step, weight, slots, error, message):
    state = fresh(step)
    with pytest.raises(error, match=message):
        rows.write_(step, state, "emb/a", torch.tensor([1]), weight, slots)
    assert num_live(state.tables[0]) == 0


def test_ids_at_the_ends_of_their_range_and_weights_with_gradients(step):
    ids = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 0x7FF8000000000000])
    weight = torch.arange(5.0)[:, None].expand(5, DIM).clone().requires_grad_()
    state = rows.write_(step, fresh(step), "emb/a", ids, weight)
    read = rows.read(step, state, "emb/a", ids)
    assert torch.equal(read.weight, weight)
    assert not read.weight.requires_grad
    rows.delete_(step, state, "emb/a", ids[[0, 0, 1]])
    assert rows.read(step, state, "emb/a", ids).known.tolist() == [False, False, True, True, True]


def test_rows_of_a_state_of_another_step(step, state):
    forward = lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None]  # noqa: E731
    other = deepfm_step(embeddings={"emb": deepfm_groups()["emb"]}, forward=forward)
    with pytest.raises(ValueError, match=r"state: got tables of widths .*Use the state of this step"):
        rows.read(other, state, "emb/a", torch.tensor([1]))


@pytest.mark.parametrize("how", ["text", "cut", "flipped", "doubled"])
def test_an_import_names_the_file(step, state, tmp_path, how):
    path = tmp_path / "ü x.parquet"
    rows.export_parquet(step, state, "emb/a", path)
    if how == "text":
        path.write_text("x")
    elif how == "cut":
        os.truncate(path, 100)
    elif how == "flipped":
        flip(path, 40)
    else:
        columns: Any = [pa.array([1]), pa.array([1]), pa.array([[1.0] * DIM])]
        parquet.write_table(pa.table(columns, names=["id", "id", "weight"]), path)
    new = fresh(step)
    with pytest.raises((ValueError, OSError), match=r"ü x.parquet: "):
        rows.import_parquet_(step, new, "emb/a", path)
    assert num_live(new.tables[0]) == 0
