"""Sharded tables: within a step each rank fetches rows from the ranks that own them, and sends their gradients back.

A row belongs to one rank, `recfx.kernels.index.owner` of its vocabulary and id. Three messages go from each rank to
each other one, of the same size for all:

    request      the distinct ids of the batch -> the owner finds or inserts them, those of rank 0 first
    answer       their weights                 -> the batch is pooled from these
    add_grads_   the sums of their gradients   -> the owner adds them, those of rank 0 first

and one reduction, `agree`, of the dense gradients, the number of samples and what the ranks must agree about. A bucket
holds the ids of one rank for one owner. It has a fixed capacity, equal on all ranks. Where a batch has more ids for an
owner, the step changes nothing on any rank, and its caller repeats it with a larger capacity, see `Exchange.look_`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recfx.dist.collectives import all_gather, all_reduce, all_to_all
from recfx.dist.group import Group
from recfx.embeddings import TablePlan
from recfx.kernels.counters import LOOKED_UP
from recfx.kernels.index import deal_ids
from recfx.kernels.op import UNKNOWN
from recfx.kernels.rows import take_rows
from recfx.table import Found, Reading, Table, TableState
from recfx.types import Params

__all__ = ["Agreed", "Exchange", "ExchangeState", "Requests", "note_"]

UNIT = 64  # a capacity is a multiple of it
HEADROOM = 1.125  # of a capacity over the largest bucket seen


class ExchangeState(NamedTuple):
    """What a step leaves for its caller; part of a `TrainState`."""

    overflowed: Tensor  # i64 [], whether a bucket was too small, so that the last step changed nothing
    most: Tensor  # i64 [sections], ids in the largest bucket of any rank and any step


class Requests(NamedTuple):
    """The ids that the ranks have requested from each other, and what they know afterwards."""

    readings: list[Reading]  # the ids that this rank owns, of all ranks, by table
    places: list[Tensor]  # i32 [P] by section: where in its buckets each id of this rank's batch is, -1 padding
    counts: Tensor  # bool [], whether the micro-batch counts: no bucket of any rank was too small
    first_sample: Tensor  # i64 [], real samples of the ranks before this one
    most: Tensor  # i64 [sections], ids in the largest bucket
    repeats: list[Tensor]  # i64 [] by section: occurrences of the ids beyond the one that was sent


class Agreed(NamedTuple):
    """What every rank knows after `Exchange.agree`."""

    grads: list[Params]  # addends of the dense gradients, to be added in this order
    num_samples: Tensor  # i64 [], of all ranks
    loss: Tensor  # f32 [], sum over the samples of all ranks
    is_good: Tensor  # bool [], whether all of it is finite, on every rank
    stats: dict[str, Tensor]  # means over the samples of all ranks


class Section(NamedTuple):
    """The buckets of one table, either for ids that may be inserted or for those that are only read."""

    table: int
    is_read_only: bool


class Exchange:
    """The exchanges of one step. It remembers the capacities, which a captured graph holds as constants.

    Args:     plans, tables: of the physical tables.
              sum_row_grads: see `recfx.step.train_step`.
              distinct: whether each id is sent once. Ids that are admitted by their count are sent as often as they
              occur, so that each occurrence is counted.
    """

    def __init__(
        self,
        group: Group,
        plans: Sequence[TablePlan],
        tables: Sequence[Table],
        sum_row_grads: Callable[..., None],
        *,
        distinct: bool,
    ) -> None:
        self.group, self.plans, self.tables = group, tuple(plans), tuple(tables)
        self.sum_row_grads, self.distinct = sum_row_grads, distinct
        self.sections = tuple(
            Section(i, is_read_only)
            for i, plan in enumerate(plans)
            for is_read_only in sorted({lookup.read_only for lookup in plan.lookups})
        )
        self.capacities = [0] * len(self.sections)
        self.rank = torch.tensor(group.rank, device=plans[0].device)

    def init(self) -> ExchangeState:
        """Before the first step."""
        zero = torch.zeros((), dtype=torch.int64, device=self.rank.device)
        return ExchangeState(zero, zero.repeat(len(self.sections)))

    # Capacities, between steps.

    def fit(self, readings: Sequence[Reading]) -> tuple[int, ...]:
        """Most ids that this rank may have to insert, by table. The first call sets the capacities, on all ranks."""
        if not all(self.capacities):
            largest = [self._largest(r) for r in self._by_section(readings)]
            self._raise_to(self.group.most(largest))
        ids = [0] * len(self.tables)
        for section, capacity in zip(self.sections, self.capacities, strict=True):
            ids[section.table] += 0 if section.is_read_only else capacity * self.group.world_size
        return tuple(ids)

    def look_(self, state: ExchangeState | tuple[()]) -> bool:
        """Whether the last step changed nothing and has to be repeated. Capacities are larger then. A host read."""
        if not isinstance(state, ExchangeState) or not int(state.overflowed):
            return False
        self._raise_to(state.most.tolist())
        state.overflowed.zero_()
        return True

    def _raise_to(self, most: Sequence[int]) -> None:
        for i, num in enumerate(most):
            if not self.capacities[i] or num > self.capacities[i]:
                self.capacities[i] = max(1, math.ceil(HEADROOM * num / UNIT)) * UNIT
                _check_places(self.plans[self.sections[i].table], self.capacities[i], self.group.world_size)

    def _largest(self, reading: Reading) -> int:
        """Ids in the largest bucket of this rank."""
        capacity = -(-reading.id.numel() // 2) * 2
        message = reading.id.new_empty(self.group.world_size, _words(capacity))
        return int(self._dealt(message, 0, reading, capacity)[1][:, 0].max())

    # Within a step.

    def request(self, readings: Sequence[Reading], num_samples: Tensor) -> Requests:
        """Sends the ids of a batch to their owners, and receives those that other ranks request from this one."""
        num = len(self.sections)
        header = 2 + 2 * num  # samples, whether a bucket was too small, ids in the largest ones, occurrences
        message = readings[0].id.new_empty(self.group.world_size, header + sum(map(_words, self.capacities)))
        places, counts, first = [], [], header
        for reading, capacity in zip(self._by_section(readings), self.capacities, strict=True):
            place, of_owners = self._dealt(message, first, reading, capacity)
            places.append(place)
            counts.append(of_owners)
            first += _words(capacity)
        most = [of_owners[:, 0].max() for of_owners in counts]
        too_small = [num_ids > capacity for num_ids, capacity in zip(most, self.capacities, strict=True)]
        message[:, 0] = num_samples
        message[:, 1] = torch.stack(too_small).any()
        message[:, 2 : 2 + num] = torch.stack(most)
        message[:, 2 + num : header] = torch.stack([n[:, 1] - n[:, 0] for n in counts], 1)
        received = all_to_all(self.group, message)
        sources = torch.arange(self.group.world_size, device=received.device)
        count = (received[:, 1] == 0).all()
        return Requests(
            readings=self._readings(received[:, header:], count),
            places=places,
            counts=count,
            first_sample=torch.where(sources < self.rank, received[:, 0], 0).sum(),
            most=received[:, 2 : 2 + num].amax(0),
            repeats=list(torch.where(count, received[:, 2 + num : header].sum(0), 0)),
        )

    def insert_(self, states: Sequence[TableState], requests: Requests) -> list[Found]:
        """Finds the ids that all ranks have requested from this one, and inserts new ones."""
        found = [t.insert_(s, r) for t, s, r in zip(self.tables, states, requests.readings, strict=True)]
        for section, repeats in zip(self.sections, requests.repeats, strict=True):
            if not section.is_read_only:
                states[section.table].counters[LOOKED_UP] += repeats
        return [_without_new(s, f) for s, f in zip(states, found, strict=True)] if self.group.deterministic else found

    def find(self, states: Sequence[TableState], requests: Requests) -> list[Found]:
        """Finds the ids that all ranks have requested from this one."""
        return [t.find(s, r) for t, s, r in zip(self.tables, states, requests.readings, strict=True)]

    def answer(
        self, readings: Sequence[Reading], states: Sequence[TableState], requests: Requests, own: Sequence[Found]
    ) -> list[Found]:
        """Where the batch's ids are among the rows that their owners send.

        Args:     readings: of the batch.  own: the ids that all ranks have requested from this one.
        """
        n, flat_own = self.group.world_size, self._by_section(own)
        sizes = [c * (self.plans[s.table].width + 1) for s, c in zip(self.sections, self.capacities, strict=True)]
        message, first = states[0].rows.new_empty(n, sum(sizes)), 0
        for section, f, size in zip(self.sections, flat_own, sizes, strict=True):
            take_rows.take_rows_(message, first, states[section.table].rows, f.row, self.plans[section.table].width)
            first += size
        blocks = all_to_all(self.group, message).split(sizes, dim=1)
        found: dict[int, Found] = {}
        flat = self._by_section(readings)
        of_sections = zip(self.sections, self.capacities, requests.places, flat, blocks, strict=True)
        for section, capacity, place, r, block in of_sections:
            width = self.plans[section.table].width
            rows = block[:, :-capacity].reshape(-1, width)
            status = block[:, -capacity:].reshape(-1)[place.clamp(min=0)].int()
            row = torch.where((place < 0) | (status == 0), place, status)
            trains = None if r.trains is None else r.trains[r.cell % len(r.trains)]
            inverse = place if trains is None else torch.where(trains, place, -1)
            one = Found(r, row, inverse, rows=rows[:, None], requested=own[section.table])
            found[section.table] = found[section.table]._replace(read_only=one) if section.table in found else one
        return list(found.values())

    def sum_by_id(
        self, states: Sequence[TableState], found: Sequence[Found], row_grads: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """The gradient of each id in the buckets, summed over its occurrences in this rank's batch.

        Returns:  by table [f32 [ranks * capacity, W]]; [] where no gradient reaches a row.
        """
        sums: list[list[Tensor]] = [[] for _ in self.tables]
        for (i, is_read_only), capacity in zip(self.sections, self.capacities, strict=True):
            if not is_read_only:
                sums[i] = [states[i].grads.new_zeros(self.group.world_size * capacity, self.plans[i].width)]
                for of_ids in self.tables[i].occurrences(found[i], row_grads[i]):
                    self.sum_row_grads(sums[i][0], *of_ids)
        return sums

    def add_grads_(
        self, states: Sequence[TableState], found: Sequence[Found], sums: Sequence[Sequence[Tensor]]
    ) -> None:
        """Sends the sums of `sum_by_id` to the owners, and adds those of the rows that this rank owns."""
        training = [(i, of_table[0]) for i, of_table in enumerate(sums) if of_table]
        if not training:
            return
        n, sizes = self.group.world_size, [s.numel() // self.group.world_size for _, s in training]
        message = (
            torch.cat([s.view(n, -1) for _, s in training], dim=1) if len(training) > 1 else training[0][1].view(n, -1)
        )
        for (i, own), block in zip(training, all_to_all(self.group, message).split(sizes, dim=1), strict=True):
            cell = torch.arange(len(own), dtype=torch.int32, device=own.device)
            width, grads = own.shape[1], [block.reshape(-1, 1, own.shape[1])]
            self.sum_row_grads(states[i].grads, found[i].own.inverse, cell, [0], [width], grads, None)

    def agree(
        self,
        grads: Params,
        *,
        num_samples: Tensor,
        loss: Tensor,
        is_good: Tensor | None,
        counts: Tensor,
        stats: dict[str, Tensor],
        old_stats: dict[str, Tensor],
    ) -> Agreed:
        """Exchanges a micro-batch's dense gradients and small numbers.

        Args:     num_samples, loss, is_good: of this rank; is_good None: NaN and infinity are ignored.
                  counts: see `Requests`. Where the micro-batch does not count, gradients and samples are 0.
                  stats, old_stats: of `forward`, from this micro-batch and before it.
        """
        device, has_samples = loss.device, num_samples > 0
        means = {k: s for k, s in stats.items() if s.is_floating_point()}
        weighted = [torch.where(has_samples, s * num_samples, 0.0) for s in means.values()]
        bad = torch.zeros((), device=device) if is_good is None else (~is_good).float()
        numbers = [num_samples.float(), loss.float(), bad]
        sent = torch.cat([t.float().flatten() for t in (*grads.values(), *weighted, *numbers)])
        if self.group.deterministic:
            received = all_gather(self.group, sent)
            received = torch.where(received == 0, 0.0, received)  # no -0.0: the sum is the same without empty addends
        else:
            received = all_reduce(self.group, sent)[None]
        sizes = [t.numel() for t in (*grads.values(), *means.values())]
        *parts, samples, losses, bads = received.split([*sizes, 1, 1, 1], dim=1)
        good = (bads == 0).all()
        if is_good is not None:
            good &= torch.isfinite(received).all()
        of_params = list(zip(grads.items(), parts[: len(grads)], strict=True))
        addends = [
            {name: torch.where(counts, part[i], 0.0).view_as(g).to(g.dtype) for (name, g), part in of_params}
            for i in range(len(received))
        ]
        num = _ordered_sum(samples)[0]
        new_stats = dict(stats)
        for (name, mean), part in zip(means.items(), parts[len(grads) :], strict=True):
            new_stats[name] = (_ordered_sum(part) / num.clamp(min=1)).view_as(mean).to(mean.dtype)
        new_stats = {k: torch.where(counts & (num > 0), s, old_stats[k]) for k, s in new_stats.items()}
        num_samples = torch.where(counts, num.long(), 0)
        return Agreed(addends, num_samples, _ordered_sum(losses)[0], good, new_stats)

    def total(self, number: Tensor) -> Tensor:
        """A number f64 [], summed over the ranks."""
        if not self.group.deterministic:
            return all_reduce(self.group, number)
        return _ordered_sum(all_gather(self.group, number[None]))[0]

    # Their parts.

    def _by_section(self, of_tables: Sequence) -> list:
        """Readings, or what was found of them, by section: the main ones of each table, then its read-only ones."""
        parts = [part for one in of_tables for part in (one, one.read_only)]
        return [part for part in parts if part is not None]

    def _dealt(self, message: Tensor, first: int, reading: Reading, capacity: int) -> tuple[Tensor, Tensor]:
        ids = reading.id, reading.cell, reading.vocabularies, reading.trains
        return deal_ids.deal_ids_(message, first, *ids, capacity, self.distinct)

    def _readings(self, buckets: Tensor, counts: Tensor) -> list[Reading]:
        """The ids in the buckets of all ranks, by table; none unless the micro-batch counts."""
        readings: dict[int, Reading] = {}
        parts = buckets.split(list(map(_words, self.capacities)), dim=1)
        for (i, _), capacity, part in zip(self.sections, self.capacities, parts, strict=True):
            id, tag = part[:, :capacity].reshape(-1), part[:, capacity:].contiguous().view(torch.int32).reshape(-1)
            number = torch.arange(2 * len(self.plans[i].vocabularies), dtype=torch.int32, device=id.device)
            all_train = all(lookup.trainable for lookup in self.plans[i].lookups if not lookup.read_only)
            trains = None if all_train else number % 2 == 1
            reading = Reading(id, torch.where(counts, tag, -1), number // 2, trains=trains)
            readings[i] = readings[i]._replace(read_only=reading) if i in readings else reading
        return list(readings.values())


def _check_places(plan: TablePlan, capacity: int, world_size: int) -> None:
    """Raises ValueError where buckets have more places than 32 bits can number."""
    if capacity * world_size >= 2**31:
        raise ValueError(
            f"features '{plan.lookups[0].feature}' to '{plan.lookups[-1].feature}': got buckets of {capacity} ids for "
            f"each of {world_size} ranks, expected fewer than 2**31 places in all. They have 32-bit numbers. Use "
            "smaller batches, or truncate long lists."
        )


def _without_new(s: TableState, found: Found) -> Found:
    """Read-only lookups without the rows of this optimiser step, which depend on what other streams have read."""
    if found.read_only is None:
        return found
    row = found.read_only.row
    is_new = (row >= 0) & (s.born[row.clamp(min=0)] > s.step)
    return found._replace(read_only=found.read_only._replace(row=torch.where(is_new, UNKNOWN, row)))


def note_(state: ExchangeState | tuple[()], requests: Requests) -> None:
    """Leaves for `Exchange.look_` whether the buckets were large enough."""
    assert isinstance(state, ExchangeState)
    state.overflowed.copy_(~requests.counts)
    state.most.copy_(torch.maximum(state.most, requests.most))


def _words(capacity: int) -> int:
    """i64 words of a bucket: ids, and tags of half the size."""
    return capacity + capacity // 2


def _ordered_sum(parts: Tensor) -> Tensor:
    """The sum over the first axis, in its order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
