"""Row surgery on ranks: what every rank does with the same ids is, all together, what one process does."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from recfx import rows
from recfx.dist import Group
from recfx.kernels.index.owner import owner
from recfx.step import Step, TrainState
from tests.conftest import DIM, deepfm_params, deepfm_step
from tests.rows.test_rows import as_dict, vectors

WORLD_SIZE = 2
IDS = torch.arange(-30, 30)
TABLES = ("emb/a", "emb/b")


def step_of(rank: int, **kwargs: int) -> Step:
    """Of a rank that has no other rank to exchange anything with."""
    group = Group(rank=rank, world_size=WORLD_SIZE, streams=WORLD_SIZE, deterministic=False)
    return deepfm_step(group=group, **kwargs)


def written(step: Step, ids: Tensor = IDS) -> TrainState:
    state = step.init(deepfm_params())
    for k, table in enumerate(TABLES):
        slots = {"m": vectors(ids.tolist()) + 2}
        state = rows.write_(step, state, table, ids, vectors(ids.tolist()) + k, slots)
    return state


def owned_by(rank: int, vocabulary: int, ids: Tensor = IDS) -> list[int]:
    return ids[owner(ids, torch.full_like(ids, vocabulary, dtype=torch.int32), WORLD_SIZE) == rank].tolist()


@pytest.fixture(scope="module")
def one() -> tuple[Step, TrainState]:
    step = deepfm_step()
    return step, written(step)


@pytest.fixture
def ranks() -> list[tuple[Step, TrainState]]:
    steps = [step_of(rank) for rank in range(WORLD_SIZE)]
    return [(step, written(step)) for step in steps]


def together(ranks: list[tuple[Step, TrainState]], table: str) -> dict:
    found: dict = {}
    for step, state in ranks:
        mine = as_dict(step, state, table)
        assert not mine.keys() & found.keys()
        found |= mine
    return found


def test_each_rank_writes_the_ids_that_it_owns(one, ranks):
    for v, table in enumerate(TABLES):
        for rank, (step, state) in enumerate(ranks):
            assert list(as_dict(step, state, table)) == owned_by(rank, v)
            assert len(owned_by(rank, v)) > 15
        assert together(ranks, table) == as_dict(*one, table)
        assert together(ranks, table.replace("emb", "bias")) == as_dict(*one, table.replace("emb", "bias"))


def test_read(one, ranks):
    ids = torch.tensor([500, 7, -3, 8, 7, 9])
    whole = rows.read(*one, "emb/b", ids)
    parts = [rows.read(step, state, "emb/b", ids) for step, state in ranks]
    assert torch.equal(torch.stack([p.known for p in parts]).sum(0) == 1, whole.known)
    assert torch.equal(parts[0].weight + parts[1].weight, whole.weight)
    assert torch.equal(parts[0].slots["m"] + parts[1].slots["m"], whole.slots["m"])


def test_delete(ranks):
    step = deepfm_step()
    expected = rows.delete_(step, written(step), "emb/a", torch.arange(-5, 100))
    ranks = [(s, rows.delete_(s, state, "emb/a", torch.arange(-5, 100))) for s, state in ranks]
    for table in TABLES:
        assert together(ranks, table) == as_dict(step, expected, table)
    assert sum(int(state.tables[0].num_free) for _, state in ranks) == int(expected.tables[0].num_free) == 35


def test_exported_to_a_file_of_each_rank_and_imported_by_any_number(one, ranks, tmp_path):
    assert rows.export_parquet(*one, "emb/a", tmp_path / "one.parquet") == tmp_path / "one.parquet"
    files = [rows.export_parquet(step, state, "emb/a", tmp_path / "rows.parquet") for step, state in ranks]
    assert [file.name for file in files] == ["rows-00000-of-00002.parquet", "rows-00001-of-00002.parquet"]
    assert [parquet.read_table(file)["id"].to_pylist() for file in files] == [owned_by(0, 0), owned_by(1, 0)]
    whole = pa.concat_tables([parquet.read_table(file) for file in files]).sort_by("id")
    assert whole.equals(parquet.read_table(tmp_path / "one.parquet").sort_by("id"))
    assert sorted(r["id"] for s, state in ranks for b in rows.batches(s, state, "emb/a") for r in b.to_pylist()) == (
        IDS.tolist()
    )
    for given in ([tmp_path / "one.parquet"], files):
        for steps in ([deepfm_step()], [step_of(rank) for rank in range(WORLD_SIZE)]):
            states = [step.init(deepfm_params()) for step in steps]
            for file in given:
                states = [rows.import_parquet_(step, s, "emb/a", file) for step, s in zip(steps, states, strict=True)]
            assert together(list(zip(steps, states, strict=True)), "emb/a") == as_dict(*one, "emb/a")


def test_room_is_a_rank_s(tmp_path):
    """Sixty ids are too many for one process with 40 rows, and not for two."""
    small = deepfm_step(max_rows=40)
    with pytest.raises(ValueError, match=r"table 'emb/a': got 60 new ids, expected at most 40"):
        written(small)
    ranks = [step_of(rank, max_rows=40) for rank in range(WORLD_SIZE)]
    for rank, step in enumerate(ranks):
        state = rows.write_(step, step.init(deepfm_params()), "emb/a", IDS, vectors(IDS.tolist()))
        assert list(as_dict(step, state, "emb/a")) == owned_by(rank, 0)
        with pytest.raises(ValueError, match=rf"got {len(owned_by(rank, 1))} new ids, expected at most"):
            rows.write_(step, state, "emb/b", IDS, vectors(IDS.tolist()))


@pytest.mark.parametrize(
    ("ids", "weight", "match"),
    [
        ([1, 2, 1], torch.zeros(3, DIM), "ids: got 1 more than once"),
        ([1, 2, 3], torch.zeros(2, DIM), r"weight: got \[2, 4\], expected \[3, 4\]"),
        ([1, 2], torch.full((2, DIM), torch.nan), "weight: got values that are not finite"),
    ],
)
def test_what_is_wrong_is_an_error_on_every_rank(ranks, ids, weight, match):
    """Whoever owns the id: all ranks raise, so none goes on alone."""
    for step, state in ranks:
        before = as_dict(step, state, "emb/a")
        with pytest.raises(ValueError, match=match):
            rows.write_(step, state, "emb/a", torch.tensor(ids), weight)
        assert as_dict(step, state, "emb/a") == before


def test_statistics_are_of_the_rank_s_rows(one, ranks):
    whole, parts = rows.statistics(*one, "emb/a"), [rows.statistics(*rank, "emb/a") for rank in ranks]
    assert sum(part.num_rows for part in parts) == whole.num_rows == len(IDS)
    assert sum(part.num_rows * part.norm.mean for part in parts) == pytest.approx(whole.num_rows * whole.norm.mean)
    assert max(part.norm.max for part in parts) == whole.norm.max
