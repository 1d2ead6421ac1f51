"""The contents of a checkpoint: numpy views of a state, and the files that they are written to."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import MappingKey, tree_flatten_with_path

from recfx.checkpoint.files import write_file, write_tensors
from recfx.checkpoint.folders import (
    DIGITS,
    FORMAT,
    MANIFEST,
    PREFIX,
    STATE,
    UNFINISHED,
    best,
    delete,
    finished,
    hide,
    name_of,
    read_manifest,
    sync_folder,
    write_manifest,
)
from recfx.embeddings import Plan
from recfx.generators import generator_states
from recfx.step import Step, TrainState
from recfx.table import CANDIDATE_FIELDS, COUNTERS, ROW_FIELDS, TableState

__all__ = [
    "Contents",
    "DenseTensor",
    "SavedRows",
    "contents_of",
    "delete_older",
    "dense_tensors",
    "publish",
    "replace_folder",
    "told",
    "write",
    "write_files",
]

SHARD_BYTES = 2**25
GENERATOR = "generator."  # plus a device type: the state of torch's generator, if the step draws from it
WORKERS = 2  # one packs and computes checksums while the other waits for the disk


class SavedRows(NamedTuple):
    """The rows of one table: columns by their name in TableState; the `live` rows are saved."""

    columns: dict[str, np.ndarray]  # [R, ...]
    live: np.ndarray | range  # i32 [n], rising

    def numbers(self) -> np.ndarray:
        """`live` as an array."""
        live = self.live
        return np.arange(live.start, live.stop, dtype=np.int32) if isinstance(live, range) else live


class Contents(NamedTuple):
    """The contents of one checkpoint before it is written."""

    number: int
    state: bytes  # safetensors of everything but rows
    tables: tuple[SavedRows, ...]
    manifest: dict  # without the files


def contents_of(step: Step, state: TrainState, *, number: int, loop: dict, since: tuple[int, ...] | None) -> Contents:
    """Views of the state; rows are not copied on a CPU, dense tensors are.

    Args:     since: by table, the first step whose touched rows are saved; None: all live rows are saved.
    Raises:   ValueError inside a gradient accumulation window, or on a number out of range; TypeError when `loop` is
              not a dict that JSON can store; NotImplementedError on a big-endian machine.
    """
    if sys.byteorder != "little":
        raise NotImplementedError("save: got a big-endian machine, expected a little-endian one, as the files are.")
    if type(number) is not int or not 0 <= number < 10**DIGITS:
        raise ValueError(f"number: got {number!r}, expected an int, 0 to 10**9 - 1. Checkpoints are ordered by it.")
    try:
        json.dumps({**loop, "step": number}, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"loop: got {loop!r}, expected a dict that JSON can hold: {error}.") from error
    if int(state.window.num_batches):
        raise ValueError("state: got an open accumulation window, expected none. Save between optimiser steps.")
    tables, small = [], {d.name: d.tensor for d in dense_tensors(state)} | {"step": state.step}
    small |= {"rate": state.rate} if isinstance(state.rate, Tensor) else {}
    if step.draws.happened:
        small |= {f"{GENERATOR}{kind}": s for kind, s in generator_states(state.step.device).items()}
    for i, table in enumerate(state.tables):
        small |= {f"table.{i}.{name}": getattr(table, name).clone() for name in ("num_rows", *COUNTERS)}
        small[f"table.{i}.free_rows"] = table.free_rows[: int(table.num_free)].flip(0)
        for name in CANDIDATE_FIELDS if table.candidates.ids.numel() else ():
            small[f"table.{i}.candidates.{name}"] = getattr(table.candidates, name)[: int(table.num_candidates)]
        tables.append(_rows(table, None if since is None else since[i]))
    manifest = {
        "format": FORMAT,
        "seed": step.seed,
        "slots": step.slots,
        "loop": {**loop, "step": number},
        "tables": table_names(step.plan),
    }
    return Contents(number, safetensors.torch.save(_contiguous(small)), tuple(tables), manifest)


def _rows(table: TableState, since: int | None) -> SavedRows:
    num_rows = int(table.num_rows)
    columns = {name: getattr(table, name)[:num_rows].cpu().numpy() for name in ROW_FIELDS}
    if since is None and not int(table.num_free):
        return SavedRows(columns, range(num_rows))  # made an array in the child, so that the fork is not delayed
    live = np.arange(num_rows, dtype=np.int32)
    if since is not None:
        live = live[columns["seen"] >= since << 32]
    return SavedRows(columns, live[columns["vocabularies"][live] >= 0])


class DenseTensor(NamedTuple):
    """A dense tensor of the state: a parameter, a part or counter of its optimiser's state, or a statistic."""

    part: str  # "params", "dense.m", "dense.step", "stats"
    param: str | None  # the parameter that it belongs to
    tensor: Tensor

    @property
    def name(self) -> str:
        return self.part if self.param is None else f"{self.part}.{self.param}"


def dense_tensors(state: TrainState) -> list[DenseTensor]:
    """Dense parameters, their optimiser's state, and the statistics of `forward`."""
    found = []
    for path, tensor in tree_flatten_with_path({"params": state.params, "dense": state.dense, "stats": state.stats})[0]:
        keys = [_key(part) for part in path]
        of_param = isinstance(path[-1], MappingKey)
        found.append(DenseTensor(".".join(keys[:-1] if of_param else keys), keys[-1] if of_param else None, tensor))
    return found


