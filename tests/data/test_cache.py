"""Rows kept on disk: the same batches, nothing decoded, nothing stale, nothing damaged."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from recfx.data import Reader, cache, decode, reader, varlen
from tests.data.rows import all_rows, write

COLUMNS = [varlen("c", torch.int64), varlen("word", torch.uint8)]


def table_of(first: int, last: int) -> pa.Table:
    numbers = range(first, last)
    return pa.table({"c": [[i, -i][: i % 3] for i in numbers], "word": [f"w{i}" for i in numbers]})


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "data" / "a.orc", table_of(0, 20), 6)
    write(tmp_path / "data" / "b.parquet", table_of(20, 35), 6)
    return tmp_path


def read(folder: Path, columns: list = COLUMNS, **kwargs) -> Reader:
    return reader(folder / "data", columns, 4, **{"drop_remainder": False, "cache": folder / "cache", **kwargs})


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*/*"))


def no_decoding(monkeypatch) -> None:
    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decode, "conform", fail)


@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 9}, {"filter": [("word", "!=", "w3")]}, {"threads": 2}])
def test_a_later_epoch_decodes_nothing(folder, monkeypatch, options):
    plain = [batch.buffer for batch in read(folder, cache=None, epochs=2, **options)]
    first = [batch.buffer for batch in read(folder, epochs=2, **options)]
    assert len(entries(folder)) == 7
    no_decoding(monkeypatch)
    second = [batch.buffer for batch in read(folder, epochs=2, **options)]
    assert len(plain) == len(first) == len(second)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(plain, first, second, strict=True))


def test_another_file_or_recipe_finds_nothing_of_it(folder):
    rows = all_rows(read(folder))
    assert all_rows(read(folder, filter=[("word", "==", "w3")])) == [rows[3]]
    assert [list(row) for row in all_rows(read(folder, COLUMNS[:1]))] == [["c"]] * 35
    path = folder / "data" / "a.orc"
    content, times = path.read_bytes(), os.stat(path)
    write(path, table_of(100, 120), 6)
    assert all_rows(read(folder))[0] == {"c": [100], "word": [b"w100"]}
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert all_rows(read(folder)) == rows


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_decoded_anew(folder, damage):
    rows = all_rows(read(folder))
    for entry in entries(folder):
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 4
        entry.write_bytes({"flip": content, "cut": content[:-20], "empty": b""}[damage])
    assert all_rows(read(folder)) == rows
    assert len(entries(folder)) == 7
    assert all_rows(read(folder)) == rows


def test_skipped_rows_are_counted_from_the_cache_too(folder, monkeypatch):
    write(folder / "data" / "a.orc", pa.table({"c": [[1], None, [2]], "word": ["a", "b", "c"]}), 2)
    for _ in range(2):
        it = iter(read(folder, on_bad="skip"))
        assert len(all_rows(it)) == 17
        assert it.num_bad == 1
        no_decoding(monkeypatch)


def test_a_full_disk_leaves_no_half_entry(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    rows = all_rows(read(folder, cache=None))
    monkeypatch.setattr(pa.ipc, "new_file", fail)
    batches = read(folder)
    with pytest.warns(
        UserWarning, match=r"cache: got '.*cache' \(No space left on device\), expected a folder"
    ) as told:
        assert all_rows(batches) == all_rows(batches) == rows
    assert len(told) == 1
    assert [path for path in entries(folder) if path.is_file()] == []


@pytest.mark.parametrize("shuffle_rows", [0, 100])
def test_few_entries_are_mapped_at_once(folder, monkeypatch, shuffle_rows):
    rows = all_rows(read(folder, shuffle_rows=shuffle_rows))
    monkeypatch.setattr(cache, "MAX_MAPPED", 2)
    no_decoding(monkeypatch)
    batches = read(folder, shuffle_rows=shuffle_rows)
    assert all_rows(batches) == all_rows(batches) == rows
    assert len(batches.plan.decoder.cache._mapped) == 2


def test_shuffled_and_plain_epochs_share_the_entries(folder, monkeypatch):
    rows = all_rows(read(folder))
    no_decoding(monkeypatch)
    shuffled = all_rows(read(folder, shuffle_rows=50))
    assert shuffled != rows
    assert sorted(map(str, shuffled)) == sorted(map(str, rows))


def test_a_reader_that_was_sent_to_another_process(folder, monkeypatch):
    batches = read(folder)
    rows = all_rows(batches)
    no_decoding(monkeypatch)
    assert all_rows(batches) == rows
    sent = pickle.loads(pickle.dumps(batches))
    assert sent.plan.decoder.cache._mapped == {}
    assert all_rows(sent) == rows
