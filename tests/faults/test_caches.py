"""A cache of rows: what it tells apart, and what happens to its files while they are read."""

from __future__ import annotations

import faulthandler
import functools
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
import torch

from recfx.data import OneOf, Split, cache, fixedlen, hashed, reader, varlen
from recfx.data.columns import Between, VarLen
from recfx.data.decode import Recipe
from recfx.data.files import match_files
from recfx.data.identity import NoIdentityError, identity_of
from recfx.data.packing import mapped_files
from recfx.kernels.lists.string_hash import farm_hashes, murmur_hashes
from tests.data.rows import all_rows, write
from tests.faults.children import folder_for_all, in_child

NUM_ROWS, UNIT_ROWS, BATCH_SIZE = 8000, 2000, 100
COLUMNS = [fixedlen("x", [0.0]), varlen("c", torch.int64)]


@pytest.fixture
def folder(tmp_path) -> Path:
    numbers = range(NUM_ROWS)
    write(
        tmp_path / "a.parquet", pa.table({"x": [float(i) for i in numbers], "c": [[i, -i] for i in numbers]}), UNIT_ROWS
    )
    return tmp_path


def read(folder: Path, columns: list = COLUMNS, **kwargs):
    return reader(folder / "a.parquet", columns, BATCH_SIZE, **{"cache": folder / "cache", "prefetch": 0, **kwargs})


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").glob("*/*") if path.is_file())


# What a cache distinguishes.


def test_functions_of_one_name_share_nothing(folder):
    limits = (10, 50, 100)

    def count(limit: int, **kwargs) -> int:
        columns = [fixedlen("x", [0.0], valid=lambda values: values < limit)]
        batches = read(folder, columns, on_bad="skip", drop_remainder=False, **kwargs)
        return sum(int(batch["num_samples"]) for batch in batches)

    assert [count(limit, cache=None) for limit in limits] == list(limits)
    with pytest.warns(
        UserWarning, match=r"column 'x', valid: the function '.*<lambda>', expected plain .* cached"
    ) as told:
        assert [count(limit) for limit in limits] == list(limits)
    assert len(told) == len(limits)  # one for each reader
    assert kept(folder) == []


class Below:
    """Its repr hides what it does."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values < self.limit

    def __repr__(self) -> str:
        return "Below()"


class Odd(OneOf):
    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values % 2 == 1


class OtherList(VarLen):
    pass


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (fixedlen("x", [0.0], valid=Below(3)), "column 'x', valid: an object of Below"),
        (fixedlen("x", [0.0], valid=Below(3).__call__), "column 'x', valid: the function 'Below.__call__'"),
        (fixedlen("x", [0.0], valid=Odd(1)), "column 'x', valid: an object of Odd"),
        (fixedlen("x", [0.0], valid=np.isfinite), "column 'x', valid: "),
        (fixedlen("x", [0.0], valid=OneOf(Below(2))), "column 'x', valid, numbers: an object of Below"),
        (hashed("x", functools.partial(farm_hashes)), "column 'x', string_hash: an object of partial"),
        (hashed("x", lambda values, offsets: farm_hashes(values, offsets)), "column 'x', string_hash: the function"),
        (hashed("x", torch.ops.aten.add), "column 'x', string_hash: "),
        (OtherList("x", torch.int64), "columns: an object of OtherList"),
    ],
)
def test_what_may_change_has_no_identity(column, told):
    with pytest.raises(NoIdentityError, match=told):
        _ = Recipe((column,)).key


def test_a_registered_function_in_a_filter_has_no_identity():
    summary = {"summary": "its body may change", "description": ""}
    pc.register_scalar_function(lambda _, x: x, "recfx_test_odd", summary, {"x": pa.int64()}, pa.int64())
    arrow_s_own = (ds.field("a") > 3) & ds.field("b").isin([1, 2]) & ~pc.starts_with(ds.field("s"), "recfx")
    assert identity_of(arrow_s_own, "filter") != identity_of(ds.field("a") > 3, "filter")
    with pytest.raises(NoIdentityError, match="filter: a registered function 'recfx_test_odd'"):
        identity_of(arrow_s_own & pc.Expression._call("recfx_test_odd", [ds.field("a")]), "filter")


def test_equal_recipes_have_one_key_and_others_another():
    long, longer = np.arange(5000.0), np.arange(5000.0)
    longer[2500] = -1  # repr leaves it out
    recipes = [
        [fixedlen("x", [0.0], valid=valid), hashed("y", string_hash, buckets=buckets)]
        for valid in (None, Between(0, 1), Between(0, 2), OneOf(1), OneOf(long), OneOf(longer), OneOf(np.int8(1)))
        for string_hash in (farm_hashes, murmur_hashes)
        for buckets in (None, 0, 7)
    ]
    splits = [None, Split(part="train", fraction=0.5, key="x"), Split(part="validation", fraction=0.5, key="x")]

    def keys() -> list[str]:
        return [Recipe(tuple(columns), split=split).key for columns in recipes for split in splits]

    assert keys() == keys()
    assert len(set(keys())) == len(recipes) * len(splits)


def test_a_key_is_the_same_in_any_process():
    assert Recipe((hashed("x", farm_hashes, buckets=7),)).key == (
        "tuple(VarLen(name=str 'x', dtype=dtype torch.int64, depth=int 1, weighted=bool False, valid=NoneType None, "
        "null=str 'error', string_hash=farm_hashes 1, buckets=int 7, rounding=str 'error', missing=str 'error', "
        "truncate=NoneType None, side=str 'right')); NoneType None; NoneType None; NoneType None; str 'raise'"
    )


def test_files_without_a_time_of_change_are_not_cached(folder, monkeypatch):
    def without_time(*args):
        files = match_files(*args)
        for file in files:
            object.__setattr__(file, "mtime_ns", None)
        return files

    monkeypatch.setattr("recfx.data.reading.match_files", without_time)
    with pytest.warns(UserWarning, match=r"cache: got file '.*a.parquet' without a time of change"):
        assert read(folder).plan.decoder.cache is None


# Files that change while they are read.


@pytest.mark.parametrize("shuffle_rows", [0, NUM_ROWS])
@pytest.mark.parametrize("left", [0, 0.5, -10])
def test_a_file_cut_short_while_mapped_is_an_error_that_names_it(folder, shuffle_rows, left):
    list(read(folder))
    files = kept(folder)

    def work() -> None:
        batches = iter(read(folder, shuffle_rows=shuffle_rows, epochs=2))
        for _ in range(5):
            next(batches)
        for path in files:
            size = path.stat().st_size
            os.truncate(path, size + left if left < 0 else int(size * left))
        with pytest.raises(ValueError, match=rf"cache file '{folder}/cache/.*arrow': got \d+ bytes, expected the \d+"):
            list(batches)
        with pytest.raises(StopIteration):
            next(batches)

    in_child(work)
    assert all_rows(read(folder)) == all_rows(read(folder, cache=None))  # a new reader finds the files damaged


def test_a_file_cut_short_between_two_epochs_is_an_error_that_names_it(folder):
    batches = read(folder)
    list(batches), list(batches)
    path = kept(folder)[2]
    os.truncate(path, 100)

    def work() -> None:
        with pytest.raises(ValueError, match=f"cache file '{path}': got 100 bytes"):
            list(batches)

    in_child(work)


def test_a_data_file_cut_short_while_it_is_read_is_an_error_that_names_it(folder):
    """An Arrow file too, whose rows could be used where they are on disk."""
    path = Path(write(folder / "b.arrow", pa.table({"c": [[i, -i] for i in range(NUM_ROWS)]}), UNIT_ROWS))

    def work() -> None:
        batches = iter(reader(path, COLUMNS[1:], BATCH_SIZE, prefetch=0))
        seen = [next(batches)]
        os.truncate(path, 0)
        with pytest.raises(ValueError, match=f"file '{path}': got 0 bytes"):
            seen.extend(batches)
        assert [row["c"] for row in all_rows(seen)] == [[i, -i] for i in range(UNIT_ROWS)]

    in_child(work)


def test_files_deleted_or_replaced_while_mapped_stay_whole(folder):
    rows = all_rows(read(folder))
    batches = read(folder)
    assert all_rows(batches) == rows
    for path in kept(folder):
        path.rename(path.with_suffix(".moved"))
        path.write_bytes(b"another")
    assert all_rows(batches) == rows
    shutil.rmtree(folder / "cache")
    assert all_rows(batches) == rows
    assert all_rows(read(folder)) == rows
    assert len(kept(folder)) == NUM_ROWS // UNIT_ROWS


def test_a_bus_error_of_other_memory_still_ends_the_process(folder):
    list(read(folder))
    path = folder / "other"
    path.write_bytes(bytes(8192))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's
        list(read(folder))  # the handler is there
        other = np.memmap(path, mode="r")
        os.truncate(path, 0)
        other.sum()

    with pytest.raises(AssertionError, match=f"ended by signal {signal.SIGBUS:d}"):
        in_child(work)


def test_without_a_compiler_files_are_read_and_not_mapped(folder, monkeypatch):
    rows = all_rows(read(folder))
    monkeypatch.setattr(mapped_files, "library", lambda: None)
    batches = read(folder)
    it = iter(batches)
    next(it)
    for path in kept(folder):
        os.truncate(path, 0)
    assert 1 + len(list(it)) == NUM_ROWS // BATCH_SIZE
    assert batches.plan.decoder.cache._mapped == {}
    assert all_rows(batches) == rows


# Where nothing can be written.


def test_a_disk_with_too_little_room_warns_once(folder):
    rows = all_rows(read(folder, cache=None))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        batches = read(folder, threads=2)
        with pytest.warns(
            UserWarning, match=r"cache: got '.*' \(.*File too large.*\), expected a folder to write"
        ) as told:
            assert all_rows(batches) == all_rows(batches) == rows
        assert len(told) == 1

    in_child(work)
    assert kept(folder) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_that_is_read_only_is_read_from_and_warns_once():
    with folder_for_all() as folder:
        write(
            folder / "a.parquet", pa.table({"x": [float(i) for i in range(400)], "c": [[i] for i in range(400)]}), 100
        )
        rows = all_rows(read(folder))
        kept(folder)[0].unlink()
        damaged = kept(folder)[0]
        damaged.write_bytes(damaged.read_bytes()[:-9])

        def work() -> None:
            os.setuid(12345)
            batches = read(folder)
            with pytest.warns(
                UserWarning, match=r"cache: got '.*Permission denied.*expected a folder to write"
            ) as told:
                assert all_rows(batches) == all_rows(batches) == rows
            assert len(told) == 1

        in_child(work)
        assert len(kept(folder)) == 3


def test_a_folder_deleted_meanwhile_is_made_again(folder):
    batches = iter(read(folder))
    next(batches)
    shutil.rmtree(folder / "cache")
    assert 1 + len(list(batches)) == NUM_ROWS // BATCH_SIZE
    assert len(kept(folder)) == NUM_ROWS // UNIT_ROWS - 1


def test_foreign_files_in_the_folder_are_left_alone(folder):
    rows = all_rows(read(folder))
    place = kept(folder)[0].parent
    for name in ("0-notes.arrow", "README", "0.arrow", "0-1-2-3.arrow"):
        (place / name).write_bytes(b"mine")
    assert all_rows(read(folder)) == rows
    assert len(kept(folder)) == 4 + NUM_ROWS // UNIT_ROWS
    assert cache.VERSION == 3