def _key(part: Any) -> str:
    return part.key if isinstance(part, MappingKey) else part.name


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in separate memory, as safetensors requires."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def table_names(plan: Plan) -> list[list[list[list]]]:
    """By physical table and vocabulary, each logical table's name, first column and width."""
    return [[[[c.name, c.first, c.dim] for c in vocabulary] for vocabulary in t.vocabularies] for t in plan.tables]


# Writing. It may run in a forked child, so it does not use torch.


def write(
    folder: Path,
    contents: Contents,
    *,
    base: Path | None,
    max_to_keep: int,
    before_file: Callable[[], None] = lambda: None,
) -> Path:
    """Writes <folder>/step-<number> and deletes all but the `max_to_keep` newest folders of such names.

    Args:     base: the checkpoint whose rows the rows in `contents` update. Its files are linked, not copied, so each
              folder is complete and the older one may be deleted. None: `contents` holds every live row.
              before_file: called before each file of rows; may raise OSError to abort.
    Raises:   OSError naming the folder when the disk is full or not writable; ValueError when `base` is damaged.
              The unfinished folder is then deleted; after ctrl-C or a kill the next save deletes it.
    """
    target = folder / name_of(contents.number)
    scratch = folder / target.name.replace(PREFIX, UNFINISHED)
    try:
        scratch.mkdir()
        manifest = write_files(scratch, contents, base, before_file)
        write_manifest(scratch / MANIFEST, manifest)
        sync_folder(scratch)
        publish(scratch, target, manifest)
        sync_folder(folder)
    except Exception as error:  # not ctrl-C, which may come before any checkpoint is whole
        shutil.rmtree(scratch, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise told(error, scratch) from error
    delete_older(folder, target, max_to_keep)
    return target


def told(error: OSError, scratch: Path) -> OSError:
    """The error of a save that could not write its unfinished folder."""
    return OSError(error.errno, f"{scratch}: {error.strerror or error}. The checkpoints before this one are whole.")


def delete_older(folder: Path, target: Path, max_to_keep: int) -> None:
    """Deletes all but the `max_to_keep` newest checkpoints, `target` among them, and the one that best.json names."""
    kept = (target, best(folder))
    others = [path for path in finished(folder) if path not in kept and not path.is_symlink()]  # save creates no links
    for old in others[: max(len(others) + 1 - max_to_keep, 0)]:
        delete(hide(old))


def write_files(scratch: Path, contents: Contents, base: Path | None, before_file: Callable[[], None]) -> dict:
    """Writes all files except the manifest, and returns the manifest."""
    before = read_manifest(base) if base is not None else {"files": {}, "parts": [[] for _ in contents.tables]}
    files = {name: before["files"][name] for parts in before["parts"] for part in parts for name in part}
    for name in files:
        _link(base / name, scratch / name)  # type: ignore[operator]
    parts = [list(part) for part in before["parts"]]
    shards: dict[str, SavedRows] = {}
    for i, (columns, live) in enumerate(contents.tables):
        size = max(1, SHARD_BYTES // max(1, sum(column[:1].nbytes for column in columns.values())))
        first = sum(map(len, parts[i]))
        names = [f"table-{i}.{first + k:05d}.safetensors" for k in range(-(-len(live) // size))]
        shards |= {name: SavedRows(columns, live[k * size : (k + 1) * size]) for k, name in enumerate(names)}
        parts[i].append(names)

    def write_shard(name: str) -> str:
        before_file()
        return write_tensors(scratch / name, _shard(shards[name]))

    with ThreadPoolExecutor(WORKERS) as pool:
        files |= dict(zip(shards, pool.map(write_shard, shards), strict=True))
    files[STATE] = write_file(scratch / STATE, [contents.state])
    return contents.manifest | {"files": files, "parts": parts}


def _link(source: Path, target: Path) -> None:
    """Links the file, or copies it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        write_file(target, [source.read_bytes()])


def _shard(rows: SavedRows) -> dict[str, np.ndarray]:
    """Some rows of a table as they are saved, without the fields of a step in progress."""
    row = rows.numbers()
    shard = {"row": row}
    for name, column in rows.columns.items():
        shard[name] = column[row[0] : row[-1] + 1] if row[-1] - row[0] + 1 == len(row) else column[row]
    shard["last_seen"] = shard.pop("seen").view("<i4")[1::2]  # the high halves
    return dict(sorted(shard.items(), key=lambda item: (-item[1].itemsize, item[0])))  # so that each array is aligned


def publish(scratch: Path, target: Path, manifest: dict) -> None:
    """Makes the folder visible by one rename. A folder of equal files is replaced file by file, manifest last."""
    try:
        same = not target.is_symlink() and read_manifest(target)["files"] == manifest["files"]
    except ValueError:
        same = False
    if not same:
        replace_folder(scratch, target)
        return
    for name in (*manifest["files"], MANIFEST):
        os.replace(scratch / name, target / name)
    sync_folder(target)
    shutil.rmtree(scratch)  # not empty: a rename between two links to one file does nothing


def replace_folder(scratch: Path, target: Path) -> None:
    """Gives a folder its name. One that had it is hidden first, deleted afterwards, and put back after an error."""
    old = hide(target) if os.path.lexists(target) else None
    try:
        os.replace(scratch, target)
    except OSError:
        if old is not None:
            os.replace(old, target)
        raise
    if old is not None:
        delete(old)
