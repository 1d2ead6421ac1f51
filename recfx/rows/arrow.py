"""A logical table as Arrow batches, and to and from Parquet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from recfx.rows.surgery import check_ids, check_values, write_
from recfx.rows.views import Rows, live_rows, taken, view_of
from recfx.step import Step, TrainState

__all__ = ["batches", "export_parquet", "import_parquet_"]

BATCH_ROWS = 2**16


def batches(step: Step, state: TrainState, table: str, *, num_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Every row, in the order of row numbers, as Arrow: the fields of `Rows` except `known`. Of ranks, this one's rows.

    Args:     num_rows: most rows of a batch, >= 1. Each is a copy, so training may continue.
    Raises:   ValueError on an unknown table.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows: got {num_rows}, expected at least 1.")
    view = view_of(step, state, table)
    return (_arrow(taken(view, row, view.table.ids[row])) for row in live_rows(view).split(num_rows) if row.numel())


def export_parquet(step: Step, state: TrainState, table: str, path: str | Path) -> Path:
    """Writes `batches` to one Parquet file, which appears when it is complete.

    Of several ranks each writes a file: given rows.parquet, rank 0 of 2 writes rows-00000-of-00002.parquet.
    Returns:  the file's path.
    Raises:   ValueError on an unknown table; OSError naming `path` when the disk is full or not writable.
    """
    path, view = Path(path), view_of(step, state, table)
    if view.world_size > 1:
        path = path.with_name(f"{path.stem}-{view.rank:05d}-of-{view.world_size:05d}{path.suffix}")
    scratch = path.with_name(f".{path.name}.unfinished")
    none = torch.zeros(0, dtype=torch.int64, device=view.table.ids.device)
    schema = _arrow(taken(view, none, none)).schema
    try:
        with parquet.ParquetWriter(scratch, schema, write_page_checksum=True) as writer:
            for batch in batches(step, state, table):
                writer.write_batch(batch)
        os.replace(scratch, path)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error  # Arrow's message names the scratch file
        raise OSError(error.errno, f"path: got {path}, expected a file that can be written. {why}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return path


def import_parquet_(step: Step, state: TrainState, table: str, path: str | Path) -> TrainState:
    """`write_` of the columns 'id', 'weight' (lists of D numbers) and of any optimiser slots in the file.

    Of several ranks each takes the rows that it owns, so all import the same file; where ranks wrote one each, all
    import each of them.
    Cost:     reads the file twice: everything is checked before anything is written. Holds the ids in memory.
    Raises:   as `write_`, naming the file; ValueError also when a column is missing or holds nulls or lists of
              another length; OSError when the file cannot be read or is damaged. Nothing is then written.
    """
    view = view_of(step, state, table)
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: {error} Expected a Parquet file.") from error
    with file:
        known = file.schema_arrow.names
        if {"id", "weight"} - set(known) or len(set(known)) < len(known):
            raise ValueError(f"{path}: got columns {known}, expected 'id' and 'weight' among them, each once.")
        names = [name for name in view.tensors if name in known]

        def read() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for batch in file.iter_batches(BATCH_ROWS, columns=["id", *names]):
                ids = torch.from_numpy(_column(batch, "id", pa.int64()).to_numpy().copy())
                values = {name: _matrix(batch, name, view.tensors[name].shape[1]) for name in names}
                yield ids.to(device), {name: value.to(device) for name, value in values.items()}

        device = view.table.ids.device
        all_ids = [torch.zeros(0, dtype=torch.int64, device=device)]
        try:
            for ids, values in read():
                check_values(view, ids, values)
                all_ids.append(ids)
            check_ids(view, state, table, torch.cat(all_ids))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except OSError as error:
            raise OSError(f"{path}: {error}. The file is damaged; export it again.") from error
        for ids, values in read():
            write_(step, state, table, ids, values.pop("weight"), values)
    return state


def _arrow(rows: Rows) -> pa.RecordBatch:
    columns = {"id": pa.array(rows.id.cpu().numpy())}
    for name, value in {"weight": rows.weight, **rows.slots}.items():
        flat = pa.array(value.cpu().reshape(-1).numpy())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
    for name in ("first_step", "last_step", "num_steps"):
        columns[name] = pa.array(getattr(rows, name).cpu().numpy())
    return pa.RecordBatch.from_pydict(columns)


def _column(batch: pa.RecordBatch, name: str, type_: pa.DataType) -> pa.Array:
    column = batch.column(name)
    wrong = f"got column '{name}' of {column.type}, expected {type_}."
    item = getattr(column.type, "value_type", column.type)
    is_number = pa.types.is_integer(item) or (pa.types.is_floating(item) and pa.types.is_nested(type_))
    if not is_number and not pa.types.is_null(item):  # Arrow would also cast times, text and bools to numbers
        raise ValueError(wrong)
    try:
        is_bits = (column.type, type_) == (pa.uint64(), pa.int64())  # as in `recfx.data.varlen`
        column = column.view(type_) if is_bits else column.cast(type_)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(wrong) from None
    if column.null_count or (pa.types.is_fixed_size_list(type_) and column.flatten().null_count):
        raise ValueError(f"got nulls in column '{name}', expected none.")
    return column


def _matrix(batch: pa.RecordBatch, name: str, dim: int) -> Tensor:
    flat = _column(batch, name, pa.list_(pa.float32(), dim)).flatten()
    return torch.from_numpy(flat.to_numpy().copy()).reshape(len(batch), dim)
