"""Files to packed batches only: two workers against one, formats against each other, and cached rows.

40 list columns shaped like a Criteo click log, batches of 1000 rows. Files are in the page cache: rates
measure decoding and packing, not a disk.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import orc
from torch.utils.data import DataLoader

from bench.harness import Claim, Claims, Comparison, compare, rate
from recfx.data import FixedLen, Reader, fixedlen, reader, varlen
from recfx.data.convert import convert
from recfx.examples.criteo_synthetic import generate
from recfx.examples.deepfm import COLUMNS

BATCH_SIZE, NUM_FILES, ROWS_PER_FILE = 1000, 4, 100_000
NUM_ROWS = NUM_FILES * ROWS_PER_FILE
FEW, MANY = 10_000, 100_000  # rows in a unit; MANY is what `recfx convert` writes
CACHED_ROWS_PER_S = 5_000_000


class Epochs:
    """A side of a comparison, where one step is `epochs` passes over the files."""

    def __init__(self, batches: Reader | DataLoader, epochs: int = 1) -> None:
        self.batches, self.epochs = batches, epochs

    def run(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            num_batches = sum(1 for _ in self.batches)
            assert num_batches == self.epochs * NUM_ROWS // BATCH_SIZE
        return time.perf_counter() - start


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same rows in one folder per format."""
    folder = tmp_path_factory.mktemp("reader")
    generate(folder / "made", rows_per_file=ROWS_PER_FILE, train_files=NUM_FILES, eval_files=1, seed=0)
    made = folder / "made" / "train"
    convert(made, folder / "orc_lists", to="orc", rows_per_unit=MANY)
    convert(made, folder / "orc_lists_10k", to="orc", rows_per_unit=FEW)
    convert(made, folder / "parquet_lists", rows_per_unit=MANY)
    convert(made, folder / "parquet_lists_10k", rows_per_unit=FEW)
    for name in ("plain", "arrow_lists", "csv_flat"):
        (folder / name).mkdir()
    for file in sorted((folder / "orc_lists").iterdir()):
        table = orc.read_table(file).combine_chunks()
        with pa.ipc.new_file(folder / "arrow_lists" / f"{file.stem}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=MANY)
        plain = pa.table({name: first_items(table[name].chunk(0)) for name in table.schema.names})
        orc.write_table(plain, folder / "plain" / file.name)
        pa.csv.write_csv(plain, folder / "csv_flat" / f"{file.stem}.csv")
    convert(folder / "plain", folder / "parquet_flat", rows_per_unit=MANY)
    return folder


def first_items(lists: pa.ListArray) -> pa.Array:
    """The first item of each list, null for an empty list."""
    empty = lists.value_lengths().to_numpy() == 0
    return lists.values.take(pa.array(lists.offsets.to_numpy()[:-1], mask=empty))


def read(paths: Path, **kwargs) -> Reader:
    columns = [
        fixedlen(c.name, c.default, null="empty") if isinstance(c, FixedLen) else varlen(c.name, c.dtype, null="empty")
        for c in COLUMNS
    ]
    return reader(paths, columns, BATCH_SIZE, **{"prefetch": 0, **kwargs})


@contextmanager
def one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("name", ["orc_lists", "parquet_lists", "orc_lists_10k", "parquet_lists_10k"])
def test_two_threads_decode_more_than_one(benchmark, folder, claims: Claims, name):
    """Both decode ahead while the caller packs."""
    one, two = (Epochs(read(folder / name, threads=n, prefetch=1, epochs=4), 4) for n in (1, 2))
    result: Comparison = benchmark.pedantic(compare, args=(two, one), kwargs={"blocks": 5}, rounds=1)
    claims.add(result.claim(f"decoding {name}, 2 threads", "1 thread", batch_size=4 * NUM_ROWS, target=1.5))


def test_threads_and_processes(benchmark, folder, claims: Claims):
    loader = DataLoader(read(folder / "orc_lists"), batch_size=None, num_workers=2, collate_fn=_as_it_is)
    threads, processes = Epochs(read(folder / "orc_lists", threads=2, prefetch=1)), Epochs(loader)
    result: Comparison = benchmark.pedantic(compare, args=(threads, processes), kwargs={"blocks": 5}, rounds=1)
    claims.add(result.claim("decoding orc_lists, 2 threads", "2 DataLoader processes", batch_size=NUM_ROWS, target=1.0))


def _as_it_is(batch):
    return batch


@pytest.mark.parametrize("shuffle_rows", [0, FEW, NUM_ROWS])
def test_a_later_epoch_from_the_cache(benchmark, folder, tmp_path, claims: Claims, shuffle_rows):
    side = Epochs(read(folder / "orc_lists", cache=tmp_path, shuffle_rows=shuffle_rows))
    with one_core():
        seconds = benchmark.pedantic(rate, args=(side,), rounds=1)
    rows_per_s = NUM_ROWS / statistics.median(seconds)
    claims.add(
        Claim(
            name="later epoch from the cache, 1 core" + f", {shuffle_rows} rows shuffled" * bool(shuffle_rows),
            unit="rows/s",
            recfx=rows_per_s,
            baseline=CACHED_ROWS_PER_S,
            baseline_name="goal",
            ratio=rows_per_s / CACHED_ROWS_PER_S,
            target=1.0,
        )
    )


@pytest.mark.parametrize(
    "name",
    ["orc_lists", "orc_lists_10k", "parquet_lists", "parquet_lists_10k", "parquet_flat", "arrow_lists", "csv_flat"],
)
def test_formats_on_one_core(benchmark, folder, claims: Claims, name):
    with one_core():
        seconds = benchmark.pedantic(rate, args=(Epochs(read(folder / name)),), kwargs={"blocks": 3}, rounds=1)
    size = sum(file.stat().st_size for file in (folder / name).iterdir()) / NUM_ROWS
    claims.note(f"{name:>17}, 1 core: {NUM_ROWS / statistics.median(seconds):>10,.0f} rows/s, {size:.0f} bytes a row")
