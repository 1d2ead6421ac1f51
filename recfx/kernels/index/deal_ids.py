"""deal_ids_: the distinct ids of a batch, in a bucket for each rank that owns some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.index.owner import owner
from recfx.kernels.op import define_op

__all__ = ["deal_ids_"]

NO_VOCABULARY = 2**31 - 1  # of padding, while ids are sorted


def definition(
    message: Tensor,
    first: int,
    id_P: Tensor,
    cell_P: Tensor,
    vocabularies: Tensor,
    trains: Tensor | None,
    capacity: int,
    distinct: bool,
) -> tuple[Tensor, Tensor]:
    """Writes each distinct (vocabulary, id) to the bucket of its owner, in the order of first occurrences.

    A bucket is message[rank, first:] with `capacity` ids, then as many tags i32: vocabulary << 1 | whether an
    occurrence trains the row; -1 where the bucket holds no id, and the id is 0. With distinct=False each occurrence is
    an entry. All shapes are fixed; nothing is read on the host.

    Shapes:   message i64 [ranks, K], capacity even; id_P, cell_P, vocabularies as in `find`; trains bool [L], None:
              all.
    Returns:  place_P i32 [P], rank * capacity + place in the bucket, -1 for padding and where there was no room;
              counts i64 [ranks, 2], entries with those that had no room, and occurrences.
    Writes:   message, the buckets only.
    """
    num, ranks, device = id_P.numel(), message.shape[0], id_P.device
    vocabulary = torch.where(cell_P < 0, NO_VOCABULARY, vocabularies[cell_P % len(vocabularies)])
    is_id, nth = cell_P >= 0, torch.arange(num, device=device)
    trained = is_id if trains is None else is_id & trains[cell_P % len(trains)]
    of_rank = torch.where(is_id, owner(id_P, vocabulary, ranks), ranks)

    by_id = torch.sort(id_P, stable=True).indices
    order = by_id[torch.sort(vocabulary[by_id], stable=True).indices]  # equal keys together, in their order
    key = torch.stack([vocabulary[order].long(), id_P[order]])
    begins = torch.ones(num, dtype=torch.bool, device=device)
    if distinct:
        begins[1:] = (key[:, 1:] != key[:, :-1]).any(0)
    group = torch.cumsum(begins, 0) - 1
    head = order[torch.cummax(torch.where(begins, nth, 0), 0).values] if num else order
    is_first = is_id & torch.zeros_like(begins).scatter(0, order, begins)
    num_trained = torch.zeros(num, dtype=torch.int64, device=device).index_add(0, group, trained[order].long())
    any_trains = torch.zeros_like(begins).scatter(0, order, num_trained[group] > 0)

    bucket = torch.where(is_first, of_rank, ranks)
    entries = torch.zeros(ranks + 1, dtype=torch.int64, device=device).index_add(0, bucket, torch.ones_like(nth))
    by_bucket = torch.sort(bucket, stable=True).indices
    starts = torch.cumsum(entries, 0) - entries
    place_in = torch.empty_like(nth).scatter(0, by_bucket, nth - starts[bucket[by_bucket]])
    fits = is_first & (place_in < capacity)
    place = torch.where(fits, bucket * capacity + place_in, -1)

    end = ranks * capacity
    at = torch.where(fits, place, end)
    ids = torch.zeros(end + 1, dtype=torch.int64, device=device).scatter(0, at, id_P)
    tag = (vocabulary << 1 | any_trains).int()
    tags = torch.full((end + 1,), -1, dtype=torch.int32, device=device).scatter(0, at, tag)
    message[:, first : first + capacity] = ids[:end].view(ranks, capacity)
    words = tags[:end].view(torch.int64).view(ranks, capacity // 2)
    message[:, first + capacity : first + capacity + capacity // 2] = words
    occurrences = torch.zeros_like(entries).index_add(0, of_rank, torch.ones_like(nth))
    place_P = torch.empty_like(nth).scatter(0, order, place[head])
    return place_P.int(), torch.stack([entries[:ranks], occurrences[:ranks]], 1)


def _fake(message, first, id_P, cell_P, vocabularies, trains, capacity, distinct):  # type: ignore[no-untyped-def]
    return torch.empty_like(cell_P), message.new_empty(message.shape[0], 2)


deal_ids_ = define_op("deal_ids_", definition=definition, fake=_fake)
