"""Checkpoints of RecIS: tables, optimiser state and dense parameters, read into a state of this library.

<folder>/index                        JSON: the file of each block, and the files' names
<folder>/tensorkey.json               JSON: '<table>.<slot>/part_<rank>_<ranks>' -> '<table>@<slot>^<slice>'
<folder>/model-*.safetensors          those blocks, and the sparse optimiser's counters as '<name>^ '
<folder>/model.pt, extra.pt           the dense part's state_dict, and that of its optimiser
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recfx.checkpoint.matching import check_arguments, check_names
from recfx.checkpoint.recis_dense import dense_pairs
from recfx.kernels.owner import owner
from recfx.rows.place import place_of
from recfx.rows.surgery import write_
from recfx.step import Step, TrainState
from recfx.table import ROW_FIELDS, TableState, restore_
from recfx.types import Params

__all__ = ["load_recis"]

LIST, INDEX, KEYS = "checkpoint", "index", "tensorkey.json"
PIECE = 2**15  # rows checked or written at once, in the cache
ADAM = {"m": "exp_avg", "v": "exp_avg_sq"}  # what AdamW keeps, and the ends of its slots' names there
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def load_recis(
    path: str | Path,
    step: Step,
    state: TrainState,
    *,
    tables: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
    dense: Callable[[Params], Params] | None = None,
    moments: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> TrainState:
    """Fills a freshly initialised `state` from a checkpoint of RecIS, whose training then goes on here.

    Rows come in the order of the model's tables, of the checkpoint's ranks, of each rank's rows. Where two tables share
    their rows here, as embedding and bias of one feature do, an id that one of them lacks has its initial value there.
    Rows count as touched by the last step. README.md, "Coming from RecIS", loads the seed's DeepFM.

    What was saved must fit what is built: `sparse_adamw_recis` for SparseAdamW, `sparse_adamw_tf` for its TF variant.
    Where RecIS coalesced tables it kept the low 52 bits of an id: look ids of such a table up as `ops.mod(x, 2**52)`.

    Args:     path: a checkpoint's folder, or the output folder of a run, for the newest one that it lists.
              tables: logical tables of the model to take, by name ('<group>/<feature>', or the shared name); default
              all, () none.
              names: name there of a table that has another one in the model.
              dense: parameters here from the state_dict there. It is used on the moments too, so it may only select,
              transpose, cut or join: torch.nn.Linear keeps [out, in] where `recfx.layers.linear` has [in, out]. What it
              leaves out keeps its initial value. Default: no dense part is taken.
              moments: take what AdamW keeps, and its step counts, by which bias correction and schedules go on. False:
              they begin at 0. The dense part's have numbers there instead of names: what AdamW(model.parameters())
              saves, one group, alike in number, order and shape to model.pt. Of another optimiser take the dense part
              without them in a call before: tables=(), moments=False.
              rank, world_size: take the rows that `recfx.kernels.owner.owner` gives to this rank.
    Cost:     reads every byte twice, first to check it; files are mapped, one table's ids are sorted in memory.
    Differs:  from `load`: the layout has no checksums, so a flipped bit shows where it makes no sense, if anywhere.
              Reader positions, metrics and step filters are not taken.
    Raises:   ValueError naming file and tensor when one is missing, damaged, of another shape or type, or not finite;
              when an id is there twice, a rank's part of a table is missing, or the optimiser keeps something else;
              when `state` has rows already, or too little room. `state` is then as it was.
    """
    check_arguments([Path(path)], state, rank, world_size)
    columns = {c.name: c for t in step.plan.tables for v in t.vocabularies for c in v}
    check_names("tables", tables, columns)
    check_names("names", (names or {}).keys(), columns)
    folder = _Folder(Path(path))
    taken = [name for name in columns if tables is None or name in tables]
    name_there = {name: (names or {}).get(name, name) for name in taken}
    slots, num_steps = folder.optimizer(name_there.values(), step.slots) if moments and taken else ({}, 0)
    parts = {name: folder.parts(there, columns[name].dim, slots) for name, there in name_there.items()}
    pairs = [] if dense is None else dense_pairs(folder.path, state, dense, moments=moments)
    try:
        for name in taken:
            place_of(step, state, name).table.step.fill_(num_steps)
        for name in taken:
            for part in parts[name]:
                _write_part_(step, state, name, part, rank, world_size)
    except BaseException:
        for t in state.tables:
            _empty_(t)
        raise
    for target, saved in pairs:
        target.copy_(saved)
    return state


class _Part(NamedTuple):
    """What one rank saved of a table. Nothing is read before it is used."""

    block: str  # of the ids
    ids: Tensor  # i64 [n]
    values: dict[str, Tensor]  # weight, and what the optimiser keeps: [n, D]


class _Folder:
    """A checkpoint opened for reading: which tensors are in which files."""

    def __init__(self, path: Path) -> None:
        self.path = _newest(path)
        self._open: dict[Path, Any] = {}
        index, keys = _json(self.path / INDEX), _json(self.path / KEYS)
        try:
            names = {number: name for name, number in index["file_index"].items()}
            self._files = {block: self.path / Path(names[n]).name for block, n in index["block_index"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path / INDEX}: {error!r}, expected the files of blocks. Use another one."
            ) from error
        self._tables: dict[str, dict[str, dict[int, str]]] = {}  # block by table, slot and rank
        ranks, counts = set(), set()
        for block, original in keys.items():
            named = re.fullmatch(r"(.*)@([^@^]*)\^[^^]*", str(original), re.DOTALL)
            part = re.search(r"/part_(\d+)_(\d+)$", block)
            if named is None or part is None:
                raise ValueError(
                    f"{self.path / KEYS}: got '{block}': {original!r}, expected '<table>.<slot>/part_<rank>_<ranks>': "
                    "'<table>@<slot>^<slice>'."
                )
            ranks.add(int(part[1]))
            counts.add(int(part[2]))
            self._tables.setdefault(named[1], {}).setdefault(named[2], {})[int(part[1])] = block
        if keys and not (len(counts) == 1 and len(ranks) == max(ranks) + 1 == max(counts)):
            raise ValueError(
                f"{self.path / KEYS}: got parts of ranks {sorted(ranks)} of {sorted(counts)}, expected all of one "
                "number of ranks. Rows would be lost; use another checkpoint."
            )
        self._ranks = ranks

    def optimizer(self, tables: Collection[str], kept: tuple[str, ...]) -> tuple[dict[str, str], int]:
        """Slot there of each of the model's, and the steps taken."""
        if not kept:
            return {}, 0
        found = sorted({slot for table in tables for slot in self._slots(table)} - {"id", "embedding"})
        prefixes = [slot.removesuffix(ADAM["m"]) for slot in found if slot.endswith(f"_{ADAM['m']}")]
        if set(kept) != set(ADAM) or len(prefixes) != 1:
            raise ValueError(
                f"{self.path}: got an optimiser that keeps {found} for one that keeps {list(kept)}, expected AdamW's "
                "first and second moments on both sides. To begin with fresh ones give moments=False."
            )
        taken = self.tensor(f"{prefixes[0]}step^ ")
        if taken.numel() != 1 or taken.is_floating_point() or int(taken) < 0:
            raise ValueError(f"{self.path}: tensor '{prefixes[0]}step^ ': got {taken}, expected a number of steps.")
        return {name: prefixes[0] + end for name, end in ADAM.items()}, int(taken)

    def parts(self, table: str, dim: int, slots: Mapping[str, str]) -> list[_Part]:
        """A table's rows by rank, checked."""
        found, parts, slots = self._slots(table), [], {"weight": "embedding", **slots}
        blocks = found.get("id", {})
        for slot in slots.values():
            if not blocks or found.get(slot, {}).keys() != blocks.keys():
                got = f"'{slot}' of ranks {sorted(found.get(slot, {}))}, ids of {sorted(blocks)}"
                raise ValueError(f"{self.path / KEYS}: table '{table}': got {got}, expected both of the same.")
        if blocks.keys() != self._ranks:  # each saves a part of each table, an empty one too
            raise ValueError(
                f"{self.path / KEYS}: table '{table}': got parts of ranks {sorted(blocks)}, expected those of "
                f"{sorted(self._ranks)}. Rows would be lost; use another checkpoint."
            )
        for rank in sorted(blocks):
            ids = self.tensor(blocks[rank])
            if ids.dtype != torch.int64 or ids.dim() != 1:
                raise self._wrong(blocks[rank], f"{ids.dtype} {list(ids.shape)}, expected torch.int64 [n]")
            values = {name: self._floats(found[slot][rank], [len(ids), dim]) for name, slot in slots.items()}
            parts.append(_Part(blocks[rank], ids, values))
        self._check_distinct(parts)
        return parts

    def _slots(self, table: str) -> dict[str, dict[int, str]]:
        if table not in self._tables:
            known = ", ".join(sorted(self._tables))
            raise ValueError(
                f"{self.path / KEYS}: no table '{table}', only {known}. Give its name there in `names`, or what to "
                "take in `tables`."
            )
        return self._tables[table]

    def _floats(self, block: str, shape: list[int]) -> Tensor:
        value = self.tensor(block)
        if value.dtype not in FLOATS or list(value.shape) != shape:
            raise self._wrong(block, f"{value.dtype} {list(value.shape)}, expected f32, f16 or bf16 {shape}")
        if not all(bool(piece.isfinite().all()) for piece in value.split(PIECE)):
            raise self._wrong(block, "values that are not finite, expected numbers")
        return value

    def _check_distinct(self, parts: list[_Part]) -> None:
        ids = torch.cat([part.ids for part in parts]).sort().values
        again = ids[1:][ids[1:] == ids[:-1]]
        if len(again):
            first, *_, last = [p.block for p in parts for _ in range(int((p.ids == again[0]).sum()))]
            raise self._wrong(last, f"id {int(again[0])}, which '{first}' has too, expected each id once")

    def tensor(self, block: str) -> Tensor:
        """A view of the file."""
        path = self._files.get(block)
        if path is None:
            raise ValueError(f"{self.path / INDEX}: no block '{block}', expected its file. Use another checkpoint.")
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(block)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: tensor '{block}': {error}. The file is missing or damaged; use another checkpoint."
            ) from error

    def _wrong(self, block: str, what: str) -> ValueError:
        return ValueError(f"{self._files[block]}: tensor '{block}': got {what}.")


