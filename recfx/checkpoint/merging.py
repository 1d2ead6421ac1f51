"""Reads whole checkpoints into memory: makes partial ones full, and compares two."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np

from recfx.checkpoint.contents import GENERATOR, Contents, SavedRows, write
from recfx.checkpoint.files import read_shard
from recfx.checkpoint.folders import STATE, FolderLock, Part, clear_unfinished, finished, name_of, parts_of, read_ranks
from recfx.checkpoint.matching import OpenCheckpoint, held
from recfx.checkpoint.ranks import RanksFolder, commit, make_rank_folder, scratch_name, write_rank
from recfx.table import CANDIDATE_FIELDS

__all__ = ["compact", "diff", "merged", "merged_by_rank"]


def merged(path: str | Path) -> Contents:
    """The contents of a folder of one process or rank as if it had been saved in full.

    Raises:   ValueError as `load` does, and of a folder of several ranks.
    """
    return _merged(OpenCheckpoint.open(Part(Path(path), None)))


def merged_by_rank(path: str | Path) -> list[Contents]:
    """`merged` of each rank that saved a checkpoint; of one process, one."""
    return [_merged(source) for source in OpenCheckpoint.open_all(path)]


def _merged(source: OpenCheckpoint) -> Contents:
    tables = tuple(_merged_rows(source, t) for t in range(len(source.manifest["tables"])))
    manifest = {name: value for name, value in source.manifest.items() if name not in ("files", "parts")}
    return Contents(manifest["loop"]["step"], (source.path / STATE).read_bytes(), tables, manifest)


def _merged_rows(source: OpenCheckpoint, t: int) -> SavedRows:
    num_rows = int(source.small[f"table.{t}.num_rows"])
    columns: dict[str, np.ndarray] = {}
    there = np.zeros(num_rows, bool)
    for name in itertools.chain(*source.manifest["parts"][t]):
        with read_shard(source.path / name, source.manifest["files"][name]) as shard:
            (row,) = shard.ahead("row")
            there[row] = True
            for field, first, values in shard.pieces():
                if field == "last_seen":
                    field, values = "seen", values.astype(np.int64) << 32
                column = columns.setdefault(field, np.zeros((num_rows, *values.shape[1:]), values.dtype))
                column[row[first : first + len(values)]] = values
    columns.pop("row", None)
    there[source.small[f"table.{t}.free_rows"].numpy()] = False
    return SavedRows(columns, np.flatnonzero(there).astype(np.int32))


def compact(path: str | Path) -> Path:
    """Replaces a partial checkpoint by a full one, with the bytes of a full save. Those of several ranks stay theirs.

    Cost:     holds all rows in memory, of one rank after another.
    Raises:   ValueError when it is damaged or its folder renamed; BlockingIOError when a process saves there.
    """
    path = Path(path).resolve()
    ranks, parts = read_ranks(path), parts_of(path)
    first = parts[0].manifest()
    name = name_of(first["loop"]["step"])
    if path.name != name:
        raise ValueError(
            f"{path}: got a renamed checkpoint, expected {name}. Another one may be there. Rename it back."
        )
    whole = None if ranks is not None else _merged(OpenCheckpoint.open(parts[0]))
    lock = FolderLock(path.parent)
    try:
        clear_unfinished(path.parent)
        if whole is None:
            return _compact_ranks(path, parts)
        return write(path.parent, whole, base=None, max_to_keep=len(finished(path.parent)))
    finally:
        lock.release()


def _compact_ranks(path: Path, parts: list[Part]) -> Path:
    scratch, keep, streams = path.parent / scratch_name(path), len(finished(path.parent)), held(path).streams
    places = [RanksFolder(path.parent, scratch, rank, len(parts), streams, keep) for rank in range(len(parts))]
    scratch.mkdir()
    digests = []
    try:
        for at, part in zip(places, parts, strict=True):
            make_rank_folder(at)
            contents = _merged(OpenCheckpoint.open(part))
            digests.append(write_rank(at, contents, None, lambda: None))
        return commit(places[0], contents, digests)
    except Exception:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def diff(a: str | Path, b: str | Path) -> list[str]:
    """The differences between two checkpoints, one per line; empty when their contents are equal.

    Rows are matched by id, so a row with another number is not a difference. Neither is whether a checkpoint was saved
    in full or in part, nor by how many ranks: what each rank counted is then added up.
    """
    sources, contents = (OpenCheckpoint.open_all(a), OpenCheckpoint.open_all(b)), (merged_by_rank(a), merged_by_rank(b))
    lines = []
    for name in ("seed", "loop"):
        one, other = (of_ranks[0].manifest[name] for of_ranks in sources)
        if one != other:
            lines.append(f"{name}: {one} | {other}")
    by_rank = any(len(of_ranks) > 1 for of_ranks in sources)
    one, other = (_summed(of_ranks) if by_rank else _small(of_ranks[0]) for of_ranks in sources)
    for name in sorted(one.keys() | other.keys()):  # safetensors gives them in another order every time
        lines += _diff_tensors(name, one.get(name), other.get(name))
    tables = [_of_ranks(list(map(_vocabularies, of_ranks))) for of_ranks in contents]
    for names in dict.fromkeys((*tables[0], *tables[1])):
        label = " + ".join(name for name, _, _ in names)
        if names not in tables[0] or names not in tables[1]:
            lines.append(f"{label}: only in {'A' if names in tables[0] else 'B'}")
        else:
            lines += _diff_rows(label, names, tables[0][names], tables[1][names], by_rank=by_rank)
    return lines


def _small(source: OpenCheckpoint) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in source.small.items()}


def _summed(sources: list[OpenCheckpoint]) -> dict[str, np.ndarray]:
    """Everything but rows, of all ranks: dense tensors of the first, counts added, ids without a row by id.

    Where rows are, and the states of torch's generators, are of each rank and left out.
    """
    small = [_small(source) for source in sources]
    found = {name: t for name, t in small[0].items() if not name.startswith(("table.", GENERATOR))}
    for t in range(len(sources[0].manifest["tables"])):
        name = f"table.{t}."
        found[f"{name}num_live"] = np.sum([s[f"{name}num_rows"] - len(s[f"{name}free_rows"]) for s in small])
        found[f"{name}step"] = np.max([s[f"{name}step"] for s in small])
        for counter in ("num_refused", "tally"):
            found[f"{name}{counter}"] = np.sum([s[f"{name}{counter}"] for s in small], axis=0)
        if f"{name}candidates.ids" in small[0]:
            columns = [np.concatenate([s[f"{name}candidates.{c}"] for s in small]) for c in CANDIDATE_FIELDS]
            order = np.lexsort(columns[:2])
            found |= {f"{name}candidates.{c}": x[order] for c, x in zip(CANDIDATE_FIELDS, columns, strict=True)}
    return found


Names = tuple[tuple[str, int, int], ...]  # of a vocabulary: logical table, first column, width


def _vocabularies(contents: Contents) -> dict[Names, dict[str, np.ndarray]]:
    """The rows of each vocabulary, by id."""
    found = {}
    for table, vocabularies in zip(contents.tables, contents.manifest["tables"], strict=True):
        columns, live = table.columns, table.numbers()
        for v, names in enumerate(vocabularies):
            row = live[columns["vocabularies"][live] == v] if columns else live
            rows = {name: column[row] for name, column in columns.items()} | {"row": row}
            if columns:
                rows["last_seen"] = rows.pop("seen") >> 32
            order = np.argsort(rows.get("ids", row))
            found[tuple(map(tuple, names))] = {name: column[order] for name, column in rows.items()}
    return found


def _of_ranks(ranks: list[dict[Names, dict[str, np.ndarray]]]) -> dict[Names, dict[str, np.ndarray]]:
    """The rows of each vocabulary, of all ranks that have some."""
    found = {}
    for names in dict.fromkeys(itertools.chain(*ranks)):
        rows = [rank[names] for rank in ranks if names in rank]
        rows = [r for r in rows if len(r["row"])] or rows[:1]
        found[names] = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    return found


def _diff_rows(
    label: str, names: Names, a: dict[str, np.ndarray], b: dict[str, np.ndarray], *, by_rank: bool
) -> list[str]:
    if "ids" not in a or "ids" not in b:
        return [f"{label}: got {len(a['row'])} rows | {len(b['row'])}"] if len(a["row"]) != len(b["row"]) else []
    _, in_a, in_b = np.intersect1d(a["ids"], b["ids"], assume_unique=True, return_indices=True)
    lines = [
        f"{label}: {len(x['ids']) - len(in_a)} rows only in {side}, first id {np.setdiff1d(x['ids'], y['ids'])[0]}"
        for side, x, y in (("A", a, b), ("B", b, a))
        if len(x["ids"]) > len(in_a)
    ]
    for field in sorted((a.keys() | b.keys()) - {"ids", "vocabularies", "rows", *(["row"] if by_rank else [])}):
        lines += _diff_tensors(
            f"{label}: {field}", *(x[field][at] if field in x else None for x, at in ((a, in_a), (b, in_b)))
        )
    one, other = a["rows"][in_a], b["rows"][in_b]
    if one.shape != other.shape:
        return [*lines, f"{label}: got rows of shape {list(one.shape[1:])} | {list(other.shape[1:])}"]
    for name, first, dim in names:
        for slot in range(one.shape[1]):
            columns = np.s_[:, slot, first : first + dim]
            lines += _diff_tensors(
                f"{name}: {f'optimiser slot {slot}' if slot else 'weight'}", one[columns], other[columns]
            )
    return lines


def _diff_tensors(name: str, a: np.ndarray | None, b: np.ndarray | None) -> list[str]:
    if a is None or b is None:
        return [f"{name}: only in {'A' if b is None else 'B'}"]
    if a.shape != b.shape or a.dtype != b.dtype:
        return [f"{name}: {a.dtype} {list(a.shape)} | {b.dtype} {list(b.shape)}"]
    if a.tobytes() == b.tobytes():
        return []
    if not a.ndim:
        return [f"{name}: {a} | {b}"]
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    different = difference != 0  # NaN is a difference
    num_rows = int(different.reshape(len(a), -1).any(1).sum())
    return (
        [f"{name}: {num_rows} of {len(a)} differ, by at most {difference.max():.6g}"]
        if num_rows
        else [f"{name}: only in signs of zero or kinds of NaN"]
    )
