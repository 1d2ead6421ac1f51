"""A RecIS checkpoint opened for reading: maps tensors to files, by the names of every version."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["Folder", "Part"]

LIST, INDEX, KEYS = "checkpoint", "index", "tensorkey.json"
PIECE = 2**15  # rows that are checked or written together, in the processor cache
ADAM = {"m": "exp_avg", "v": "exp_avg_sq"}  # AdamW's slots, and the ends of their names in RecIS
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BETAS = (0.9, 0.999)  # the default in RecIS and here
TINY = torch.finfo(torch.float32).tiny  # smaller powers of betas are not exact
PART = re.compile(r"/part_(\d+)_(\d+)$")  # <rank>_<ranks>, at the end of a block's name
TENSOR = re.compile(r"(.*)@([^@^]*)\^([^^]*)", re.DOTALL)  # <table>@<slot>^<slice>
SLICE = re.compile(r"(\d+)@(\d+)@(\d+)")  # <first>@<end>@<size>, of the hashes of the ids


class Part(NamedTuple):
    """The part of a table that one rank saved. Tensors are read when they are used."""

    block: str  # of the ids
    ids: Tensor  # i64 [n]
    values: dict[str, Tensor]  # weight and optimiser slots: [n, D]
    seen: Tensor | None  # i64 [n]: the last step of the step filter that looked the row up; None without a filter


class Folder:
    """One checkpoint. Raises: ValueError naming the file when one is missing, damaged, or lists something else."""

    def __init__(self, path: Path) -> None:
        self.path = _newest(path)
        self._open: dict[Path, Any] = {}
        index = _json(self.path / INDEX)
        try:
            names = {number: name for name, number in index["file_index"].items()}
            self._files = {block: self.path / Path(names[n]).name for block, n in index["block_index"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path / INDEX}: {error!r}, expected the files of blocks. Use another one."
            ) from error
        sliced = {block: m for block in self._files if (m := TENSOR.fullmatch(block)) and SLICE.fullmatch(m[3])}
        has_keys = (self.path / KEYS).exists() or not sliced
        keys = _json(self.path / KEYS) if has_keys else {}
        self._tables: dict[str, dict[str, dict[int, str]]] = {}  # block by table, slot and rank
        self._ranks = self._add_parts(keys)
        self._ranks |= self._add_slices({block: m for block, m in sliced.items() if block not in keys})

    def _add_parts(self, keys: Mapping[str, Any]) -> set[int]:
        """Adds blocks that are named by rank, as in 1.0 and later."""
        ranks, counts = set(), set()
        for block, original in keys.items():
            named, part = TENSOR.fullmatch(str(original)), PART.search(block)
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
        return ranks

    def _add_slices(self, blocks: Mapping[str, re.Match]) -> set[int]:
        """Adds blocks that have the names of their tensors, without a line in tensorkey.json. RecIS still loads this
        older form, where a rank's part is a slice of the hashes."""
        slices = {tuple(map(int, m[3].split("@"))) for m in blocks.values()}
        ranks = {part: rank for rank, part in enumerate(sorted(slices))}
        ends = [0, *(end for _, end, _ in ranks)]
        if slices and ([first for first, _, _ in ranks] != ends[:-1] or {ends[-1]} != {size for *_, size in slices}):
            raise ValueError(
                f"{self.path / INDEX}: got slices {sorted(slices)} of the ids' hashes, expected (first, end, size) one "
                "after the other, from 0 to the size. Rows would be lost; use another checkpoint."
            )
        for block, m in blocks.items():
            rank = ranks[tuple(map(int, m[3].split("@")))]
            self._tables.setdefault(m[1], {}).setdefault(m[2], {})[rank] = block
        return set(ranks.values())

    def optimizer(
        self, tables: Collection[str], kept: tuple[str, ...], betas: tuple[float, float] | None
    ) -> tuple[dict[str, str], int]:
        """The slot in RecIS for each slot of the model, and the steps taken."""
        if not kept:
            return {}, 0
        found = sorted({slot for table in tables for slot in self._slots(table)} - {"id", "embedding"})
        prefixes = [slot.removesuffix(ADAM["m"]) for slot in found if slot.endswith(f"_{ADAM['m']}")]
        if set(kept) != set(ADAM) or len(prefixes) != 1:
            raise ValueError(
                f"{self.path}: got an optimiser that keeps {found} for one that keeps {list(kept)}, expected AdamW's "
                "first and second moments on both sides. To start with moments of 0 give moments=False."
            )
        return {name: prefixes[0] + end for name, end in ADAM.items()}, self._num_steps(prefixes[0], betas)

    def _num_steps(self, prefix: str, betas: tuple[float, float] | None) -> int:
        """The steps taken: from the counter, or, when it is 0 as in 1.0, from the saved powers of betas."""
        name = f"{prefix}step^ "
        counter = self.tensor(name)
        if counter.numel() != 1 or counter.is_floating_point() or int(counter) < 0:
            raise ValueError(f"{self.path}: tensor '{name}': got {counter}, expected a number of steps.")
        if int(counter) and betas is None:
            return int(counter)
        first, second = (self._power(f"{prefix}beta{i}^ ") for i in (1, 2))
        b1, b2 = betas or BETAS
        num_steps = math.log(max(second, TINY)) / math.log(b2)
        by_first = math.log(first) / math.log(b1) if b1 and first > 1e3 * TINY else num_steps
        if abs(by_first - num_steps) > 0.5:
            raise ValueError(
                f"{self.path}: got powers of betas that are {by_first:.4g} and {num_steps:.4g} steps of {(b1, b2)}, "
                "expected one number. Bias correction needs it. Give the betas of that run."
            )
        return max(round(num_steps), int(counter))

    def _power(self, name: str) -> float:
        power = self.tensor(name)
        if power.numel() != 1 or not power.is_floating_point() or not 0 <= float(power) <= 1:
            raise ValueError(f"{self.path}: tensor '{name}': got {power}, expected a power of a beta.")
        return float(power)

    def parts(self, table: str, dim: int, slots: Mapping[str, str]) -> list[Part]:
        """A table's rows by rank, checked."""
        found, parts, slots = self._slots(table), [], {"weight": "embedding", **slots}
        blocks, stepped = found.get("id", {}), self._filter_slot(table)
        for slot in (*slots.values(), *stepped):
            if not blocks or found.get(slot, {}).keys() != blocks.keys():
                got = f"'{slot}' of ranks {sorted(found.get(slot, {}))}, ids of {sorted(blocks)}"
                raise ValueError(f"{self.path / KEYS}: table '{table}': got {got}, expected both of the same.")
        if blocks.keys() != self._ranks:  # each rank saves a part of each table, even an empty one
            raise ValueError(
                f"{self.path / KEYS}: table '{table}': got parts of ranks {sorted(blocks)}, expected those of "
                f"{sorted(self._ranks)}. Rows would be lost; use another checkpoint."
            )
        for rank in sorted(blocks):
            ids = self.tensor(blocks[rank])
            if ids.dtype != torch.int64 or ids.dim() != 1:
                raise self._wrong(blocks[rank], f"{ids.dtype} {list(ids.shape)}, expected torch.int64 [n]")
            values = {name: self._floats(found[slot][rank], [len(ids), dim]) for name, slot in slots.items()}
            seen = [self._steps(found[slot][rank], len(ids)) for slot in stepped]
            parts.append(Part(blocks[rank], ids, values, seen[0] if seen else None))
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

    def _filter_slot(self, table: str) -> list[str]:
        """The slot of the table's step filter: the only one of i64, by default named 'step_filter'."""
        found = self._slots(table)
        others = (slot for slot in found if slot not in ("id", "embedding"))
        stepped = [slot for slot in others if self.tensor(next(iter(found[slot].values()))).dtype == torch.int64]
        if len(stepped) > 1:
            raise ValueError(
                f"{self.path / KEYS}: table '{table}': got slots {stepped} of steps, expected at most one."
            )
        return stepped

    def _steps(self, block: str, num_rows: int) -> Tensor:
        value = self.tensor(block)
        if value.dtype != torch.int64 or list(value.shape) != [num_rows, 1]:
            raise self._wrong(block, f"{value.dtype} {list(value.shape)}, expected torch.int64 {[num_rows, 1]}")
        if num_rows and int(value.min()) < 0:
            raise self._wrong(block, f"step {int(value.min())}, expected at least 0")
        return value[:, 0]

    def _floats(self, block: str, shape: list[int]) -> Tensor:
        value = self.tensor(block)
        if value.dtype not in FLOATS or list(value.shape) != shape:
            raise self._wrong(block, f"{value.dtype} {list(value.shape)}, expected f32, f16 or bf16 {shape}")
        if not all(bool(piece.isfinite().all()) for piece in value.split(PIECE)):
            raise self._wrong(block, "values that are not finite, expected numbers")
        return value

    def _check_distinct(self, parts: Iterable[Part]) -> None:
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
    """The checkpoint's folder; `path` may be the folder of the run."""
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
