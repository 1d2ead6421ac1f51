"""Rows dealt to streams and ranks: each once, whole batches the same for any number of ranks, none waits for ever."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from recfx.data import Between, fixedlen, from_arrays, reader, varlen
from recfx.data.decode import Decoder
from recfx.dist import Group
from recfx.dist.streams import deal
from recfx.types import NUM_SAMPLES, Ragged
from tests.dist import streams_of_ranks
from tests.dist.launching import launch

SCRIPT = Path(streams_of_ranks.__file__)
BATCH_SIZE = 12
UNITS = (29, 7, 40, 11)  # rows of the four units


class Together:
    """The messages of ranks that are threads of this process."""

    def __init__(self, num: int) -> None:
        self.num, self.barrier, self.values = num, threading.Barrier(num, timeout=30), [None] * num

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class Rank(Group):
    """A rank that is a thread."""

    def gather(self, value: Any) -> list[Any]:
        return self.host.exchange(self.rank, value)  # type: ignore[union-attr]

    def most(self, numbers: Sequence[int]) -> list[int]:
        return np.max(self.gather([int(n) for n in numbers]), axis=0).tolist()


def on_ranks(num: int, run: Callable[[Group], Any], *, streams: int, deterministic: bool = False) -> list[Any]:
    """What `run` returns on each of so many ranks."""
    together, results = Together(num), [None] * num

    def of(rank: int) -> None:
        group = Rank(rank=rank, world_size=num, streams=streams, deterministic=deterministic, host=together)  # type: ignore[arg-type]
        try:
            results[rank] = run(group)
        except BaseException as error:
            results[rank] = error
            together.barrier.abort()

    threads = [threading.Thread(target=of, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two files of two units, rows numbered 1, 2, ...; row n has n % 4 ids."""
    folder, number = tmp_path_factory.mktemp("files"), 0
    for k in range(2):
        with parquet.ParquetWriter(folder / f"{k}.parquet", schema()) as writer:
            for num in UNITS[2 * k : 2 * k + 2]:
                numbers = range(number + 1, number + num + 1)
                writer.write_table(
                    pa.table({"n": list(map(float, numbers)), "ids": [[n] * (n % 4) for n in numbers]}, schema())
                )
                number += num
    return str(folder)


def schema() -> pa.Schema:
    return pa.schema({"n": pa.float32(), "ids": pa.list_(pa.int64())})


def read(files: str, *, batch_size: int = BATCH_SIZE, **options: Any) -> Any:
    ids = varlen("ids", torch.int64, valid=Between(0, 50) if "on_bad" in options else None)
    return reader(files, [fixedlen("n", [0.0]), ids], batch_size, format="parquet", **options)


def numbers_of(options: dict[str, Any]) -> list[int]:
    """The rows that are read with these options."""
    numbers = range(1, sum(UNITS) + 1)
    return [n for n in numbers if "on_bad" not in options or (n > 3 and (n <= 50 or n % 4 == 0))]


def rows(batch: Any) -> list[int]:
    num = int(batch[NUM_SAMPLES])
    numbers = batch["n"][:num, 0].int().tolist()
    offsets = batch["ids"].offsets
    assert offsets[: num + 1].diff().tolist() == [n % 4 for n in numbers]
    assert batch["ids"].values[: offsets[-1]].tolist() == [n for n in numbers for _ in range(n % 4)]
    assert offsets[num:].eq(offsets[num]).all()
    return numbers


def passes(files: str, epochs: Sequence[int] = (0,), **options: Any) -> Callable[[Group], Any]:
    def run(group: Group) -> Any:
        dealt = deal(read(files, **options), group)
        return [[(rows(b), b.layout) for b in dealt.epoch(e)] for e in epochs]

    return run


def without_padding(columns: Any) -> Any:
    """Columns as they were, in as little room as their values need: another layout for each batch and rank."""
    offsets = columns["ids"].offsets
    return {"n": columns["n"], "ids": Ragged(columns["ids"].values[: offsets[-1]].clone(), offsets)}


OPTIONS: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled": {"shuffle_rows": 16, "seed": 3},
    "transformed": {"transform": without_padding},
    "filtered, bad rows skipped": {"filter": [("n", ">", 3.0)], "on_bad": "skip"},
}


