"""Checkpoints of several ranks: saved by N, loaded by M, with all that one process keeps."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recfx import cli
from recfx.checkpoint import Saver, compact, contents, diff, held, latest, load, ranks, save, saving
from recfx.checkpoint.folders import MANIFEST, STATE, FolderLock
from recfx.checkpoint.merging import merged
from recfx.dist import Group, RankError
from recfx.kernels.index.owner import owner
from recfx.rows import delete_, write_
from recfx.step import Step, TrainState
from recfx.table import ROW_FIELDS, TableState, policies
from recfx.table.policies import Life
from tests.checkpoint.ranks import on_ranks, results
from tests.checkpoint.test_checkpoint import SEED, SHARD, digests, flip, fresh, steps, trained
from tests.checkpoint.test_checkpoint_load import content, row_numbers
from tests.conftest import FEATURES, deepfm_batches, deepfm_groups, deepfm_params, deepfm_step
from tests.reference import on_threads

LIFE = Life(admit=policies.at_least(2), candidates=600)
LOOP = {"epoch": 1, "position": {"file": 2, "row": 30}}


def make_step(group: Group | None = None, **kwargs: Any) -> Step:
    return deepfm_step(life=LIFE, group=group, **kwargs)


@pytest.fixture(scope="module")
def step() -> Step:
    return make_step()


@pytest.fixture(scope="module")
def one(step: Step, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process: rows of every age, freed ones, ids that wait for admission, refused ones."""
    ids = tuple(range(1000, 1300))
    batches = deepfm_batches(3, seed=SEED) + deepfm_batches(8, seed=SEED + 1, ids=ids)
    state = on_threads(1, trained, step, fresh(step), batches)
    state.tables[0].num_refused.fill_(5)
    delete(step, state, 7)
    return save(tmp_path_factory.mktemp("one") / "ckpt", step, state, number=11, loop=LOOP)


def delete(step: Step, state: TrainState, first: int) -> None:
    """Every fifth of the ids."""
    for name in FEATURES:
        delete_(step, state, f"emb/{name}", torch.arange(1000 + first, 1300, 5))


def change(step: Step, state: TrainState, k: int) -> None:
    """Stands for training: a step is counted, rows are made, written and deleted, parameters move."""
    state.step.add_(1)
    state.dense.step.add_(1)
    for table in state.tables:
        table.step.add_(1)
    for name in FEATURES:
        ids = torch.cat([torch.arange(2, 20), torch.arange(1290 - 7 * k, 1310 + 11 * k)])
        weight = torch.arange(4 * len(ids), dtype=torch.float32).view(-1, 4) / 64 + k
        write_(step, state, f"emb/{name}", ids, weight, {"m": weight / 2})
        delete_(step, state, f"emb/{name}", torch.arange(1000 + k, 1310, 7))
    state.params["dnn.0.bias"].add_(k)


def save_all(
    folder: Path, one: Path, make: Callable[..., Step], num: int, *, background: bool, group: Group | None
) -> tuple[Step, TrainState, list[Path]]:
    """A rank's part of a run that saves `num` times in part."""
    step = make(group)
    state, _ = load(one, step, fresh(step))
    paths = []
    with Saver(folder, step, full_every=3, max_to_keep=9) as saver:
        write = saver.save_in_background if background else saver.save
        for k in range(num):
            if k:
                saver.finish()
                change(step, state, k)
            paths.append(write(state, number=int(state.step), loop=LOOP | {"k": k}))
    return step, state, paths


def candidates(state: TrainState) -> dict[tuple[int, int], int]:
    found = {}
    for table in state.tables:
        num, c = int(table.num_candidates), table.candidates
        keys = zip(c.vocabularies[:num].tolist(), c.ids[:num].tolist(), strict=True)
        found |= dict(zip(keys, c.counts[:num].tolist(), strict=True))
    return found


