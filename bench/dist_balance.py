"""How evenly the owner hash deals rows to ranks under a data set's skew.

    python -m bench.dist_balance FILES            ORC files as those of `recfx.examples.deepfm`
    python -m bench.dist_balance --zipf 1.05      a log whose ids follow a power law with this exponent

For so many ranks and so many samples of each: distinct ids, the busiest owner, the largest bucket, the hottest id, and
the bytes that a rank sends in a step.
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

__all__ = ["balance", "bytes_of_id", "distinct", "keys_of", "rows_of_owners", "zipf_keys"]

ID_BYTES = 12  # an id and its tag
RANKS, WIDTHS = (2, 8, 64, 512), (9, 17, 65)
ZIPF_COLUMNS, ZIPF_IDS = 26, 10**6  # columns of one id a sample, and the ids of each


def keys_of(paths: str, num_batches: int | None, batch_size: int) -> list[np.ndarray]:
    """For each batch its ids, i64 [ids, 2]: vocabulary and id. Batches are taken again where they run out.

    Args:     num_batches: None: each batch once.
    """
    batches, found = reader(paths, COLUMNS, batch_size, drop_remainder=True), []
    for batch in batches if num_batches is None else itertools.islice(itertools.cycle(batches), num_batches):
        num = int(batch[NUM_SAMPLES])
        parts = [batch[name].values[: batch[name].offsets[num]].numpy() for name in CATEGORICAL]
        found.append(np.concatenate([np.stack([np.full_like(p, v), p], 1) for v, p in enumerate(parts)]))
    return found


def zipf_keys(exponent: float, num_batches: int, batch_size: int, *, ids: int = ZIPF_IDS) -> list[np.ndarray]:
    """Batches whose ids 0, 1, 2, ... of each column have shares in the ratio of 1, 2**-exponent, 3**-exponent, ..."""
    shares = np.cumsum(np.arange(1, ids + 1, dtype=np.float64) ** -exponent)
    rng, vocabularies = np.random.default_rng(1), np.repeat(np.arange(ZIPF_COLUMNS), batch_size)
    return [
        np.stack([vocabularies, np.searchsorted(shares, rng.random(len(vocabularies)) * shares[-1], "right")], 1)
        for _ in range(num_batches)
    ]


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, i64 [distinct, 2], and how often it occurs, i64 [distinct]."""
    keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(1)])
    return keys[first], np.diff(np.r_[first, len(keys)])


def bytes_of_id(width: int) -> int:
    """Bytes for each distinct id of a rank: to ask, its weights and status in the answer, its gradient."""
    return ID_BYTES + 4 * (width + 1) + 4 * width


def balance(of_ranks: list[np.ndarray]) -> dict[str, float]:
    """One step of as many ranks as there are lists of keys. Ratios are of the largest to the mean."""
    num, own = len(of_ranks), [distinct(keys)[0] for keys in of_ranks]
    buckets = np.stack([np.bincount(_owners(keys, num), minlength=num) for keys in own])  # [source, owner]
    capacity = -(-int(np.ceil(HEADROOM * buckets.max())) // UNIT) * UNIT
    counts = distinct(np.concatenate(of_ranks))[1]
    found = {
        "ranks": num,
        "ids of a rank": round(float(np.mean([len(keys) for keys in of_ranks]))),
        "distinct": round(float(np.mean([len(keys) for keys in own]))),
        "hottest id, times": int(counts.max()),
        "asked of an owner": round(float(buckets.sum(0).max() / buckets.sum(0).mean()), 3),
        "rows of an owner": rows_of_owners(np.concatenate(own), num),
        "largest bucket": round(float(buckets.max() / buckets.mean()), 2),
        "capacity": capacity,
        "messages": 3 * (num - 1),
    }
    for width in WIDTHS:
        found[f"MB sent, {width}"] = round(capacity * num * bytes_of_id(width) / 1e6, 2)
        found[f"least MB, {width}"] = round(float(buckets.mean()) * num * bytes_of_id(width) / 1e6, 2)
    return found


def rows_of_owners(keys: np.ndarray, num: int) -> float:
    """Rows of the owner that has most, over the mean, once all keys have been inserted."""
    rows = np.bincount(_owners(distinct(keys)[0], num), minlength=num)
    return round(float(rows.max() / rows.mean()), 3)


def _owners(keys: np.ndarray, num: int) -> np.ndarray:
    ids, vocabularies = (torch.from_numpy(np.ascontiguousarray(keys[:, k])) for k in (1, 0))
    return owner(ids, vocabularies.int(), num).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("paths", nargs="?")
    source.add_argument("--zipf", type=float, help="exponent of the ids' power law")
    parser.add_argument("--samples", type=int, default=1000, help="of each rank")
    args = parser.parse_args()
    epoch = None if args.paths is None else np.concatenate(keys_of(args.paths, None, args.samples))
    for num in RANKS:
        batches = zipf_keys(args.zipf, num, args.samples) if epoch is None else keys_of(args.paths, num, args.samples)
        more = {} if epoch is None else {"rows of an owner after an epoch": rows_of_owners(epoch, num)}
        print(json.dumps(balance(batches) | more))


if __name__ == "__main__":
    main()
