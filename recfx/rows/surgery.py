"""Reading, writing and deleting rows by id."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recfx.kernels.index.find_or_insert import find_or_insert_
from recfx.kernels.op import UNKNOWN
from recfx.rows.place import Place, Rows, check_device, place_of, reading_of, rows_of, taken
from recfx.step import Step, TrainState
from recfx.table import delete_ as delete_rows_
from recfx.table import grow_, initializer_tensors, num_live

__all__ = ["check_ids", "check_values", "delete_", "read", "write_"]


def read(step: Step, state: TrainState, table: str, ids: Tensor) -> Rows:
    """The rows of `ids` i64 [N], in their order. Creates none.

    Raises:   ValueError on an unknown table or ids on another device, TypeError on ids that are not i64 [N].
    Example:  >>> from recfx import optim
              >>> from recfx.embeddings import Embedding
              >>> from recfx.step import train_step
              >>> step = train_step(features=dict, embeddings={"emb": [Embedding("item", dim=2)]},
              ...                   forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None],
              ...                   sparse_optimizer=optim.sparse_sgd(0.1), dense_optimizer=optim.sgd(0.1))
              >>> state = step.init({"w": torch.zeros(1)})
              >>> state = write_(step, state, "emb/item", torch.tensor([7]), torch.tensor([[0.5, 2.0]]))
              >>> read(step, state, "emb/item", torch.tensor([7, 8])).weight.tolist()
              [[0.5, 2.0], [0.0, 0.0]]
    """
    place = place_of(step, state, table)
    return taken(place, rows_of(place, ids), ids)


def write_(
    step: Step, state: TrainState, table: str, ids: Tensor, weight: Tensor, slots: Mapping[str, Tensor] | None = None
) -> TrainState:
    """Inserts rows, or overwrites those that exist: pre-trained vectors.

    The optimiser starts afresh on them (zeros) but for `slots` of its names. The other tables over these ids keep their
    weights; in a new row they have their initial ones. No policy is asked, and a row's age and count stay.

    Args:     ids: i64 [N], distinct.  weight: f32 [N, D].  slots: as in `Rows`, some of them.
    Raises:   ValueError inside a step, on an unknown table, another device than the table's, ids that repeat, a wrong
              shape, a number that is not finite, or too little room for the new ids; TypeError on wrong dtypes. Nothing
              is then written.
    """
    place = place_of(step, state, table)
    if slots is not None and (not isinstance(slots, Mapping) or "weight" in slots):
        got = list(slots) if isinstance(slots, Mapping) else type(slots).__name__
        raise ValueError(f"slots: got {got}, expected tensors by some of the names {list(place.views)[1:]}.")
    values = {"weight": weight, **(slots or {})}
    known = check_ids(place, state, table, ids)
    check_values(place, ids, values)
    t, num_new = place.table, int((~known).sum())
    grow_(t, num_new)
    row = _insert_(place, step.seed, ids)
    t.born[row[~known]] = t.step.int()
    t.seen[row] = t.step << 32
    for name, view in place.views.items():
        view[row] = values[name].detach() if name in values else torch.zeros_like(view[row])
    return state


def delete_(step: Step, state: TrainState, table: str, ids: Tensor) -> TrainState:
    """Deletes the rows of `ids`, for all tables that share them; ids without a row are passed over.

    Raises:   ValueError inside a step or on an unknown table, TypeError on ids that are not i64 [N].
    """
    place = place_of(step, state, table)
    _check_between_steps(place, state)
    row = rows_of(place, ids)
    delete_rows_(place.table, row[row != UNKNOWN])
    return state


def _insert_(place: Place, seed: int, ids: Tensor) -> Tensor:
    """Row of each id; new ones with their initial values. Room has been made."""
    t, behind = place.table, place.table.rows.shape[2] - place.plan.width
    init = (nn.functional.pad(x, (0, behind)) for x in initializer_tensors(place.plan, seed))
    tally, refused, reading = t.tally.clone(), t.num_refused.clone(), reading_of(place, ids)
    row, _ = find_or_insert_(
        t.slots, t.ids, t.vocabularies, t.seen, t.born, t.rows, t.num_rows, t.free_rows, t.num_free, t.num_refused,
        t.tally, t.num_crowded, t.unique_rows, t.num_unique, t.num_slots, t.salt, t.step + 1,
        reading.id, reading.cell, reading.vocabularies, *init, None,
    )  # fmt: skip
    t.tally.copy_(tally)  # these counters, and the step's unique rows, are of training
    t.num_refused.copy_(refused)
    t.num_unique.zero_()
    return row.long()


def _check_between_steps(place: Place, state: TrainState) -> None:
    if int(place.table.num_unique) or int(state.window.num_batches):
        raise ValueError("state: got a step in progress, expected none. Write rows between optimiser steps.")


def check_ids(place: Place, state: TrainState, table: str, ids: Tensor) -> Tensor:
    """bool [N]: which ids have a row. Raises what `write_` raises about ids."""
    _check_between_steps(place, state)
    known = rows_of(place, ids) != UNKNOWN
    num_repeated = ids.numel() - ids.unique().numel()
    if num_repeated:
        raise ValueError(f"ids: got {num_repeated} more than once, expected each once.")
    num_new, room = int((~known).sum()), place.table.ids.numel() - num_live(place.table)
    if num_new > room:
        raise ValueError(f"table '{table}': got {num_new} new ids, expected at most {room}. Raise max_rows.")
    return known


def check_values(place: Place, ids: Tensor, values: Mapping[str, Tensor]) -> None:
    """Raises what `write_` raises about weights and slots."""
    for name, value in values.items():
        if name not in place.views:
            raise ValueError(f"slots: got '{name}', expected some of {list(place.views)[1:]}.")
        shape = [ids.numel(), place.views[name].shape[1]]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: got {got}, expected torch.float32 {shape}.")
        if list(value.shape) != shape:
            raise ValueError(f"{name}: got {list(value.shape)}, expected {shape}.")
        check_device(name, place, value)
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: got values that are not finite, expected numbers. Training would spread them.")
