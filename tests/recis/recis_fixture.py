"""Writes checkpoints as RecIS lays them out: by plain struct and json, from dicts of ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


HASHES = 65536  # of ids, dealt to the ranks in slices


class Saved(NamedTuple):
    """One table there: a row of each slot by id, ids in the order in which they were inserted."""

    dim: int
    rows: dict[int, dict[str, list[float]]]  # id -> slot -> [dim]
    dtype: torch.dtype = torch.float32
    seen: dict[int, int] | None = None  # id -> the step of the table's step filter that looked it up


def write_recis(
    folder: Path,
    tables: Mapping[str, Saved],
    *,
    num_steps: int | None = 7,
    optimizer: str = "sparse_adamw_tf",
    slots: tuple[str, ...] = ("embedding", "sparse_adamw_tf_exp_avg", "sparse_adamw_tf_exp_avg_sq"),
    num_ranks: int = 1,
    num_writers: int = 1,
    counts_steps: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    filter_slot: str = "step_filter",
    by_slice: bool = False,
    model: object = None,
    extra: object = None,
) -> Path:
    """`folder` as a checkpoint of that many ranks; blocks of a rank are dealt to its writers in turn.

    counts_steps: as from 1.1 on; 1.0 leaves its counter of steps at 0.
    by_slice: blocks have their tensors' names, which tensorkey.json maps them to otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    block_index: dict[str, int] = {}
    file_index: dict[str, int] = {}
    keys: dict[str, str] = {}
    for rank in range(num_ranks):
        blocks: dict[str, tuple[Tensor, bool]] = {}
        for table, saved in tables.items():
            ids = [i for i in saved.rows if rank_of(i, num_ranks) == rank]
            part = {"id": torch.tensor(ids, dtype=torch.int64)}
            for slot in slots:
                values = torch.tensor([saved.rows[i][slot] for i in ids], dtype=torch.float32)
                part[slot] = values.reshape(len(ids), saved.dim).to(saved.dtype)
            if saved.seen is not None:
                part[filter_slot] = torch.tensor([saved.seen[i] for i in ids], dtype=torch.int64).reshape(-1, 1)
            for slot, value in part.items():
                tensor = f"{table}@{slot}^{slice_of(rank, num_ranks)}"
                block = f"{table}@{slot}".replace("@", ".") + f"/part_{rank}_{num_ranks}"
                if not by_slice:
                    keys[block] = tensor
                blocks[tensor if by_slice else block] = value, False
        if num_steps is not None:
            blocks[f"{optimizer}_step^ "] = torch.tensor([num_steps * counts_steps]), True
            for name, beta in zip(("beta1", "beta2"), betas, strict=True):
                blocks[f"{optimizer}_{name}^ "] = torch.tensor(beta**num_steps), True
        for writer in range(num_writers):
            mine = dict(list(blocks.items())[writer::num_writers])
            if not mine:
                continue
            number = rank * num_writers + writer
            name = f"model-{number:06d}-of-{num_ranks * num_writers:06d}.safetensors"
            file_index[name] = number
            block_index |= dict.fromkeys(mine, number)
            write_blocks(folder / name, mine)
    (folder / "index").write_text(json.dumps({"block_index": block_index, "file_index": file_index}))
    (folder / "tensorkey.json").write_text(json.dumps(keys))
    (folder / "torch_rank_weights_embs_table_multi_shard.json").write_text("{}")
    if model is not None:
        torch.save(model, folder / "model.pt")
    if extra is not None:
        torch.save(extra, folder / "extra.pt")
    return folder


def rank_of(id: int, num_ranks: int) -> int:
    return (id * 2654435761 >> 7) % num_ranks


def slice_of(rank: int, num_ranks: int) -> str:
    """Of equal sizes but for the first, which are greater by one; numbers have zeros in front."""
    first, end = (rank * (HASHES // num_ranks) + min(rank, HASHES % num_ranks) for rank in (rank, rank + 1))
    return f"{first:05}@{end:05}@{HASHES}"


def write_blocks(path: Path, blocks: Mapping[str, tuple[Tensor, bool]]) -> None:
    """safetensors whose entries say whether they are dense, and whose header is not padded."""
    header, data = {}, b""
    for name, (value, dense) in blocks.items():
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
            "dense": dense,
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 8 == 0)  # so that tensors do not lie aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
