"""How evenly the owner hash deals rows to ranks under a data set's skew. `python -m bench.dist_balance FILES`

For so many ranks and so many samples of each: distinct ids, the busiest owner, the largest bucket, and the bytes that a
rank sends in a step. FILES are read as the Criteo files of `recfx.examples.deepfm`.
"""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np
import torch

from recfx.data import reader
from recfx.dist.exchange import HEADROOM, UNIT
from recfx.examples.deepfm import CATEGORICAL, COLUMNS
from recfx.kernels.index.owner import owner
from recfx.types import NUM_SAMPLES

__all__ = ["balance", "keys_of"]

ID_BYTES = 12  # an id and its tag


def keys_of(paths: str, num_batches: int, batch_size: int) -> list[np.ndarray]:
    """For each batch its ids, i64 [ids, 2]: vocabulary and id. Batches are taken again where they run out."""
    batches, found = itertools.cycle(reader(paths, COLUMNS, batch_size, drop_remainder=True)), []
    for batch in itertools.islice(batches, num_batches):
        num = int(batch[NUM_SAMPLES])
        parts = [batch[name].values[: batch[name].offsets[num]].numpy() for name in CATEGORICAL]
        found.append(np.concatenate([np.stack([np.full_like(p, v), p], 1) for v, p in enumerate(parts)]))
    return found


def balance(of_ranks: list[np.ndarray], width: int) -> dict[str, float]:
    """One step of as many ranks as there are lists of keys. Ratios are of the largest to the mean."""
    num, distinct = len(of_ranks), [np.unique(keys, axis=0) for keys in of_ranks]
    buckets = np.stack([np.bincount(_owners(keys, num), minlength=num) for keys in distinct])  # [source, owner]
    rows = np.bincount(_owners(np.unique(np.concatenate(distinct), axis=0), num), minlength=num)
    capacity = -(-int(np.ceil(HEADROOM * buckets.max())) // UNIT) * UNIT
    bytes_of_id = ID_BYTES + 4 * (width + 1) + 4 * width
    return {
        "ranks": num,
        "ids of a rank": round(float(np.mean([len(keys) for keys in of_ranks]))),
        "distinct": round(float(np.mean([len(keys) for keys in distinct]))),
        "asked of an owner": round(float(buckets.sum(0).max() / buckets.sum(0).mean()), 3),
        "rows of an owner": round(float(rows.max() / rows.mean()), 3),
        "largest bucket": round(float(buckets.max() / buckets.mean()), 2),
        "capacity": capacity,
        "MB sent": round(capacity * num * bytes_of_id / 1e6, 2),
        "least MB": round(float(buckets.mean()) * num * bytes_of_id / 1e6, 2),
        "messages": 3 * (num - 1),
    }


def _owners(keys: np.ndarray, num: int) -> np.ndarray:
    ids, vocabularies = (torch.from_numpy(np.ascontiguousarray(keys[:, k])) for k in (1, 0))
    return owner(ids, vocabularies.int(), num).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths")
    parser.add_argument("--samples", type=int, default=1000, help="of each rank")
    parser.add_argument("--width", type=int, default=9, help="weights of a row")
    args = parser.parse_args()
    for num in (2, 8, 64, 512):
        print(json.dumps(balance(keys_of(args.paths, num, args.samples), args.width)))


if __name__ == "__main__":
    main()
