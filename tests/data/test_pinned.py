"""Batches in pinned memory: where the buffer of each way to pack is allocated. What CUDA would pin is noted here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq

from recfx.data import fixedlen, reader, varlen

COLUMNS = [fixedlen("label", [0.0]), varlen("c", torch.int64)]


@pytest.fixture
def path(tmp_path):
    table = pa.table({"label": [[float(i)] for i in range(20)], "c": [[i] * (i % 3) for i in range(20)]})
    pq.write_table(table, tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


@pytest.fixture
def pinned(monkeypatch) -> list[int]:
    """Addresses of memory to be pinned, on a machine that seems to have CUDA."""
    addresses: list[int] = []

    def noting(make: Any) -> Any:
        def run(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            addresses.extend([made.data_ptr()] * pin_memory)
            return made

        return run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", noting(torch.empty))
    monkeypatch.setattr(torch, "zeros", noting(torch.zeros))
    return addresses


@pytest.mark.parametrize(
    "how", [{}, {"shuffle_rows": 10}, {"transform": dict}], ids=["columns", "records", "transform"]
)
def test_the_buffer_itself_is_allocated_pinned(path, pinned, how):
    expected = [b.buffer.clone() for b in reader(path, COLUMNS, 5, **how)]
    assert not pinned
    batches = list(reader(path, COLUMNS, 5, pin_memory=True, **how))
    assert all(torch.equal(b.buffer, e) for b, e in zip(batches, expected, strict=True))
    assert {b.buffer.data_ptr() for b in batches} <= set(pinned)


def test_a_dataloaders_worker_does_not_pin(path, pinned, monkeypatch):
    monkeypatch.setattr("recfx.data.batch_iterator.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    with pytest.raises(ValueError, match="pin_memory: got True, expected False in a DataLoader's worker"):
        next(iter(reader(path, COLUMNS, 5, pin_memory=True)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_without_cuda_it_is_an_error(path):
    with pytest.raises(ValueError, match=r"pin_memory: got True, expected False\. torch finds no CUDA device here\."):
        reader(path, COLUMNS, 5, pin_memory=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_batches_are_pinned(path):
    assert all(b.buffer.is_pinned() for b in reader(path, COLUMNS, 5, pin_memory=True))
