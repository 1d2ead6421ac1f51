"""Describes a checkpoint for `recfx inspect`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recfx.checkpoint.files import MANIFEST, read_shard
from recfx.checkpoint.folders import latest
from recfx.checkpoint.matching import OpenCheckpoint, held
from recfx.commands.text import aligned

__all__ = ["checkpoint_at", "describe_checkpoint"]


def checkpoint_at(path: str) -> Path | None:
    """The checkpoint at a path: the path itself, or the newest in a run's folder. None: neither."""
    return Path(path) if Path(path, MANIFEST).is_file() else latest(path)


def describe_checkpoint(path: Path) -> str:
    """Step, tables, dense parameters, optimiser state and files of a checkpoint, of all ranks that saved it together.

    Cost:     reads 8 bytes of each row.
    Raises:   ValueError naming the file when one is missing or damaged.
    """
    sources, there = OpenCheckpoint.open_all(path), held(path)
    manifest, loop = sources[0].manifest, sources[0].manifest["loop"]
    sizes = {path: path.stat().st_size for s in sources for path in (s.path / name for name in s.manifest["files"])}
    kept = sorted({n.removeprefix("dense.").split(".")[0] for n in sources[0].small if n.startswith("dense.")})
    ranks = f"{there.world_size} ranks, {there.streams} streams, " if there.world_size > 1 else ""
    facts = f"step {loop['step']}, seed {manifest['seed']}, {ranks}{len(sizes)} files, {sum(sizes.values()):,} bytes"
    head = [
        f"{path}: {facts}",
        f"optimisers keep {', '.join(manifest['slots']) or 'nothing'} of rows, {', '.join(kept)} of parameters",
    ]
    tables = [("table", "width", "rows", "in")]
    for t, vocabularies in enumerate(manifest["tables"]):
        files = [source.path / name for source in sources for part in source.manifest["parts"][t] for name in part]
        num_saves, num_bytes = len(manifest["parts"][t]), sum(sizes[file] for file in files)
        head.append(f"table-{t}: {len(files)} files of {num_saves} saves, {num_bytes:,} bytes")
        by_rank = [_num_rows(source, t) for source in sources]
        for columns, num_rows in zip(vocabularies, map(sum, zip(*by_rank, strict=True)), strict=True):
            tables += [(name, f"{width}", f"{num_rows:,}", f"table-{t}") for name, _, width in columns]
    dense = [("parameter", "shape"), *((name, f"{list(shape)}") for name, shape in there.dense.items())]
    return "\n\n".join(["\n".join(head), aligned(tables, num_left=1), aligned(dense, num_left=2)])


def _num_rows(source: OpenCheckpoint, t: int) -> list[int]:
    """Live rows of each vocabulary of a physical table."""
    vocabularies = np.full(int(source.small[f"table.{t}.num_rows"]), -1, np.int32)
    for name in (name for part in source.manifest["parts"][t] for name in part):
        with read_shard(source.path / name, source.manifest["files"][name]) as shard:
            row, there = shard.ahead("row", "vocabularies")
            vocabularies[row] = there
    vocabularies[source.small[f"table.{t}.free_rows"].numpy()] = -1
    return np.bincount(vocabularies[vocabularies >= 0], minlength=len(source.manifest["tables"][t])).tolist()
