"""Rows or files set apart for validation, by a hash, so that nothing needs to be remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash

from recfx.data.files import File
from recfx.data.schema import as_list, decoded, is_list, is_text, item_type
from recfx.kernels.hashing import mix

__all__ = ["Split", "check_key"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """One of two parts of the data: what `part="train"` reads, `part="validation"` does not, and the other way round.

    Args:     fraction: of the files, or of the values of `key`, that are validation.
              key: a column of integers or strings. Rows of equal key, in any file, fall in one part; of a list the
                  first item counts, and a missing one is a value like others. None: whole files.
              seed: another one parts them differently.
    Raises:   ValueError when the fraction is not between 0 and 1.
    """

    part: Literal["train", "validation"]
    fraction: float
    key: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in ("train", "validation"):
            raise ValueError(f"part: got {self.part!r}, expected 'train' or 'validation'.")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction: got {self.fraction}, expected a number between 0 and 1, the validation share.")

    def files(self, files: Sequence[File]) -> list[File]:
        """Those of this part: all of them when rows are parted; at least one for either part.

        Raises:   ValueError when there is one file only.
        """
        if self.key is not None:
            return list(files)
        if len(files) < 2:
            raise ValueError(f"split: got {len(files)} file, expected at least 2 to part by file. Name a key column.")
        by_hash = sorted(
            files, key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode(), seed=self.seed), file.path)
        )
        num_validation = min(max(round(self.fraction * len(files)), 1), len(files) - 1)
        validation = {file.path for file in by_hash[:num_validation]}
        return [file for file in files if (file.path in validation) == (self.part == "validation")]

    def rows(self, keys: pa.Array) -> np.ndarray:
        """Which rows are of this part: bool [rows]."""
        bits = torch.from_numpy(_key_bits(keys)) + mix(torch.tensor(self.seed))
        share = mix(bits).numpy().view(np.uint64) / 2.0**64
        return (share < self.fraction) == (self.part == "validation")


def check_key(name: str, kind: pa.DataType) -> None:
    """Raises ValueError when the column is none of integers or strings, plain or in lists."""
    item = kind
    while is_list(item):
        item = item_type(item)
    if pa.types.is_dictionary(item):
        item = item.value_type
    if not (pa.types.is_integer(item) or is_text(item)):
        raise ValueError(f"split: got key '{name}' of {kind}, expected integers or strings. Equal keys must be equal.")


def _key_bits(keys: pa.Array) -> np.ndarray:
    """64 bits of each row's key."""
    bits = np.zeros(len(keys), dtype=np.int64)
    rows = np.arange(len(keys))
    while is_list(keys.type):
        keys = as_list(keys)
        offsets, lengths = keys.offsets.to_numpy(), keys.value_lengths().fill_null(0).to_numpy()
        rows, keys = rows[lengths > 0], keys.values.take(pa.array(offsets[:-1][lengths > 0]))
    keys = decoded(keys)
    rows, keys = rows[keys.is_valid().to_numpy(zero_copy_only=False)], keys.drop_null()
    if pa.types.is_integer(keys.type):
        bits[rows] = keys.to_numpy().astype(np.int64)
    else:
        bits[rows] = [xxhash.xxh3_64_intdigest(key) - 2**63 for key in keys.cast(pa.binary()).to_pylist()]
    return bits
