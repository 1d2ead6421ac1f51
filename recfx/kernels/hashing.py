"""The index's hash and probe in plain torch: what table.h says, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hash_id", "make_slot", "mix", "probe"]

EMPTY = -1


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


MULTIPLIER = _signed(0xD6E8FEB86659FD93)
GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of the 64-bit integers that spreads every bit over all."""
    x = (x ^ _shift_right(x, 32)) * MULTIPLIER
    x = (x ^ _shift_right(x, 32)) * MULTIPLIER
    return x ^ _shift_right(x, 32)


def hash_id(id: Tensor, vocabulary: Tensor, salt: Tensor) -> Tensor:
    """Low bits say where probing starts, the top 16 are the slot's tag."""
    return mix((id + (vocabulary.long() + 1) * GOLDEN) ^ salt)


def make_slot(hash: Tensor, vocabulary: Tensor, row: Tensor) -> Tensor:
    """A slot is tag:16 | vocabulary:16 | row:32; all ones is empty."""
    return (_shift_right(hash, 48) << 48) | (vocabulary.long() << 32) | row.long()


def probe(slots: Tensor, ids: Tensor, num_slots: Tensor, salt: Tensor, vocabulary: Tensor, id: Tensor) -> Tensor:
    """Row of each (vocabulary, id), -1 when absent. One pass over all ids per probe length."""
    hash, mask = hash_id(id, vocabulary, salt), num_slots - 1
    row = torch.full_like(id, -1)
    open_, at = torch.arange(id.numel(), device=id.device), hash & mask
    while open_.numel():
        slot = slots[at]
        candidate = slot & 0xFFFFFFFF
        same_head = (slot >> 32) == (make_slot(hash[open_], vocabulary[open_], torch.zeros_like(slot)) >> 32)
        occupied = slot != EMPTY
        found = occupied & same_head & (ids[torch.where(occupied, candidate, 0)] == id[open_])
        row[open_[found]] = candidate[found]
        goes_on = occupied & ~found
        open_, at = open_[goes_on], (at[goes_on] + 1) & mask
    return row


def place(slots: Tensor, num_slots: Tensor, salt: Tensor, vocabulary: Tensor, id: Tensor, row: Tensor) -> None:
    """Writes distinct, absent keys into free slots; where two want the same slot the lower row gets it."""
    hash, mask = hash_id(id, vocabulary, salt), num_slots - 1
    word, at = make_slot(hash, vocabulary, row), hash & mask
    while word.numel():
        winner = torch.full_like(slots, 2**62).scatter_reduce(0, at, row, "amin")
        wins = (slots[at] == EMPTY) & (winner[at] == row)
        slots[at[wins]] = word[wins]
        word, row, at = word[~wins], row[~wins], (at[~wins] + 1) & mask