def _newest(path: Path) -> Path:
    """The checkpoint's folder, where `path` may be that of the run."""
    if (path / INDEX).exists() or not (path / LIST).exists():
        return path
    listed = (path / LIST).read_text(errors="replace").split()
    if not listed:
        raise ValueError(f"{path / LIST}: got no line, expected names of checkpoints, the newest last.")
    return path / listed[-1]


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__}")
    except (OSError, ValueError, TypeError) as error:
        why = "It was not finished; use" if any(path.parent.glob("ckpt-*.index")) else "Use"
        raise ValueError(
            f"{path}: {error!r}, expected JSON of a RecIS checkpoint. {why} another checkpoint."
        ) from error
    return content


def _write_part_(step: Step, state: TrainState, table: str, part: _Part, rank: int, world_size: int) -> None:
    place = place_of(step, state, table)
    pieces = zip(part.ids.split(PIECE), *(value.split(PIECE) for value in part.values.values()), strict=True)
    for ids, *values in pieces:
        mine = owner(ids, torch.full_like(ids, place.vocabulary, dtype=torch.int32), world_size) == rank
        ids, *values = (column[mine].to(place.table.ids.device) for column in (ids, *values))
        weight, *slots = (value.float() for value in values)
        write_(step, state, table, ids, weight, dict(zip(list(part.values)[1:], slots, strict=True)))


def _empty_(table: TableState) -> None:
    """As it was when it had no rows, but for the size of its index."""
    for field in ROW_FIELDS:
        getattr(table, field)[: int(table.num_rows)] = 0
    restore_(table, 0, torch.zeros(0, dtype=torch.int32))
    for counter in (table.step, table.tally, table.num_unique):
        counter.zero_()
