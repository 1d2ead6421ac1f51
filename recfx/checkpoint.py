"""Any training state to and from disk: one folder per step, safetensors plus a JSON manifest, whole or not there.

    <folder>/step-000002000/state.safetensors   live rows in row order, dense parameters, optimiser moments, counters
    <folder>/step-000002000/manifest.json       checksum, table and column names, where the reader stood

Nothing of capacity, slots, time or host is written: equal states give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recfx.embeddings import Plan
from recfx.optim import AdamState
from recfx.step import Step, TrainState
from recfx.table import TableState, rebuild_

__all__ = ["latest", "load", "save"]

FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"
PREFIX, UNFINISHED = "step-", ".unfinished-"


def save(folder: str | Path, step: Step, state: TrainState, *, number: int, loop: dict, max_to_keep: int = 5) -> Path:
    """Writes <folder>/step-<number>, then deletes all but the `max_to_keep` newest.

    The folder appears by one rename after its files are on disk: a kill at any moment leaves the previous checkpoints
    whole and at most a hidden unfinished folder, which the next save clears away. Saving equal state at the same number
    again replaces the manifest alone, also by one rename.

    Args:     number: optimiser steps taken.  loop: small JSON-able dict, given back by `load`.
    Raises:   ValueError inside a gradient accumulation window; OSError when the disk is full or not writable.
    """
    if int(state.window.num_batches):
        raise ValueError("state: got an open accumulation window, expected none. Save between optimiser steps.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    scratch = folder / f"{UNFINISHED}{number:09d}"
    scratch.mkdir()
    try:
        save_file(_tensors(state), scratch / STATE)
    except SafetensorError as error:
        raise OSError(f"{scratch / STATE}: {error}. The checkpoints before this one are whole.") from error
    _sync(scratch / STATE)
    manifest = {
        "format": FORMAT,
        "sha256": _sha256(scratch / STATE),
        "tables": _table_names(step.plan),
        "loop": {**loop, "step": number},
    }
    manifest["manifest_sha256"] = _digest(manifest)
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    _sync(scratch / MANIFEST)
    _sync(scratch)
    target = folder / f"{PREFIX}{number:09d}"
    if (target / STATE).exists() and _sha256(target / STATE) == manifest["sha256"]:
        os.replace(scratch / MANIFEST, target / MANIFEST)
        _sync(target)
        shutil.rmtree(scratch)
    else:
        _discard(target)
        os.replace(scratch, target)
    _sync(folder)
    others = [path for path in _finished(folder) if path != target]
    for old in others[: max(len(others) + 1 - max_to_keep, 0)]:
        _discard(old)
    return target


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint below `folder`, or None."""
    finished = _finished(Path(folder))
    return finished[-1] if finished else None


def load(path: str | Path, step: Step, state: TrainState) -> tuple[TrainState, dict]:
    """Fills a freshly initialised `state` from a checkpoint folder; returns it and the `loop` dict that was saved.

    Raises:   ValueError naming the file when it is missing, damaged, newer than this version, or of another model.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or no text
        raise ValueError(f"{path / MANIFEST}: {error!r}, expected a checkpoint's manifest.") from error
    if version > FORMAT:
        raise ValueError(f"{path}: got format {version}, expected at most {FORMAT}. Update recfx.")
    if manifest.pop("manifest_sha256", None) != _digest(manifest):
        raise ValueError(f"{path / MANIFEST}: checksum differs. The file is damaged; use an older one.")
    if not (path / STATE).exists():
        raise ValueError(f"{path / STATE}: missing, expected the file that {MANIFEST} names.")
    if _sha256(path / STATE) != manifest["sha256"]:
        raise ValueError(f"{path / STATE}: checksum differs from {MANIFEST}. The file is damaged; use an older one.")
    if manifest["tables"] != _table_names(step.plan):
        raise ValueError(f"{path}: got tables {manifest['tables']}, expected {_table_names(step.plan)}.")
    with safe_open(path / STATE, "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no dict
    tables = tuple(_load_table_(t, i, saved) for i, t in enumerate(state.tables))
    for name, target in _dense_tensors(state.params, state.dense).items():
        if name not in saved or saved[name].shape != target.shape:
            raise ValueError(f"{path / STATE}: no tensor '{name}' of shape {list(target.shape)}. Another model's.")
        target.copy_(saved[name])
    return state._replace(tables=tables), manifest["loop"]


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = _dense_tensors(state.params, state.dense)
    for i, t in enumerate(state.tables):
        num_rows = int(t.num_rows)
        tensors |= {
            f"table.{i}.ids": t.ids[:num_rows],
            f"table.{i}.vocabularies": t.vocabularies[:num_rows],
            f"table.{i}.last_seen": t.seen[:num_rows] >> 32,
            f"table.{i}.born": t.born[:num_rows],
            f"table.{i}.counts": t.counts[:num_rows],
            f"table.{i}.free_rows": t.free_rows[: int(t.num_free)],
            f"table.{i}.tally": t.tally,
            f"table.{i}.rows": t.rows[:num_rows],
            f"table.{i}.step": t.step,
            f"table.{i}.num_refused": t.num_refused,
        }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _dense_tensors(params: dict[str, Tensor], dense: AdamState) -> dict[str, Tensor]:
    named = {"params": params, "dense.m": dense.m, "dense.v": dense.v}
    tensors = {f"{part}.{name}": t for part, group in named.items() for name, t in group.items()}
    return tensors | {"dense.step": dense.step}


def _load_table_(table: TableState, i: int, saved: dict[str, Tensor]) -> TableState:
    ids, rows = saved[f"table.{i}.ids"], saved[f"table.{i}.rows"]
    num_rows = ids.numel()
    if num_rows > table.ids.numel() or rows.shape[1:] != table.rows.shape[1:]:
        raise ValueError(
            f"table {i}: got {list(rows.shape)} rows, expected at most {list(table.rows.shape)}. Raise max_rows or use "
            "the optimiser that it was saved with."
        )
    table.ids[:num_rows] = ids
    table.vocabularies[:num_rows] = saved[f"table.{i}.vocabularies"]
    table.seen[:num_rows] = saved[f"table.{i}.last_seen"] << 32
    table.rows[:num_rows] = rows
    table.num_rows.fill_(num_rows)
    free_rows = saved[f"table.{i}.free_rows"]
    table.free_rows[: free_rows.numel()] = free_rows
    table.num_free.fill_(free_rows.numel())
    table.born[:num_rows] = saved[f"table.{i}.born"]
    table.counts[:num_rows] = saved[f"table.{i}.counts"]
    table.tally.copy_(saved[f"table.{i}.tally"])
    table.step.copy_(saved[f"table.{i}.step"])
    table.num_refused.copy_(saved[f"table.{i}.num_refused"])
    return rebuild_(table)


def _table_names(plan: Plan) -> list[list[list[str]]]:
    """Logical tables and their widths by physical table and vocabulary: what the numbers in the file mean."""
    return [[[f"{c.name}:{c.dim}" for c in vocabulary] for vocabulary in t.vocabularies] for t in plan.tables]


def _finished(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / MANIFEST).exists())


def _discard(path: Path) -> None:
    """Hidden by one rename first: a folder half deleted must not pass for a checkpoint."""
    if path.exists():
        hidden = path.with_name(UNFINISHED + path.name)
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