@pytest.mark.filterwarnings("ignore:recfx. rank . has no rows")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("num", "streams"), [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (1, 4), (2, 4), (3, 4), (7, 4)])
def test_every_row_is_read_once(
    files: str, num: int, streams: int, deterministic: bool, options: dict[str, Any]
) -> None:
    run = passes(files, (0, 1), batch_size=14 if streams == 7 else BATCH_SIZE, **options)
    results = on_ranks(num, run, streams=streams, deterministic=deterministic)
    for epoch in (0, 1):
        of_ranks = [result[epoch] for result in results]
        assert len({len(batches) for batches in of_ranks}) == 1  # as many on each rank
        assert all(len({layout for _, layout in step}) == 1 for step in zip(*of_ranks, strict=True))
        found = Counter(n for batches in of_ranks for numbers, _ in batches for n in numbers)
        assert found == Counter(numbers_of(options))


@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 16}], ids=["in order", "shuffled"])
def test_every_row_is_read_once_from_a_cache(files: str, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = None
    for num in (2, 1, 3):  # the first writes it
        run = passes(files, cache=tmp_path, **options)
        batches = whole_batches(on_ranks(num, run, streams=4), 1)
        assert sorted(chain(*batches)) == numbers_of(options)
        assert expected in (None, batches)
        expected = batches


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_bad_rows_of_all_ranks_are_counted_once(files: str, num: int) -> None:
    def run(group: Group) -> int:
        iterator = deal(read(files, on_bad="skip"), group).epoch(0)
        list(iterator)
        return iterator.num_bad

    num_bad = sum(n > 50 and n % 4 > 0 for n in range(1, sum(UNITS) + 1))
    for streams in (3, 4):  # by unit, by row
        assert sum(on_ranks(min(num, streams), run, streams=streams)) == num_bad


def test_arrays_are_dealt_too() -> None:
    def run(group: Group) -> list[int]:
        numbers = np.arange(5000, dtype=np.float32)
        dealt = deal(
            from_arrays({"n": numbers}, [fixedlen("n", [0.0])], 100, drop_remainder=False, shuffle=True), group
        )
        return [n for b in dealt for n in b["n"][: b[NUM_SAMPLES], 0].int().tolist()]

    for streams in (2, 10):  # by unit, by row
        found = on_ranks(2, run, streams=streams)
        assert sorted(chain(*found)) == list(range(5000))


def whole_batches(results: list[Any], group_rounds: int) -> list[list[int]]:
    """The rows of each whole batch, in the order of the streams."""
    of_ranks = [[numbers for numbers, _ in result[0]] for result in results]
    steps = [[n for numbers in step for n in numbers] for step in zip(*of_ranks, strict=True)]
    return [list(chain(*steps[k : k + group_rounds])) for k in range(0, len(steps), group_rounds)]


@pytest.mark.filterwarnings("ignore:recfx. rank . has no rows")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_whole_batches_do_not_depend_on_the_number_of_ranks(
    files: str, options: dict[str, Any], drop_remainder: bool
) -> None:
    run, found = passes(files, drop_remainder=drop_remainder, **options), []
    for deterministic in (False, True):
        for num in (1, 2, 3, 4, 7):
            rounds = -(-4 // num) if deterministic else 1
            found.append(whole_batches(on_ranks(num, run, streams=4, deterministic=deterministic), rounds))
    assert all(batches == found[0] for batches in found)
    assert all(len(batch) == BATCH_SIZE for batch in found[0][: 2 if drop_remainder else 1])
    assert len(found[0]) > 2
    if drop_remainder:
        assert all(len(batch) == BATCH_SIZE for batch in found[0])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 16}], ids=["in order", "shuffled"])
