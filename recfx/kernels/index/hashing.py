"""The index's hash and probe in plain torch: the same as table.h, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hash_id", "make_slot", "mix", "probe", "shift_right", "signed"]

EMPTY = -1
RUN = 64  # slots looked at before probing goes on elsewhere


def signed(x: int) -> int:
    """The signed 64-bit number with the low bits of x."""
    return (x + 2**63) % 2**64 - 2**63


MULTIPLIER = signed(0xD6E8FEB86659FD93)
GOLDEN = signed(0x9E3779B97F4A7C15)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Of unsigned numbers: zeros come in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of the 64-bit integers that spreads every bit over all."""
    x = (x ^ shift_right(x, 32)) * MULTIPLIER
    x = (x ^ shift_right(x, 32)) * MULTIPLIER
    return x ^ shift_right(x, 32)


def hash_id(id: Tensor, vocabulary: Tensor, salt: Tensor) -> Tensor:
    """Low bits say where probing starts, the top 16 are the slot's tag."""
    return mix((id + (vocabulary.long() + 1) * GOLDEN) ^ salt)


def make_slot(hash: Tensor, vocabulary: Tensor, row: Tensor) -> Tensor:
    """A slot is tag:16 | vocabulary:16 | row:32; all ones is empty."""
    return (shift_right(hash, 48) << 48) | (vocabulary.long() << 32) | row.long()


def next_run(start: Tensor) -> Tensor:
    """Where a key whose slot is not among RUN slots in a row is looked for next: keys that all hash to one place cost
    each other one run, however many they are."""
    return mix(start + GOLDEN)


def probe(slots: Tensor, ids: Tensor, num_slots: Tensor, salt: Tensor, vocabulary: Tensor, id: Tensor) -> Tensor:
    """Row of each (vocabulary, id), -1 when absent. One pass over all ids per probe length."""
    hash, mask = hash_id(id, vocabulary, salt), num_slots - 1
    row = torch.full_like(id, -1)
    open_, start, k = torch.arange(id.numel(), device=id.device), hash, 0
    while open_.numel():
        slot = slots[(start + k) & mask]
        candidate = slot & 0xFFFFFFFF
        same_head = (slot >> 32) == (make_slot(hash[open_], vocabulary[open_], torch.zeros_like(slot)) >> 32)
        occupied = slot != EMPTY
        found = occupied & same_head & (ids[torch.where(occupied, candidate, 0)] == id[open_])
        row[open_[found]] = candidate[found]
        goes_on = occupied & ~found
        open_, start, k = open_[goes_on], *_step(start[goes_on], k)
    return row


def place(slots: Tensor, num_slots: Tensor, salt: Tensor, vocabulary: Tensor, id: Tensor, row: Tensor) -> int:
    """Writes distinct, absent keys into free slots; where two want the same slot the lower row gets it.

    Returns:  how many are crowded: their slot is not in their first run.
    """
    hash, mask = hash_id(id, vocabulary, salt), num_slots - 1
    word, start, k, crowded = make_slot(hash, vocabulary, row), hash, 0, 0
    while word.numel():
        at = (start + k) & mask
        winner = torch.full_like(slots, 2**62).scatter_reduce(0, at, row, "amin")
        wins = (slots[at] == EMPTY) & (winner[at] == row)
        slots[at[wins]] = word[wins]
        crowded += int((((at - hash) & mask)[wins] >= RUN).sum())
        word, row, hash, start, k = word[~wins], row[~wins], hash[~wins], *_step(start[~wins], k)
    return crowded


def _step(start: Tensor, k: int) -> tuple[Tensor, int]:
    return (start, k + 1) if k + 1 < RUN else (next_run(start), 0)
