"""Splits rows or files into training and validation by a hash, so that no list of them is stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash

from recfx.data.exact_numbers import Wrong, spelled, to_int64
from recfx.data.files import File, quoted
from recfx.data.schema import as_list, decoded, is_list, is_text, item_type, without_views
from recfx.data.unit_rows import BadRows
from recfx.kernels.index.hashing import mix

__all__ = ["Split", "check_key"]

HEXADECIMAL = re.compile(rb"0[xX][0-9a-fA-F]{1,16}")
EXPONENT = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One of two parts of the data: every row is in either `part="train"` or `part="validation"`.

    Args:     fraction: of the files, or of the values of `key`, that are validation.
              key: a column of whole numbers or strings. Rows with equal keys, in any file, are in one part. A number
                  equals a string that spells it: 7, 7.0, "7", " 007", "7.0" and "7e0" are one key. A row with any
                  other number as its key is bad. The key of a list is its first item; missing keys are equal.
                  None: files are split.
              seed: another seed gives another split.
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
        """The files of this part: all files when rows are split; otherwise at least one in each part.

        Raises:   ValueError when there is only one file.
        """
        if self.key is not None:
            return list(files)
        if len(files) < 2:
            raise ValueError(f"split: got {len(files)} file, expected at least 2 to split by file. Name a key column.")
        by_hash = sorted(
            files, key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode(), seed=self.seed), file.path)
        )
        num_validation = min(max(round(self.fraction * len(files)), 1), len(files) - 1)
        validation = {file.path for file in by_hash[:num_validation]}
        return [file for file in files if (file.path in validation) == (self.part == "validation")]

    def rows(self, keys: pa.Array) -> np.ndarray:
        """Which rows are in this part: bool [rows].

        Raises:   BadRows where a key is a number, but not a whole number of 64 bits that its type holds exactly.
        """
        assert self.key is not None
        bits = torch.from_numpy(_key_bits(self.key, keys)) + mix(torch.tensor(self.seed))
        share = mix(bits).numpy().view(np.uint64) / 2.0**64
        return (share < self.fraction) == (self.part == "validation")


def check_key(path: str, name: str, kind: pa.DataType) -> None:
    """Raises ValueError when the column holds neither numbers nor strings, plain or in lists."""
    item = kind
    while is_list(item):
        item = item_type(item)
    if pa.types.is_dictionary(item):
        item = item.value_type
    is_number = pa.types.is_integer(item) or pa.types.is_floating(item) or pa.types.is_decimal(item)
    if not (is_number or is_text(item) or pa.types.is_null(item)):
        raise ValueError(
            f"split: got key '{name}' of {kind} in {quoted(path)}, expected whole numbers or strings. Other types "
            "have no exact keys."
        )


def _key_bits(name: str, keys: pa.Array) -> np.ndarray:
    """64 bits of each row's key. For a whole number, or a string that spells one: its value modulo 2**64."""
    bits = np.zeros(len(keys), dtype=np.int64)
    rows = np.arange(len(keys))
    keys = without_views(keys)
    while is_list(keys.type):
        keys = as_list(keys)
        offsets, lengths = keys.offsets.to_numpy(), keys.value_lengths().fill_null(0).to_numpy()
        rows, keys = rows[lengths > 0], keys.values.take(pa.array(offsets[:-1][lengths > 0]))
    keys = decoded(keys)
    rows, keys = rows[keys.is_valid().to_numpy(zero_copy_only=False)], keys.drop_null()
    if is_text(keys.type):
        bits[rows] = _bits_of_texts(keys.cast(pa.binary()))
    elif len(keys):
        numbers = to_int64(keys)
        if isinstance(numbers, Wrong):
            got, expected = numbers.got, f"{numbers.expected}, as a key that rows are split by"
            raise BadRows(name, rows[numbers.places], lambda _: got, expected)
        bits[rows] = numbers.to_numpy()
    return bits


def _bits_of_text(text: bytes) -> int:
    """For a text that is not a number in digits only: of the number that CSV would read, else of its bytes."""
    stripped = text.strip(b" \t")
    if HEXADECIMAL.fullmatch(stripped):
        return (int(stripped, 16) + 2**63) % 2**64 - 2**63
    if EXPONENT.fullmatch(stripped) and (number := float(stripped)).is_integer() and abs(number) < 2**53:
        return int(number)
    return xxhash.xxh3_64_intdigest(text) - 2**63


def _bits_of_texts(texts: pa.Array) -> np.ndarray:
    numbers = spelled(texts)
    bits = np.where(numbers.is_negative, ~numbers.sizes + np.uint64(1), numbers.sizes).view(np.int64)
    others = np.flatnonzero(~numbers.is_number)
    bits[others] = [_bits_of_text(text) for text in texts.take(pa.array(others)).to_pylist()]
    for row in np.flatnonzero(numbers.is_larger):
        size = int(numbers.digits[int(row)].as_py()) * (-1 if numbers.is_negative[row] else 1)
        bits[row] = (size + 2**63) % 2**64 - 2**63
    return bits