def test_goes_on_with_another_number_of_ranks(files: str, deterministic: bool, options: dict[str, Any]) -> None:
    def begin(group: Group) -> Any:
        iterator = deal(read(files, **options), group).epoch(1)
        taken = [rows(next(iterator)) for _ in range(3 * group.rounds)]
        position = iterator.position
        iterator.close()
        return taken, position

    def rest(position: Any) -> Callable[[Group], Any]:
        return lambda group: [[(rows(b), b.layout) for b in deal(read(files, **options), group).start_at(position)]]

    unbroken = whole_batches(on_ranks(1, passes(files, (1,), **options), streams=4), 1)
    begun = on_ranks(2, begin, streams=4, deterministic=deterministic)
    position = begun[0][1]
    assert begun[1][1] == position
    first = [n for taken, _ in begun for numbers in taken for n in numbers]
    found = []
    for num in (1, 2, 3, 4):
        results = on_ranks(num, rest(position), streams=4, deterministic=deterministic)
        found.append(whole_batches(results, -(-4 // num) if deterministic else 1))
        assert sorted([*first, *chain(*found[-1])]) == list(range(1, sum(UNITS) + 1))
    assert all(batches == unbroken[3:] for batches in found)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_position_between_the_rounds_of_a_whole_batch(files: str, num: int) -> None:
    def run(group: Group, num_taken: int) -> Any:
        iterator = deal(read(files), group).epoch(0)
        taken = [rows(next(iterator)) for _ in range(num_taken)]
        position = iterator.position
        iterator.close()
        return taken, position

    for num_taken in range(1, 2 * -(-4 // num) + 1):
        of_ranks = on_ranks(num, lambda group: run(group, num_taken), streams=4, deterministic=True)  # noqa: B023
        taken, position = [n for batches, _ in of_ranks for n in chain(*batches)], of_ranks[0][1]
        for other in (1, 2):
            rest = on_ranks(
                other,
                lambda group: [rows(b) for b in deal(read(files), group).start_at(position)],  # noqa: B023
                streams=4,
            )
            assert sorted([*taken, *(n for batches in rest for n in chain(*batches))]) == numbers_of({})


@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 16}, {"drop_remainder": True}], ids=str)
@pytest.mark.parametrize("streams", [2, 3])
def test_goes_on_after_the_end_of_a_stream(files: str, streams: int, options: dict[str, Any]) -> None:
    """By unit: of three streams the shortest has 11 rows, the longest 47."""

    def begin(num_taken: int) -> Callable[[Group], Any]:
        def run(group: Group) -> Any:
            iterator = deal(read(files, **options), group).epoch(1)
            for _ in range(num_taken):
                next(iterator)
            position = json.loads(json.dumps(iterator.position))
            iterator.close()
            return position

        return run

    unbroken = whole_batches(on_ranks(1, passes(files, (1,), **options), streams=streams), 1)
    for num_taken in (1, len(unbroken) - 1, len(unbroken)):
        position = on_ranks(2, begin(num_taken), streams=streams)[0]
        for num in (1, 2):
            rest = on_ranks(
                num,
                lambda group: [[(rows(b), b.layout) for b in deal(read(files, **options), group).start_at(position)]],  # noqa: B023
                streams=streams,
            )
            assert whole_batches(rest, 1) == unbroken[num_taken:]


@pytest.mark.parametrize("epochs", [3, None])
def test_iterating_over_several_epochs_is_an_error(files: str, epochs: int | None) -> None:
    dealt = deal(read(files, epochs=epochs), Group(rank=0, world_size=1, streams=2, deterministic=False))
    with pytest.raises(ValueError, match=rf"reader: got one with epochs={epochs}, expected epochs=1\."):
        iter(dealt)
    assert sorted(n for batch in dealt.epoch(2) for n in rows(batch)) == numbers_of({})


def test_a_rank_that_wants_to_stop_is_known_to_all_with_the_same_batch(files: str) -> None:
    def run(group: Group) -> list[bool]:
        iterator, known = deal(read(files), group).epoch(0), []
        for k in range(4):
            iterator.interrupted = k == 2 and group.rank == 1
            next(iterator)
            known.append(iterator.is_interrupted)
        return known

    assert on_ranks(2, run, streams=2) == [[False, False, True, True]] * 2


def test_first_is_a_batch_on_every_rank(files: str) -> None:
    with pytest.warns(UserWarning, match="rank 2 has no rows: they are dealt to 2 streams"):
        batches = on_ranks(3, lambda group: deal(read(files), group).first(), streams=2)
    assert [int(b[NUM_SAMPLES]) for b in batches] == [6, 6, 0]
    assert len({b.layout for b in batches}) == 1


def test_identity_is_of_the_rows_and_the_streams(files: str) -> None:
    def identity(num: int, streams: int) -> str:
        return on_ranks(num, lambda group: deal(read(files), group).identity, streams=streams)[0]

    assert identity(1, 4) == identity(2, 4) != identity(2, 2)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (Group(rank=0, world_size=1, streams=5, deterministic=False), {}, "batch_size: got 12 for 5 streams"),
        (
            Group(rank=0, world_size=1, streams=2, deterministic=False),
            {"world_size": 2},
            "reader: got one of world_size 2",
        ),
    ],
)
def test_errors(files: str, group: Group, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deal(read(files, **options), group)


def test_a_position_of_other_streams(files: str) -> None:
    dealt = deal(read(files), Group(rank=0, world_size=1, streams=2, deterministic=False))
    with pytest.raises(ValueError, match=r"position: got one of 3 streams, expected 2\. .*Join with streams=3"):
        dealt.start_at({"streams": 3, "positions": [None] * 3})
    with pytest.raises(ValueError, match=r"expected a `RankIterator\.position`"):
        dealt.start_at({"taken": 3})


def test_by_row_where_a_stream_would_have_no_unit(files: str) -> None:
    for streams, by_row in ((2, False), (3, False), (4, True), (6, True)):
        dealt = deal(read(files), Group(rank=0, world_size=1, streams=streams, deterministic=False))
        assert dealt.by_row == by_row, streams


def test_no_rows_at_all_is_an_error_on_every_rank(files: str) -> None:
    with pytest.raises(ValueError, match=r"reader: got .*expected at least one batch"):
        on_ranks(2, lambda group: deal(read(files, filter=[("n", ">", 1e6)]), group).first(), streams=2)


def test_a_pass_without_a_batch_warns(files: str) -> None:
    dealt = deal(read(files, filter=[("n", ">", 1e6)]), Group(rank=0, world_size=1, streams=2, deterministic=False))
    with pytest.warns(UserWarning, match=r"got no batch in a pass over the data, but 0 rows for rank 0"):
        assert list(dealt) == []


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("streams", [2, 4, 12])  # by unit, by row
@pytest.mark.parametrize("absent", [True, False])
def test_a_column_that_no_file_has_is_warned_of_once(tmp_path: Path, absent: bool, streams: int) -> None:
    """Over all streams and ranks; a column that one file has is none."""
    for k in range(4):
        columns = {"n": [1.0] * 24} | ({} if absent or k != 2 else {"x": [2.0] * 24})
        parquet.write_table(pa.table(columns), tmp_path / f"{k}.parquet")
    plain = reader(str(tmp_path), [fixedlen("n", [0.0]), fixedlen("x", [0.0], missing="empty")], 12, format="parquet")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rank in range(2):
            dealt = deal(plain, Group(rank=rank, world_size=2, streams=streams, deterministic=False))
            for stream in dealt.streams.values():
                assert list(stream)
    assert len([w for w in caught if "got no columns ['x']" in str(w.message)]) == absent


def test_a_transform_that_changes_the_number_of_samples(files: str) -> None:
    dealt = deal(
        read(files, transform=lambda columns: {"n": columns["n"][:3]}),
        Group(rank=0, world_size=1, streams=2, deterministic=False),
    )
    with pytest.raises(ValueError, match=r"transform: got 3 samples in 'n', expected 12"):
        next(iter(dealt))


@pytest.mark.skipif("RECFX_CRITEO_SAMPLE" not in os.environ, reason="RECFX_CRITEO_SAMPLE names no folder")
@pytest.mark.parametrize("streams", [2, pytest.param(20, marks=pytest.mark.slow)])  # by unit, by row
def test_two_processes_read_the_real_sample_as_one_does(streams: int) -> None:
    paths, per_stream = os.environ["RECFX_CRITEO_SAMPLE"], 4000 // streams
    said = []
    for rank in launch(SCRIPT, [paths, str(streams), str(per_stream)], timeout=60):
        assert rank.returncode == 0, rank.stderr
        said.append(json.loads(rank.stdout))
    assert said[0]["forms"] == said[1]["forms"]
    assert [s["by_row"] for s in said] == [streams == 20] * 2
    alone = deal(
        reader(paths, streams_of_ranks.columns(), 4000, drop_remainder=False),
        Group(rank=0, world_size=1, streams=streams, deterministic=False),
    )
    expected = [streams_of_ranks.rows(b) for b in alone]
    assert [a + b for a, b in zip(said[0]["rows"], said[1]["rows"], strict=True)] == expected
    whole = reader(paths, streams_of_ranks.columns(), 4000, drop_remainder=False)
    in_order = Counter(map(str, chain(*map(streams_of_ranks.rows, whole))))
    assert Counter(map(str, chain(*expected))) == in_order


@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 30}], ids=["in order", "shuffled"])
def test_a_rank_decodes_a_unit_once_an_epoch_for_all_its_streams_of_rows(
    files: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    decoded, plain = [], Decoder._decode
    monkeypatch.setattr(Decoder, "_decode", lambda self, *unit: decoded.append(unit) or plain(self, *unit))
    dealt = deal(read(files, **options), Group(rank=0, world_size=1, streams=4, deterministic=False))
    for epoch in (0, 1):
        assert sorted(n for batch in dealt.epoch(epoch) for n in rows(batch)) == numbers_of({})
        assert len(decoded) == len(UNITS) * (epoch + 1)