def assert_equal_tables(a: TableState, b: TableState) -> None:
    """All of it: rows by number, free ones, candidates, counters."""
    num_rows, num_free, num_candidates = int(a.num_rows), int(a.num_free), int(a.num_candidates)
    for name in ("num_rows", "num_free", "num_candidates", "num_refused", "step", "tally"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ROW_FIELDS:
        x, y = (getattr(t, name)[:num_rows] for t in (a, b))
        assert torch.equal(x >> 32, y >> 32) if name == "seen" else torch.equal(x, y), name
    assert torch.equal(a.free_rows[:num_free], b.free_rows[:num_free])
    for x, y in zip(a.candidates[1:], b.candidates[1:], strict=True):
        assert torch.equal(x[:num_candidates], y[:num_candidates])


@pytest.fixture(scope="module", params=[(1, False), (2, False), (2, True), (3, False)])
def run(request, step, one, tmp_path_factory) -> tuple[list[Path], list[TrainState], list[Path], TrainState]:
    """Of N ranks: checkpoints, and their last states. Of one process that did the same: likewise."""
    world_size, background = request.param
    folder = tmp_path_factory.mktemp("run")
    expected = save_all(folder / "one", one, make_step, 5, background=False, group=None)
    if world_size == 1:
        found = [save_all(folder / "ranks", one, make_step, 5, background=background, group=None)]
    else:
        work = partial(save_all, folder / "ranks", one, make_step, 5, background=background)
        found = results(world_size, lambda group: work(group=group))
    return found[0][2], [state for _, state, _ in found], expected[2], expected[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_ranks_loads_what_any_number_saved(run, step, world_size):
    paths, states, _, expected = run
    parts, loops = zip(
        *(load(paths[-1], step, fresh(step), rank=r, world_size=world_size) for r in range(world_size)), strict=True
    )
    assert list(loops) == [LOOP | {"k": 4, "step": int(expected.step)}] * world_size
    rows: dict = {}
    waiting: dict = {}
    for rank, part in enumerate(parts):
        mine, counted = content(step, part), candidates(part)
        assert not mine.keys() & rows.keys()
        assert not counted.keys() & waiting.keys()
        rows |= mine
        waiting |= counted
        for keys in (row_numbers(part.tables[0]), counted):
            vocabularies, ids = (torch.tensor(column) for column in zip(*keys, strict=True))
            assert owner(ids, vocabularies.int(), world_size).tolist() == [rank] * len(keys)
        torch.testing.assert_close(part.params, expected.params, rtol=0, atol=0)
        torch.testing.assert_close(part.dense, expected.dense, rtol=0, atol=0)
        assert int(part.step) == int(expected.step)
        assert int(part.tables[0].step) == int(expected.tables[0].step)
    assert len(rows) > 100
    assert rows == content(step, expected)
    assert len(waiting) > 50
    assert waiting == candidates(expected)
    for name in ("tally", "num_refused"):
        assert torch.equal(sum(getattr(p.tables[0], name) for p in parts), getattr(expected.tables[0], name)), name
    if world_size == len(states):
        for part, state in zip(parts, states, strict=True):
            assert_equal_tables(part.tables[0], state.tables[0])
        assert sum(int(part.tables[0].num_free) for part in parts) > 3
    elif len(states) > 1:
        in_order = [key for state in states for key in by_row(state.tables[0])]
        for part in parts:
            mine = by_row(part.tables[0])
            assert mine == [key for key in in_order if key in set(mine)]
            assert int(part.tables[0].num_free) == 0


def by_row(table: TableState) -> list[tuple[int, int]]:
    return [key for key, _ in sorted(row_numbers(table).items(), key=lambda item: item[1])]


def test_contents_do_not_depend_on_the_number_of_ranks(run):
    paths, states, expected, _ = run
    assert [diff(a, b) for a, b in zip(paths, expected, strict=True)] == [[]] * 5
    lines = diff(paths[0], expected[1])
    assert [line for line in lines if line.startswith("loop: ")]
    assert [line for line in lines if line.startswith("emb/a: weight: ")]
    assert [line for line in lines if "rows only in B, first id" in line]
    num_saves = [len(json.loads((part / MANIFEST).read_text())["parts"][0]) for part in rank_folders(paths, states)]
    assert num_saves == [n for n in (1, 2, 3, 1, 2) for _ in states]


def rank_folders(paths: list[Path], states: list[TrainState]) -> list[Path]:
    if len(states) == 1:
        return paths
    return [path / f"rank-{rank:05d}" for path in paths for rank in range(len(states))]


def test_compacted_by_rank(run, tmp_path, capsys):
    paths, states, _, _ = run
    for path in paths:
        shutil.copytree(path, tmp_path / path.name)
    names = [p.name for p in paths]
    before = all_bytes(tmp_path / names[3])
    assert cli.main(["compact", str(tmp_path / names[4]), str(tmp_path / names[3])]) == 0
    assert all_bytes(tmp_path / names[3]) == before  # it was full
    assert [path.name for path in steps(tmp_path)] == names
    assert diff(tmp_path / names[4], paths[4]) == []
    assert all(len(list(part.glob("table-*"))) == 1 for part in rank_folders([tmp_path / names[4]], states))
    assert held(tmp_path / names[4]) == held(paths[4])


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_each_rank_s_folder_is_a_checkpoint(run, step):
    paths, states, _, _ = run
    for part, state in zip(rank_folders(paths[-1:], states), states, strict=True):
        loaded, loop = load(part, step, fresh(step))
        assert_equal_tables(loaded.tables[0], state.tables[0])
        assert loop["k"] == 4
    if len(states) > 1:
        with pytest.raises(ValueError, match=r"got a checkpoint of several ranks, expected the folder of one of them"):
            merged(paths[-1])
    whole, _ = load(rank_folders(paths[-1:], states), step, fresh(step))
    assert content(step, whole) == content(step, load(paths[-1], step, fresh(step))[0])


def test_inspected(run, capsys):
    paths, states, expected, _ = run
    assert cli.main(["inspect", str(paths[-1])]) == 0
    text = capsys.readouterr().out
    assert cli.main(["inspect", str(expected[-1])]) == 0
    of_one = capsys.readouterr().out
    assert text.partition("\n\n")[2] == of_one.partition("\n\n")[2]  # rows by table, parameters
    assert (f"{len(states)} ranks, {2 * len(states)} streams, " in text) == (len(states) > 1)
    assert held(paths[-1])[:2] == held(expected[-1])[:2]
    assert held(paths[-1])[2:] == ((len(states), 2 * len(states)) if len(states) > 1 else (1, 1))


@pytest.fixture(scope="module")
def two(one, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "ckpt"
    return results(2, lambda group: save_all(folder, one, make_step, 1, background=False, group=group))[0][2][0]


def copy(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / path.name))


def test_the_files(two):
    """A folder of each rank as one process writes it, and a manifest of its own kind."""
    manifest = json.loads((two / MANIFEST).read_text())
    assert sorted(path.name for path in two.iterdir()) == [MANIFEST, "rank-00000", "rank-00001"]
    assert sorted(path.name for path in (two / "rank-00001").iterdir()) == [MANIFEST, STATE, SHARD]
    of_ranks = [json.loads((two / f"rank-0000{rank}" / MANIFEST).read_text()) for rank in range(2)]
    assert manifest["ranks"] == [m["manifest_xxh3_128"] for m in of_ranks]
    assert (manifest["world_size"], manifest["streams"], manifest["seed"]) == (2, 4, 3)
    assert manifest["loop"] == of_ranks[0]["loop"] == of_ranks[1]["loop"] == LOOP | {"k": 0, "step": 11}
    assert manifest["format"] > of_ranks[0]["format"]  # an older recfx advises an update


def test_equal_states_give_equal_bytes(two, one, tmp_path):
    again = results(2, lambda group: save_all(tmp_path, one, make_step, 1, background=True, group=group))[0][2][0]
    assert all_bytes(again) == all_bytes(two)


@pytest.mark.parametrize("full_every", [1, 5])
def test_saving_at_the_same_number_again(two, tmp_path, full_every):
    """Also where a file was damaged since: each is replaced; and by other ranks, or one process."""

    def run(group: Group) -> list[Path]:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        with Saver(tmp_path, step, full_every=full_every) as saver:
            saver.save(state, number=11, loop=LOOP | {"k": 0})
            if group.is_first and full_every == 1:
                flip(tmp_path / two.name / "rank-00001" / SHARD, -1)
            path = saver.save(state, number=11, loop=LOOP | {"k": 0})
            same = diff(path, two) == []
            saver.save_in_background(state, number=11, loop=LOOP)
        assert same
        return steps(tmp_path)

    assert results(2, run)[0] == [tmp_path / two.name]
    assert diff(tmp_path / two.name, two)[0].startswith("loop: ")
    step = make_step()
    state, _ = load(two, step, fresh(step))
    save(tmp_path, step, state, number=11, loop=LOOP | {"k": 0})
    assert steps(tmp_path) == [tmp_path / two.name]
    assert (tmp_path / two.name / SHARD).exists()
    assert diff(tmp_path / two.name, two) == []


def test_the_ranks_of_a_step_are_the_default(two, step):
    def run(group: Group) -> TrainState:
        step = make_step(group)
        return load(two, step, fresh(step))[0]

    for world_size in (2, 3):
        for rank, state in enumerate(results(world_size, run)):
            expected, _ = load(two, step, fresh(step), rank=rank, world_size=world_size)
            assert_equal_tables(state.tables[0], expected.tables[0])


def test_other_vocabularies_have_other_owners(two, step):
    """Features in another order: as many ranks as saved it must not keep their rows."""
    groups = {name: group[::-1] for name, group in deepfm_groups().items()}
    other, merged = make_step(embeddings=groups), {}
    for rank in range(2):
        part, _ = load(two, other, fresh(other), rank=rank, world_size=2)
        keys = row_numbers(part.tables[0])
        vocabularies, ids = (torch.tensor(column) for column in zip(*keys, strict=True))
        assert owner(ids, vocabularies.int(), 2).tolist() == [rank] * len(keys)
        merged |= content(other, part)
    assert merged == content(step, load(two, step, fresh(step))[0])


def test_parts_of_a_model_from_ranks_to_ranks(two, step):
    """The embeddings of two features, in a model of those alone."""
    groups = {name: group[:2] for name, group in deepfm_groups().items()}
    other, merged = make_step(embeddings=groups), {}
    for rank in range(2):
        part, _ = load(two, other, other.init(deepfm_params(2)), rank=rank, world_size=2, dense=())
        assert int(part.tables[0].num_rows) > 5
        merged |= content(other, part)
    whole = content(step, load(two, step, fresh(step))[0])
    assert merged == {key: row for key, row in whole.items() if key[0][-1] != "c"}


def test_room_for_candidates_is_per_rank(two):
    """One process has room for as many as it has, whatever two had."""
    step = deepfm_step(life=Life(admit=policies.at_least(2), candidates=20))
    loaded, _ = load(two, step, fresh(step))
    assert int(loaded.tables[0].num_candidates) == 20


# What goes wrong.


def test_a_damaged_file_of_a_rank_is_named(two, step, tmp_path):
    path = copy(two, tmp_path)
    flip(path / "rank-00001" / SHARD, -1)
    for read in (lambda p: load(p, step, fresh(step)), compact, lambda p: diff(p, p)):
        with pytest.raises(ValueError, match=rf"rank-00001/{SHARD}: checksum differs"):
            read(path)
    loaded, _ = load(path, step, fresh(step), rank=0, world_size=2)
    assert int(loaded.tables[0].num_rows) > 0


def test_a_rank_s_folder_of_another_checkpoint(two, step, tmp_path, one):
    path = copy(two, tmp_path)
    shutil.rmtree(path / "rank-00001")
    with pytest.raises(ValueError, match=r"rank-00001/manifest.json: got FileNotFoundError"):
        load(path, step, fresh(step))
    shutil.copytree(one, path / "rank-00001")
    match = r"rank-00001/manifest.json: checksum differs from .*step-000000011/manifest.json. The folder is of another"
    with pytest.raises(ValueError, match=match):
        load(path, step, fresh(step), rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"path: got \[.*\], expected one folder or more, each once"):
        load([two, two / "rank-00001"], step, fresh(step))


@pytest.mark.parametrize("ranks", [[], "ab", ["a", 3]])
def test_a_manifest_of_ranks_that_is_none(two, step, tmp_path, ranks):
    path = copy(two, tmp_path)
    manifest = json.loads((path / MANIFEST).read_text()) | {"ranks": ranks}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest.json: checksum differs. The file is damaged"):
        load(path, step, fresh(step))


def no_space_on(rank: int, real: Callable) -> Callable:
    def write(path: Path, *rest: Any) -> Any:
        if path.parent.name == f"rank-{rank:05d}":
            raise OSError(28, "No space left on device")
        return real(path, *rest)

    return write


def save_either_way(saver: Saver, state: TrainState, number: int, *, background: bool) -> None:
    (saver.save_in_background if background else saver.save)(state, number=number, loop=LOOP)
    saver.finish()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["contents.write_tensors", "ranks.write_manifest"])
def test_a_disk_that_is_full_on_one_rank_is_an_error_on_all(two, tmp_path, monkeypatch, background, rank, what):
    """And nothing is committed; the next save holds everything again."""
    module = contents if what.startswith("contents") else ranks
    name = what.partition(".")[2]
    real = getattr(module, name)

    def run(group: Group) -> tuple[str, int, list[Path], Path]:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        with Saver(tmp_path, step, full_every=5) as saver:
            first = saver.save(state, number=11, loop=LOOP)
            change(step, state, 1)
            group.wait()
            if group.is_first:
                monkeypatch.setattr(module, name, no_space_on(rank, real))
            group.wait()
            with pytest.raises(OSError, match="No space left on device") as error:
                save_either_way(saver, state, 12, background=background)
            group.wait()
            found = sorted(tmp_path.iterdir())
            group.wait()
            if group.is_first:
                monkeypatch.setattr(module, name, real)
            group.wait()
            assert found == [tmp_path / ".lock", first]
            path = saver.save(state, number=13, loop=LOOP)
        assert len(list((path / f"rank-{group.rank:05d}").glob("table-*"))) == 1
        return str(error.value), error.value.errno

    for other, (text, number) in enumerate(results(2, run)):
        assert "The checkpoints before this one are whole" in text
        assert (f"rank {rank}: " in text) == (other != rank)
        assert number == 28
    assert latest(tmp_path).name == "step-000000013"
    step = make_step()
    load(latest(tmp_path), step, fresh(step))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_while_all_are_being_saved(two, tmp_path, monkeypatch, rank):
    """By an error of its part alone: its part is written, so the checkpoint is still whole. It waits for nobody."""
    real = contents.write_tensors

    def slowly(path: Path, tensors: dict) -> str:
        time.sleep(0.2)
        return real(path, tensors)

    monkeypatch.setattr(contents, "write_tensors", slowly)

    def run(group: Group) -> None:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        with Saver(tmp_path, step) as saver:
            saver.save_in_background(state, number=11, loop=LOOP | {"k": 0})
            if group.rank == rank:
                raise KeyError("of this rank")

    found = on_ranks(2, run)
    assert isinstance(found[rank], KeyError)
    assert isinstance(found[1 - rank], RankError)
    assert [path.name for path in steps(tmp_path)] == [two.name]
    assert all_bytes(tmp_path / two.name) == all_bytes(two)


def test_a_save_whose_other_rank_is_gone_is_given_up(two, tmp_path, monkeypatch):
    """Its process and its child have been killed: nothing on disk tells so."""
    monkeypatch.setattr(saving, "STALLED_S", 0.3)

    def run(group: Group) -> None:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        saver = Saver(tmp_path, step)
        monkeypatch.setattr(saving, "write_in_child", of_rank_0)
        group.wait()
        saver.save_in_background(state, number=11, loop=LOOP)
        if group.is_first:
            with saver:
                saver.finish()

    real = saving.write_in_child

    def of_rank_0(at: ranks.RanksFolder, *rest: Any) -> Callable[[], None]:
        return real(at, *rest) if at.rank == 0 else lambda: None

    first, second = on_ranks(2, run)
    assert isinstance(first, RankError)
    assert second is None
    assert latest(tmp_path) is None
    with Saver(tmp_path, make_step()):
        assert steps(tmp_path) == []


def test_what_a_killed_rank_s_child_still_writes_does_not_disturb_the_next_run(two, tmp_path):
    """It may write for a moment more. Another save of the same number has another folder."""
    names = {ranks.scratch_name(two) for _ in range(9)}
    assert len(names) == 9
    (folder := tmp_path / names.pop() / "rank-00001").mkdir(parents=True)
    written = []

    def write() -> None:
        try:
            for k in range(10**5):
                (folder / f"table-0.{k:05d}.safetensors").touch()
                written.append(k)
                time.sleep(0.001)
        except FileNotFoundError:
            return

    child = threading.Thread(target=write)
    child.start()
    while len(written) < 20:
        time.sleep(0.001)
    with Saver(tmp_path, make_step()):
        assert steps(tmp_path) == []
    child.join()
    assert steps(tmp_path) == []


def test_an_error_in_one_rank_s_arguments_is_an_error_on_all(two, tmp_path):
    def run(group: Group, at: dict, loop: Any) -> str:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        state.window.num_batches.fill_(at.get("window", {}).get(group.rank, 0))
        with Saver(tmp_path, step) as saver:
            with pytest.raises((ValueError, TypeError)) as error:
                saver.save(state, number=at.get("number", {}).get(group.rank, 3), loop=loop)
            group.wait()
            assert len(steps(tmp_path)) == 0
        return str(error.value)

    for at, loop, first, second in (
        ({"window": {1: 1}}, {}, "rank 1: state: got an open accumulation", "state: got an open accumulation window"),
        ({"number": {1: 4}}, {}, *["number: got 4 on rank 1, expected 3 as on rank 0"] * 2),
        ({"number": {0: -1, 1: -1}}, {}, *["number: got -1, expected an int, 0 to 10"] * 2),
        ({}, {"x": {1, 2}}, *["loop: got {'x': {1, 2}}, expected a dict that JSON can hold"] * 2),
    ):
        texts = results(2, partial(run, at=at, loop=loop))
        assert texts[0].startswith(first)
        assert texts[1].startswith(second)


def test_a_base_that_is_gone_on_one_rank_makes_the_next_save_full_on_all(two, tmp_path):
    def run(group: Group) -> int:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        with Saver(tmp_path, step, full_every=5) as saver:
            path = saver.save(state, number=11, loop=LOOP)
            if group.rank == 1:
                shutil.rmtree(path / "rank-00001")
            change(step, state, 1)
            path = saver.save(state, number=12, loop=LOOP)
        return len(list((path / f"rank-{group.rank:05d}").glob("table-*")))

    assert results(2, run) == [1, 1]


def test_what_rank_0_cannot_open_raises_on_all(tmp_path, monkeypatch):
    monkeypatch.setattr("recfx.checkpoint.folders.LOCK_WAIT_S", 0.1)
    (tmp_path / "file").touch()
    for folder, error, text in (
        (tmp_path / "file", NotADirectoryError, "expected a folder. Choose another path"),
        (tmp_path, BlockingIOError, "writes checkpoints there, expected no other writer"),
    ):
        lock = FolderLock(tmp_path)
        first, second = on_ranks(2, lambda group, folder=folder: Saver(folder, make_step(group)))
        assert isinstance(first, error)
        assert isinstance(second, error)
        assert text in str(first)
        assert text in str(second)
        assert "rank 0: " in str(second)
        lock.release()
    FolderLock(tmp_path).release()


def test_ranks_that_see_other_folders(two, tmp_path):
    def run(group: Group) -> str:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        folder = tmp_path / f"of-{group.rank}"
        folder.mkdir()
        with Saver(folder, step) as saver, pytest.raises(FileNotFoundError) as error:
            saver.save(state, number=1, loop={})
        return str(error.value)

    assert all("expected the one that rank 0 has made. All ranks write into one folder" in t for t in results(2, run))
    assert steps(tmp_path / "of-0") == []


def test_deleted_and_kept(two, tmp_path):
    """By rank 0, for all."""

    def run(group: Group) -> None:
        step = make_step(group)
        state, _ = load(two, step, fresh(step))
        with Saver(tmp_path, step, max_to_keep=2) as saver:
            for number in range(4):
                saver.save(state, number=number, loop={})
            group.wait()
            assert [path.name for path in steps(tmp_path)] == ["step-000000002", "step-000000003"]
            group.wait()
            saver.delete_all()
            assert steps(tmp_path) == []

    results(2, run)


def test_one_thread_of_each_loads_the_same_from_one_process(one, step, tmp_path):
    """1 -> 2 -> 3 -> 1, through folders of ranks: nothing lost, nothing invented."""
    path = one
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        path = results(
            world_size,
            lambda group, path=path, folder=folder: save_all(folder, path, make_step, 1, background=False, group=group),
        )[0][2][0]
    loaded, loop = load(path, step, fresh(step))
    loop = {name: value for name, value in loop.items() if name not in ("k", "step")}
    again = save(tmp_path / "again", step, loaded, number=11, loop=loop)
    assert diff(again, one) == [line for line in diff(again, one) if ": row: " in line or "table.0." in line]
    assert content(step, loaded) == content(step, load(one, step, fresh(step))[0])
    assert digests(again).keys() == digests(one).keys()
